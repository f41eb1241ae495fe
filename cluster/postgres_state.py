"""What the embedded server's owner remembers of it: its port, its passwords, its URLs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
import json
import os
from pathlib import Path
import secrets
from urllib.parse import quote

from cluster.ports import choose_port
from serve_app.private_files import read_private, write_private

SUPERUSER = "derm_superuser"
OWNER = "derm_owner"
APPLICATION = "derm_app"
DATABASE = "derm"

#: sockaddr_un.sun_path is 108 bytes, the closing NUL included.
_SOCKET_PATH_BYTES = 107


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
    def fresh(cls, port: int | None) -> PostgresState:
        """Make up what a new server needs."""
        superuser, owner, app = (secrets.token_urlsafe(24) for _ in range(3))
        return cls(port or choose_port(), superuser, owner, app)

    @classmethod
    def read(cls, path: Path) -> PostgresState | None:
        """Read it back; None when nothing has been set up yet."""
        return cls(**json.loads(read_private(path))) if path.exists() else None

    def write(self, path: Path) -> None:
        """Write it whole or not at all, and durably: it holds the only copy of the passwords."""
        write_private(path, json.dumps(asdict(self)).encode())
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def urls(self, socket_directory: Path | None) -> DatabaseUrls:
        """Build the URLs: over the local socket, which is faster, or over loopback without one."""
        return DatabaseUrls(
            owner=self._url(OWNER, self.owner_password, socket_directory),
            app=self._url(APPLICATION, self.app_password, socket_directory),
        )

    def _url(self, role: str, password: str, socket_directory: Path | None) -> str:
        credentials = f"postgresql://{role}:{quote(password, safe='')}@"
        if socket_directory is None:
            return f"{credentials}127.0.0.1:{self.port}/{DATABASE}?sslmode=disable"
        return f"{credentials}/{DATABASE}?host={quote(str(socket_directory), safe='')}&port={self.port}"

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


def fits_socket(directory: Path, port: int) -> bool:
    """Whether a socket below this directory has a path short enough for the kernel."""
    path = os.fsencode(directory / f".s.PGSQL.{port}.lock")
    return len(path) <= _SOCKET_PATH_BYTES and b"," not in path  # a comma separates directories
