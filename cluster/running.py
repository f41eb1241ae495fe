"""One running service a home: the lock that makes it one, and what a second start may know of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
import fcntl
import json
from pathlib import Path
import time
from typing import IO

from serve_app.private_files import write_private


@dataclass(frozen=True, slots=True)
class Running:
    """The service of a home, as `$DERM_HOME/serve.json` (0600) describes it; `started_at` is RFC 3339."""

    pid: int
    url: str
    started_at: str
    ready: bool
    profile: str
    ray_port: int
    stats_port: int
    metrics_port: int
    fallback_port: int
    dashboard_port: int | None = None

    def describe(self) -> str:
        """Say what runs and how to stop it."""
        state = "running" if self.ready else "starting"
        return (
            f"derm-cds is already {state}: {self.url} (pid {self.pid}, since {self.started_at}).\n"
            f"To stop it: derm-cds stop, or Ctrl-C where it was started, or kill {self.pid}"
        )


class AlreadyRunning(Exception):
    """Another process serves this home; `running` says which, None while it has not yet said."""

    def __init__(self, running: Running | None) -> None:
        super().__init__(running.describe() if running else "derm-cds is already starting here.")
        self.running = running


class Tenancy:
    """Being the one service of a home: kept until the process ends, however it ends."""

    def __init__(self, home: Path) -> None:
        self._file = home / "serve.json"

    def announce(self, running: Running) -> None:
        """Write down what runs, for `status`, `stop` and a second start."""
        write_private(self._file, json.dumps(asdict(running), indent=1).encode())

    def announce_ready(self) -> None:
        """Say that it answers now."""
        self.announce(replace(Running(**json.loads(self._file.read_bytes())), ready=True))


@contextmanager
def occupy(home: Path) -> Iterator[Tenancy]:
    """Be the one service of this home while the block runs. Raises AlreadyRunning."""
    if not home.exists():
        home.mkdir(parents=True)
        home.chmod(0o711)  # PostgreSQL's account passes through, and sees nothing
    with (home / "serve.lock").open("w") as lock:
        if not _take(lock):
            raise AlreadyRunning(_read(home))
        (home / "serve.json").unlink(missing_ok=True)  # of one that was killed
        try:
            yield Tenancy(home)
        finally:
            (home / "serve.json").unlink(missing_ok=True)


def _take(lock: IO[str]) -> bool:
    # `running_service` holds the lock for a moment when it looks: that is not a service.
    for _ in range(5):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return True
    return False


def running_service(home: Path) -> Running | None:
    """Read what runs in this home; None when nothing does."""
    try:
        with (home / "serve.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(home)
    except FileNotFoundError:
        return None
    return None


def _read(home: Path) -> Running | None:
    try:
        return Running(**json.loads((home / "serve.json").read_bytes()))
    except FileNotFoundError:
        return None
