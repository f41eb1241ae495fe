"""The accounts of the system that a node's parts run as: what they handle is not all one account's.

Where root starts the node, PostgreSQL and the decoder have accounts of their own, made at first use, so that neither
reads a key. Nothing that is not the node's is opened to them: what they cannot reach is refused, with what to do.
"""

from __future__ import annotations

from dataclasses import dataclass
import os
from pathlib import Path
import pwd
import stat
import subprocess
from typing import Any

from serve_app.domain.errors import DermError

POSTGRES, DECODER = "derm-postgres", "derm-decoder"


class AccountFailed(DermError):
    """An account of the system is missing, or cannot reach what it needs."""


@dataclass(frozen=True, slots=True)
class Account:
    """Whom a part runs as; `switch` says whether that is someone else than this process, whatever its `name`."""

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

    def require_way_to(self, path: Path) -> None:
        """Raise AccountFailed where it cannot pass through a folder above `path`: /root is nobody's way."""
        for folder in reversed(path.resolve().parents):
            status = folder.stat()
            through = stat.S_IXOTH | (stat.S_IXGRP if status.st_gid == self.gid else 0)
            if self.switch and status.st_uid != self.uid and not status.st_mode & through:
                raise AccountFailed(
                    f"{self.name}, whose account this part runs as, cannot pass through {folder} to {path}. Put the node's "
                    "home (DERM_HOME), and code and virtual environment, where every account may pass: below /opt, /srv "
                    "or /var/lib."
                )


def account_of(name: str) -> Account:
    """Return an account of the system, making it when root has none yet; this process's own for everybody else."""
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
                f"The account {name} could not be made: {error}. Make it by hand, or run this as an ordinary user."
            ) from error
        entry = pwd.getpwnam(name)
    return Account(name, entry.pw_uid, entry.pw_gid, switch=True)
