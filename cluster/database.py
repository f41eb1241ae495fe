"""The database of a node: the embedded PostgreSQL, or the operator's own.

DERM_DATABASE_URL names an operator's database for the role that serves, and
DERM_OWNER_DATABASE_URL the same database for the role that owns the schema (the same URL when
there is one role). Without them the embedded server is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import os
from pathlib import Path
from urllib.parse import urlsplit

from cluster.postgres import DatabaseUrls, EmbeddedPostgres


def own_database() -> DatabaseUrls | None:
    """The operator's database; None when the embedded one is to be used."""
    app = os.environ.get("DERM_DATABASE_URL", "")
    if not app:
        return None
    return DatabaseUrls(owner=os.environ.get("DERM_OWNER_DATABASE_URL", "") or app, app=app)


def application_role(urls: DatabaseUrls) -> str | None:
    """The role to grant what serving needs; None when serving runs as the owner."""
    return None if urls.owner == urls.app else urlsplit(urls.app).username


@contextmanager
def database(home: Path) -> Iterator[DatabaseUrls]:
    """Have the database at hand for a command; an embedded server that was down is stopped again after."""
    if urls := own_database():
        yield urls
        return
    server = EmbeddedPostgres(home)
    ran_before = server.is_running()
    try:
        yield server.ensure()
    finally:
        if not ran_before:
            server.stop()
