"""The cores of a machine, shared by the replicas of a stage that run on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import os
from pathlib import Path
import socket
from typing import TypeVar
from uuid import uuid4

Result = TypeVar("Result")


class SharedCores:
    """Threads for a stage's work: jobs at once × threads of a job × replicas on this machine = cores.

    Ray scales replicas by how many requests wait, and packs them by logical CPUs, not by cores. So each replica
    counts those of its stage beside it, in its health check, and does at once what is its share, but always one job.

    A replica is known by a Unix socket with an abstract name: those of a machine (a pod) are listed in one place,
    and the kernel takes away a dead process's.
    """

    def __init__(self, stage: str, *, threads: int = 1, most: int | None = None) -> None:
        """`threads`: cores of one job; `most`: jobs at once, however many cores there are."""
        self._stage, self._threads = stage, threads
        self._cores = len(os.sched_getaffinity(0))
        self._most = most or self._cores
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0derm-cds/{stage}/{uuid4()}")
        self._jobs, self._pool = 0, ThreadPoolExecutor(1)
        self.share()

    def share(self) -> int:
        """Count the replicas on this machine anew; returns how many jobs this one does at once."""
        jobs = max(1, min(self._most, self._cores // (self._threads * self._replicas())))
        if jobs != self._jobs:
            old, self._pool = self._pool, ThreadPoolExecutor(jobs, thread_name_prefix=self._stage)
            old.shutdown(wait=False)  # what it has begun and what waits there is still done
            self._jobs = jobs
        return jobs

    async def run(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Run a job in a thread, as soon as there is one."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def close(self) -> None:
        """Give this replica's share back."""
        self._socket.close()
        self._pool.shutdown()

    def _replicas(self) -> int:
        sockets = Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace")
        return max(1, sockets.count(f" @derm-cds/{self._stage}/"))
