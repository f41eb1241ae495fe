"""One running service a home: the lock that makes it one, and what a second start may know of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
import fcntl
import json
from pathlib import Path
import time
from typing import IO, Any

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

    @property
    def ports(self) -> dict[str, Any]:
        """Its Ray node's, by RayNode's names."""
        named = {"port": self.ray_port, "stats_port": self.stats_port, "metrics_port": self.metrics_port}
        named |= {"fallback_port": self.fallback_port}
        return named | ({"dashboard_port": self.dashboard_port} if self.dashboard_port else {})

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


@contextmanager
def occupy(home: Path) -> Iterator[bool]:
    """Be the one service of this home while the block runs, however it ends. Raises AlreadyRunning.

    Gives whether the one before was killed: only such a one leaves its description.
    """
    if not home.exists():
        home.mkdir(parents=True)
        home.chmod(0o711)  # PostgreSQL's account passes through, and sees nothing
    with (home / "serve.lock").open("w") as lock:
        if not _take(lock):
            raise AlreadyRunning(_read(home))
        killed = (home / "serve.json").exists()
        (home / "serve.json").unlink(missing_ok=True)
        try:
            yield killed
        finally:
            (home / "serve.json").unlink(missing_ok=True)


def announce(home: Path, running: Running) -> None:
    """Write down what runs, for `status`, `stop` and a second start; only who occupies the home may."""
    write_private(home / "serve.json", json.dumps(asdict(running), indent=1).encode())


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
