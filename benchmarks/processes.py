"""Memory and processor time of a set of processes.

Memory is PSS: a shared page is counted once, split among its sharers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import psutil


def with_descendants(roots: Iterable[psutil.Process]) -> dict[int, psutil.Process]:
    """Each process and everything below it, by pid."""
    found: dict[int, psutil.Process] = {}
    for root in roots:
        try:
            for process in (root, *root.children(recursive=True)):
                found[process.pid] = process
        except psutil.NoSuchProcess:
            continue
    return found


def measure_pss(roots: Iterable[psutil.Process]) -> dict[str, Any]:
    """Sum the PSS of the processes and their descendants, in MB, with the parts by name."""
    parts: dict[str, float] = {}
    processes = with_descendants(roots)
    for process in processes.values():
        try:
            parts[_name(process)] = process.memory_full_info().pss / 1e6
        except psutil.Error:
            continue
    return {
        "total_mb": round(sum(parts.values()), 1),
        "processes": len(parts),
        "parts_mb": {name: round(mb, 1) for name, mb in sorted(parts.items(), key=lambda part: -part[1])},
    }


def measure_cpu(roots: Iterable[psutil.Process]) -> dict[str, float]:
    """Processor seconds, user and system, that each process has used so far."""
    used: dict[str, float] = {}
    for process in with_descendants(roots).values():
        try:
            times = process.cpu_times()
            used[_name(process)] = times.user + times.system
        except psutil.Error:
            continue
    return used


def _name(process: psutil.Process) -> str:
    command = process.cmdline() or [process.name()]
    name = command[0].strip() or process.name()
    if "python" in name:
        name = " ".join(command)[-60:]
    return f"{name[:60]} {process.pid}"
