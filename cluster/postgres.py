"""The embedded PostgreSQL of one node: set up, start, stop.

    $DERM_HOME/postgres.json                 0600  port and passwords
    $DERM_HOME/postgres/etc/                       its configuration: ours, it only reads
    $DERM_HOME/postgres/{data,socket,log}/   0700  the server account's own

The server outlives the process that starts it, and the next one finds it running.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import fcntl
import os
from pathlib import Path
import secrets
import subprocess
import time
from typing import Literal

import psutil

from cluster.ports import choose_port, is_listened_on
from cluster.postgres_account import PostgresFailed, let_in, let_run, programs, server_account
from cluster.postgres_state import SUPERUSER, DatabaseUrls, PostgresState, fits_socket

__all__ = ["DatabaseUrls", "EmbeddedPostgres", "PostgresFailed", "ensure_cluster"]

_HERE = Path(__file__).parent
_START_TIMEOUT_S = 120
_STOP_TIMEOUT_S = 30
_LEFTOVERS_TIMEOUT_S = 10


def ensure_cluster(home: Path) -> DatabaseUrls:
    """Set up and start the embedded server below `home` where that is still to do; return its URLs."""
    return EmbeddedPostgres(home).ensure()


class EmbeddedPostgres:
    """The server below `home`; `port` asks for a port when it is first set up.

    Blocking calls, safe from several processes at once. PostgresFailed says what went wrong.
    """

    def __init__(self, home: Path, *, port: int | None = None) -> None:
        self.home = home.resolve()
        self.directory = self.home / "postgres"
        self.data = self.directory / "data"
        self.log = self.directory / "log" / "postgres.log"
        self._port = port
        self.programs = programs()
        self.account = server_account()

    def ensure(self) -> DatabaseUrls:
        """Set up what is missing, start the server unless it runs, and return its URLs."""
        with self.alone() as state:
            self.lay_out()
            if not (self.data / "PG_VERSION").exists():
                if state.ready:  # an empty database in place of a lost one would pass for a working service
                    raise PostgresFailed(
                        f"{self.data} is gone. Put it back, or `derm-cds restore` a backup; for an empty "
                        f"database, remove {self.state_file}."
                    )
                self._initdb(state)
            self._start(state)
            if not state.ready:
                self._make_roles(state)
                state.ready = True
                state.write(self.state_file)
            return state.urls(self.socket_directory(state))

    def start(self) -> None:
        """Start the server unless it runs; return once it takes connections."""
        with self.alone() as state:
            self._start(state)

    def stop(self, *, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop the server if it runs: sessions end, what they had not committed rolls back.

        Fast writes a checkpoint; immediate leaves that to the next start, and is what a stop
        becomes that takes longer than 30 s. Neither loses what was committed.
        """
        with self.alone():
            for how in (mode, "immediate"):
                if self.is_running():
                    options = ("-m", how, "-w", "-t", _STOP_TIMEOUT_S)
                    self.run("pg_ctl", "stop", "-D", "data", *options, check=False)
            if self.is_running():
                raise PostgresFailed(f"PostgreSQL in {self.data} did not stop.")

    def is_running(self) -> bool:
        """Whether the server is alive; it may still be recovering from a crash."""
        return self.pid() is not None

    def pid(self) -> int | None:
        """Find the postmaster's process; None when it is dead, whatever postmaster.pid says."""
        try:
            process = psutil.Process(self._noted_pid())
            alive = process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == self.data
        except (OSError, ValueError, psutil.Error):
            return None
        return process.pid if alive else None

    @property
    def state_file(self) -> Path:
        """Where its port and passwords are, 0600."""
        return self.home / "postgres.json"

    @contextmanager
    def alone(self) -> Iterator[PostgresState]:
        """Hold the server's state against other processes: one at a time sets up, starts, stops or restores."""
        # The kernel drops the lock of one that is killed.
        self.home.mkdir(mode=0o711, parents=True, exist_ok=True)
        with (self.home / "postgres.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = PostgresState.read(self.state_file)
            if state is None:
                state = PostgresState.fresh(self._port)
                state.write(self.state_file)
            yield state

    def socket_directory(self, state: PostgresState) -> Path | None:
        """Where its socket is; None when the path would be too long, and loopback has to do."""
        directory = self.directory / "socket"
        return directory if fits_socket(directory, state.port) else None

    def _noted_pid(self) -> int:
        return int((self.data / "postmaster.pid").read_text().split("\n", 1)[0])

    def lay_out(self) -> None:
        """Make the folders around the data directory, each with its owner and mode."""
        self.directory.mkdir(mode=0o711, exist_ok=True)
        self.directory.chmod(0o711)
        (self.directory / "etc").mkdir(exist_ok=True)
        (self.directory / "etc").chmod(0o755)
        let_in(self.account, self.data)
        let_run(self.account, self.programs)
        for name in ("log", "socket", "setup"):
            self.account.own(self.directory / name, 0o700)

    def _initdb(self, state: PostgresState) -> None:
        # Elsewhere first: a set-up that was cut off never leaves half a data directory.
        fresh = self.directory / "setup" / f"data-{secrets.token_hex(4)}"
        password = self.directory / "etc" / "password"
        password.unlink(missing_ok=True)
        password.touch(mode=0o600)
        try:
            password.write_text(state.superuser_password)
            os.chown(password, self.account.uid, self.account.gid)
            options = ["--username", SUPERUSER, "--pwfile", password, "--auth", "scram-sha-256"]
            options += [
                "--sync-method",
                "syncfs",
                "--data-checksums",
                "--encoding",
                "UTF8",
                "--no-instructions",
                "--locale",
                "C",
            ]
            options += ["--locale-provider", "builtin", "--builtin-locale", "C.UTF-8"]
            self.run("initdb", "-D", fresh, *options)
        finally:
            password.unlink()
        fresh.rename(self.data)

    def _start(self, state: PostgresState) -> None:
        if not self.is_running():
            self._clear_leftovers()
            if is_listened_on("127.0.0.1", state.port):
                state.port = choose_port()
                state.write(self.state_file)
            self._configure(state)
            # pg_ctl builds a shell command: relative paths, for ours may hold what a shell minds.
            options = ("-l", "log/postgres.log", "-o", "-c config_file=etc/postgresql.conf")
            self.run("pg_ctl", "start", "-D", "data", *options, "-w", "-t", _START_TIMEOUT_S)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._takes_connections():
            if time.monotonic() > deadline or not self.is_running():
                raise PostgresFailed(f"PostgreSQL did not become ready.\n{self._log_tail()}")
            time.sleep(0.05)

    def _takes_connections(self) -> bool:
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) > 7 and lines[7].strip() == "ready"

    def _clear_leftovers(self) -> None:
        # A killed server leaves lock files that name its number. PostgreSQL drops them where that
        # process is gone, but will not start while it is unreaped, or while the number is another
        # program's of the same user, as it may be after a reboot. Sessions that outlive their server
        # for a moment could still write: as long as there is one, PostgreSQL's own check must stand.
        sockets = self.directory / "socket"
        locks = [self.data / "postmaster.pid", *sockets.glob(".s.PGSQL.*")]
        deadline = time.monotonic() + _LEFTOVERS_TIMEOUT_S
        while any(lock.exists() for lock in locks):
            if not _works_in(self.data):
                for lock in locks:
                    lock.unlink(missing_ok=True)
            elif time.monotonic() > deadline:
                return
            else:
                time.sleep(0.05)

    def _configure(self, state: PostgresState) -> None:
        etc = self.directory / "etc"
        values = {
            "data": self.data,
            "hba": etc / "pg_hba.conf",
            "socket": self.socket_directory(state) or "",
            "port": state.port,
        }
        settings = (_HERE / "postgresql.conf").read_text()
        for name, value in values.items():
            settings = settings.replace(f"@{name}@", str(value).replace("'", "''"))
        written = {"pg_hba.conf": (_HERE / "pg_hba.conf").read_text(), "postgresql.conf": settings}
        for name, text in written.items():
            (etc / name).write_text(text)
            (etc / name).chmod(0o644)

    def _make_roles(self, state: PostgresState) -> None:
        done = subprocess.run(
            [self.programs / "psql", "--no-psqlrc", "--quiet", "--file", _HERE / "postgres_roles.sql"],
            env=state.superuser_environment(self.socket_directory(state)),
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise PostgresFailed(f"The database roles could not be made.\n{done.stderr}")

    def run(self, program: str, *arguments: object, check: bool = True) -> None:
        """Run one of PostgreSQL's programs as the server's account, in `directory`. PostgresFailed with what it said."""
        command = [str(self.programs / program), *(str(argument) for argument in arguments)]
        # A file, not a pipe: the server inherits it, and a pipe would never end.
        with (self.directory / "etc" / f"{program}.log").open("w+") as output:
            done = subprocess.run(
                command,
                check=False,
                stdout=output,
                stderr=output,
                cwd=self.directory,
                **self.account.popen,
            )
            output.seek(0)
            said = output.read()
        if check and done.returncode != 0:
            raise PostgresFailed(f"{program} failed.\n{said}{self._log_tail()}")

    def _log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:]) if self.log.exists() else ""


def _works_in(directory: Path) -> bool:
    """Whether any process has this as its directory, as every process of a server does."""
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == directory:
                return True
        except (OSError, psutil.Error):
            continue
    return False
