"""Which processes of this machine belong to one Ray node, and how they are ended.

They carry a mark in their environment, which children inherit. Some overwrite theirs with
their title; those are found as descendants, or in the session that `ray start` opened.
"""

from __future__ import annotations

from collections.abc import Iterable
import os
from pathlib import Path
import signal

import psutil

MARK = "DERM_NODE"
#: What a node cannot be without. Everything else Ray itself starts again.
CORE = frozenset({"gcs_server", "raylet"})


def core(home: Path) -> list[psutil.Process]:
    """The processes that the node of this home cannot be without."""
    return [process for process in marked(home) if name(process) in CORE]


def live(core: Iterable[psutil.Process]) -> bool:
    """Whether a node lives whose core this was, without looking at every process of the machine."""
    return {name(process) for process in core if process.is_running()} == CORE


def belonging(home: Path) -> list[psutil.Process]:
    """Every process of the node of this home, the caller and its ancestors aside."""
    found = set(marked(home))
    for process in list(found):
        found.update(_descendants(process))
    for session in {_session(process) for process in found if name(process) in CORE}:
        if session is not None and session != os.getsid(0):
            found.update(in_session(session))
    ourselves = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    return [process for process in found if process.pid not in ourselves]


def marked(home: Path) -> list[psutil.Process]:
    """The processes that carry this home's mark, the caller aside."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(home) and process.pid != os.getpid():
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def in_session(session: int) -> list[psutil.Process]:
    """The processes of one session."""
    return [process for process in psutil.process_iter() if _session(process) == session]


def name(process: psutil.Process) -> str:
    """The program's name; empty once it has ended, reaped or not."""
    try:
        return "" if process.status() == psutil.STATUS_ZOMBIE else str(process.name())
    except psutil.Error:
        return ""


def end(processes: list[psutil.Process], number: signal.Signals, timeout_s: float) -> None:
    """Send a signal and wait until they have ended, or the time is up."""
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=timeout_s)


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except OSError:
        return None
