"""The state folder of one node: what its processes read their settings from, and which database is its own.

That is the embedded PostgreSQL, unless an operator names their own: DERM_DATABASE_URL for the role that serves, and
DERM_OWNER_DATABASE_URL for the one that owns the schema (the same URL when there is one role, which `derm-cds status`
calls unsafe and production refuses). Both may be in the environment or in service.env.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import os
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from dotenv import dotenv_values
from pydantic import ValidationError

from cluster.postgres import DatabaseUrls, EmbeddedPostgres, PostgresState
from serve_app.domain.errors import NotFound
from serve_app.private_files import locked_folder, replace_secret
from serve_app.settings import DEVELOPMENT_PREFIX, OWNER_URL, make_development_secret


def write_service_environment(home: Path, urls: DatabaseUrls | None) -> None:
    """Write `home`/secrets/service.env (0600): the embedded server's URL for the role that serves, and the token secret.

    The URL follows that server's port; every other line stays as it is, an operator's own database's among
    them (`urls` None: it is the operator's, and wherever they gave it). Where nobody gave a secret or an
    issuer's keys, one is made once, for development: production refuses it.
    """
    path = home / "secrets" / "service.env"
    with locked_folder(path.parent):
        known = read_service_environment(home)
        lines = path.read_text().splitlines() if path.exists() else []
        there = known.get("DERM_DATABASE_URL") or ""
        if urls is not None and (not there or is_embedded(home, there)):
            lines = [*_without(lines, "DERM_DATABASE_URL"), f"DERM_DATABASE_URL={urls.app}"]
        if os.environ.get("DERM_TOKEN_JWKS") or known.get("DERM_TOKEN_JWKS"):
            if known.get("DERM_TOKEN_SECRET", "").startswith(DEVELOPMENT_PREFIX):
                lines = _without(lines, "DERM_TOKEN_SECRET")
        elif not known.get("DERM_TOKEN_SECRET"):
            lines = [*_without(lines, "DERM_TOKEN_SECRET"), f"DERM_TOKEN_SECRET={make_development_secret()}"]
        replace_secret(path, "".join(f"{line}\n" for line in lines).encode())


def _without(lines: list[str], name: str) -> list[str]:
    return [line for line in lines if line.partition("=")[0].split()[-1:] != [name]]


def write_owner_environment(home: Path, urls: DatabaseUrls) -> None:
    """Write `home`/secrets/owner.env (0600): the owner's URL, for jobs on this node's cluster.

    No process of the node has it in its environment, replicas least of all: a job reads it here.
    """
    path = home / "secrets" / "owner.env"
    with locked_folder(path.parent):
        replace_secret(path, f"{OWNER_URL}={urls.owner}\n".encode())


def read_service_environment(home: Path) -> dict[str, str]:
    """Read service.env as the replicas do; empty before the first start."""
    path = home / "secrets" / "service.env"
    return {name: value for name, value in dotenv_values(path).items() if value is not None}


def is_embedded(home: Path, url: str) -> bool:
    """Whether a connection URL is the embedded server's of this home, on whatever port that was."""
    parts = urlsplit(url)
    if parse_qs(parts.query).get("host") == [str(home.resolve() / "postgres" / "socket")]:
        return True
    state = PostgresState.read(home / "postgres.json")
    return state is not None and unquote(parts.password or "") == state.app_password


def setting(home: Path, name: str) -> str:
    """One setting, as the replicas will read it: the environment's, else service.env's; empty without one."""
    return os.environ.get(name, "") or read_service_environment(home).get(name, "")


def is_production(home: Path) -> bool:
    """Whether patients' data is meant to come here (DERM_ENV)."""
    return setting(home, "DERM_ENV") == "production"


def explain(error: ValidationError) -> str:
    """Say in one line which settings are missing or wrong, without their values."""
    said = []
    for at in error.errors():
        message, setting = at["msg"].removeprefix("Value error, "), "_".join(map(str, at["loc"])).upper()
        # What concerns several settings names them itself.
        said.append(f"DERM_{setting}: {message}" if setting else message)
    return "; ".join(said)


def own_database(home: Path) -> DatabaseUrls | None:
    """The operator's database; None when the embedded one is to be used."""
    app = os.environ.get("DERM_DATABASE_URL", "")
    if not app:
        # The replicas find the embedded server by a line of this file, too, which we write.
        app = read_service_environment(home).get("DERM_DATABASE_URL", "")
        if not app or is_embedded(home, app):
            return None
    return DatabaseUrls(owner=setting(home, "DERM_OWNER_DATABASE_URL") or app, app=app)


def application_role(urls: DatabaseUrls) -> str | None:
    """The role to grant what serving needs; None when serving runs as the owner."""
    return None if urls.owner == urls.app else urlsplit(urls.app).username


def refuse_nothing(home: Path) -> None:
    """NotFound where no database was ever set up or named, as in a home that was mistyped."""
    if own_database(home) is None and not EmbeddedPostgres(home).state_file.exists():
        raise NotFound(f"Nothing is set up in {home}: has `derm-cds serve` run there?")


@contextmanager
def database(home: Path, *, new: bool = False) -> Iterator[DatabaseUrls]:
    """Have the database at hand for a command; an embedded server that was down is stopped again after.

    With `new` one is made where there is none; without, see refuse_nothing.
    """
    if urls := own_database(home):
        yield urls
        return
    server = EmbeddedPostgres(home)
    if not new:
        refuse_nothing(home)
    ran_before = server.is_running()
    try:
        yield server.ensure()
    finally:
        if not ran_before:
            server.stop()
