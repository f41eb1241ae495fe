"""The accounts that a node runs as: root's as seldom as can be, and no key for whom strangers reach.

Root steps down to the account that the home belongs to. In a home of root's own, PostgreSQL and the decoder
have accounts of their own, made at first use. Nothing that is not the node's is opened to any: what cannot be
reached is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
import os
from pathlib import Path
import pwd
import stat
import subprocess
import sys
from typing import Any

from serve_app.audit.events import os_account
from serve_app.domain.errors import DermError
from serve_app.sandbox import landlock_version
from serve_app.settings import REPOSITORY, model_folder

SERVICE, POSTGRES, DECODER = "derm-cds", "derm-postgres", "derm-decoder"
_REACHES = "import os, sys; sys.exit(not all(os.access(path, os.R_OK | os.X_OK) for path in sys.argv[1:]))"


class AccountFailed(DermError):
    """An account of the system is missing, or cannot reach what it needs."""


@dataclass(frozen=True, slots=True)
class Account:
    """Whom a part runs as; `switch`: someone else than this process, which is so whatever its `name` is."""

    name: str
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

    def let_through(self, home: Path) -> None:
        """Let it pass through (not list, not read) the node's own home; never through root's login folder."""
        if self.switch and home != Path(pwd.getpwuid(0).pw_dir).resolve():
            home.chmod(stat.S_IMODE(home.stat().st_mode) | stat.S_IXOTH)

    def reaches(self, path: Path) -> bool:
        """Whether it may pass through every folder above `path`."""
        return self._closed(path) is None

    def require_way_to(self, path: Path) -> None:
        """Raise AccountFailed where it cannot pass through a folder above `path`: /root is nobody's way."""
        if (folder := self._closed(path)) is not None:
            raise AccountFailed(
                f"{self.name}, the account of this part of the node, cannot pass through {folder} to {path}. "
                "Have the node's home (DERM_HOME), code and virtual environment where all accounts may pass: "
                "below /opt, /srv or /var/lib."
            )

    def _closed(self, path: Path) -> Path | None:
        for folder in reversed(path.resolve().parents):
            status = folder.stat() if folder.exists() else None
            if status is not None and self.switch and status.st_uid != self.uid:
                through = stat.S_IXOTH | (stat.S_IXGRP if status.st_gid == self.gid else 0)
                if not status.st_mode & through:
                    return folder
        return None


def step_down(home: Path, *, new: bool = False) -> None:
    """Where root runs a command: go on as the account that the home belongs to, for good.

    With `new`, a home that is not there is made for SERVICE; it stays root's where that account cannot reach
    home or code, and without Landlock, which keeps PostgreSQL and the decoder of one account from its keys.
    AccountFailed where the account of a home cannot run our code.
    """
    if os.geteuid() != 0:
        return
    if new and not home.exists():
        account = account_of(SERVICE)
        if not (landlock_version() and account.reaches(home) and _runs_our_code(account)):
            return
        umask = os.umask(0o022)  # what is made above it is to be passed through
        home.mkdir(mode=0o700, parents=True)
        os.umask(umask)
        os.chown(home, account.uid, account.gid)
    if not home.exists() or (owner := home.stat().st_uid) == 0:
        return
    entry = pwd.getpwuid(owner)
    if not _runs_our_code(Account(entry.pw_name, owner, entry.pw_gid, switch=True)):
        raise AccountFailed(
            f"{home} belongs to {entry.pw_name}, which cannot run {sys.executable} with {REPOSITORY}: "
            "have both, and the models, where every account may read them, say below /opt."
        )
    os_account()  # it is root who acts
    os.initgroups(entry.pw_name, entry.pw_gid)
    os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
    os.setresuid(owner, owner, owner)
    os.environ["HOME"] = str(home)


def _runs_our_code(account: Account) -> bool:
    ray = find_spec("ray")
    paths = [REPOSITORY, model_folder(), *(ray.submodule_search_locations or () if ray else ())]
    command = [sys.executable, "-I", "-S", "-c", _REACHES, *map(str, paths)]
    try:
        return subprocess.run(command, check=False, cwd="/", **account.popen).returncode == 0
    except OSError:
        return False


def account_of(name: str) -> Account:
    """Return an account, making it when root has none yet; this process's own for everybody else."""
    if os.geteuid() != 0:
        return Account(name, os.geteuid(), os.getegid(), switch=False)
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        command = ["useradd", "--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent"]
        command += ["--shell", "/usr/sbin/nologin", name]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise AccountFailed(
                f"The account {name} could not be made: {error}. "
                "Make it by hand, or run this as an ordinary user."
            ) from error
        entry = pwd.getpwnam(name)
    return Account(name, entry.pw_uid, entry.pw_gid, switch=True)
