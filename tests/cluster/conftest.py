"""A home whose PostgreSQL runs, and the command line in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
import os
from pathlib import Path
import tempfile
from typing import Any
from uuid import UUID, uuid4

import pytest

from cluster.cli import main
from cluster.key_backups import prune_kept_copies
from cluster.postgres import DatabaseUrls
from serve_app.records.migrate import migrate
from serve_app.settings import load_settings
from tests.cluster.clinic import IMAGE, Clinic
from tests.pools import connected


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`main` sets DERM_HOME and the umask of its process, which here is everybody's."""
    for name in ("HOME", "DATABASE_URL", "OWNER_DATABASE_URL", "TOKEN_SECRET", "ENV"):
        monkeypatch.delenv(f"DERM_{name}", raising=False)
    umask = os.umask(0o022)
    load_settings.cache_clear()
    yield
    os.environ.pop("DERM_HOME", None)
    os.umask(umask)
    load_settings.cache_clear()


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


@pytest.fixture
def derm_cds(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Run one command, and return its exit code and what it said."""

    def run(command: str, *arguments: str, home: Path) -> Said:
        capsys.readouterr()
        load_settings.cache_clear()
        code = main([command, "--home", str(home), *arguments])
        captured = capsys.readouterr()
        return Said(code, captured.out, captured.err)

    return run


@pytest.fixture
async def own_home(new_database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home whose database is its own, on the session's server."""
    urls = await new_database()
    monkeypatch.setenv("DERM_DATABASE_URL", urls.app)
    monkeypatch.setenv("DERM_OWNER_DATABASE_URL", urls.owner)
    monkeypatch.setenv("DERM_TOKEN_SECRET", "a secret of the tests, long enough for HS256")
    return tmp_path


@pytest.fixture
def sql(own_home: Path) -> Callable[..., list[Any]]:
    """Ask that home's database, as its owner."""

    async def ask(statement: str, *values: object) -> list[Any]:
        async with connected(os.environ["DERM_OWNER_DATABASE_URL"]) as pool:
            return await pool.fetch(statement, *values)

    return lambda statement, *values: asyncio.run(ask(statement, *values))


@pytest.fixture
def add_image(sql) -> Callable[..., UUID]:
    """Add a sealed image of patient p-1, of 2020: `(image_id, data_key_id, sealed)`; returns its assessment's id."""
    return lambda *values: sql(IMAGE, uuid4(), *values)[0]["assessment_id"]


@pytest.fixture(scope="session")
def open_clinic() -> Iterator[Clinic]:
    """One embedded server for the session: every test leaves it with the images it lists, all readable."""
    with tempfile.TemporaryDirectory(prefix="derm-test-") as folder:
        Path(folder).chmod(0o711)
        made = Clinic(Path(folder) / "home")
        try:
            asyncio.run(migrate(made.server.ensure().owner, application_role="derm_app"))
            made.add_images(8)
            yield made
        finally:
            made.server.stop(mode="immediate")


@pytest.fixture
def clinic(open_clinic: Clinic) -> Iterator[Clinic]:
    open_clinic.server.ensure()
    yield open_clinic
    prune_kept_copies(open_clinic.home, lifetime=timedelta(0))


@pytest.fixture(scope="session")
def good(open_clinic: Clinic, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backup, made while the database serves, to restore, look at, copy and damage."""
    pid = open_clinic.server.ensure() and open_clinic.server.pid()
    folder = tmp_path_factory.mktemp("backups") / "monday"
    umask = os.umask(0o022)  # `main` narrows it: PostgreSQL's account could not read what later tests write
    assert main(["backup", "--home", str(open_clinic.home), str(folder)]) == 0
    os.umask(umask)
    assert open_clinic.server.pid() == pid
    return folder


@pytest.fixture
def home(clinic: Clinic) -> Path:
    """A home with an embedded server of its own: the session's one is the template of other tests' databases."""
    return clinic.home


@pytest.fixture
def urls(clinic: Clinic) -> DatabaseUrls:
    return clinic.server.ensure()
