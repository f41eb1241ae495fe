"""The database of a node: the embedded PostgreSQL, or the operator's own.

DERM_DATABASE_URL names an operator's database for the role that serves, and
DERM_OWNER_DATABASE_URL the same database for the role that owns the schema (the same URL when
there is one role, which `derm-cds status` calls unsafe and production refuses). Both may be in the
environment or in service.env. Without them the embedded server is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import os
from pathlib import Path
from urllib.parse import urlsplit

from cluster.node_files import is_embedded, read_service_environment, setting
from cluster.postgres import DatabaseUrls, EmbeddedPostgres


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


@contextmanager
def database(home: Path) -> Iterator[DatabaseUrls]:
    """Have the database at hand for a command; an embedded server that was down is stopped again after."""
    if urls := own_database(home):
        yield urls
        return
    server = EmbeddedPostgres(home)
    ran_before = server.is_running()
    try:
        yield server.ensure()
    finally:
        if not ran_before:
            server.stop()
