"""A home whose PostgreSQL runs, and the command line in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
import os
from pathlib import Path
import tempfile

import pytest

from cluster.cli import main
from cluster.postgres import DatabaseUrls, EmbeddedPostgres
from serve_app.records.migrate import migrate
from serve_app.settings import load_settings
from tests.cluster.clinic import Clinic


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`main` sets DERM_HOME and the umask of its process, which here is everybody's."""
    for name in (
        "DERM_HOME",
        "DERM_DATABASE_URL",
        "DERM_OWNER_DATABASE_URL",
        "DERM_TOKEN_SECRET",
        "DERM_ENV",
    ):
        monkeypatch.delenv(name, raising=False)
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
        code = main([command, "--home", str(home), *arguments])
        captured = capsys.readouterr()
        return Said(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def home() -> Iterator[Path]:
    """The home of a server of its own: the session's one is the template of other tests' databases."""
    with tempfile.TemporaryDirectory(prefix="derm-test-") as folder:
        server = EmbeddedPostgres(Path(folder))
        server.ensure()
        try:
            yield server.home
        finally:
            server.stop()


@pytest.fixture
def urls(home: Path) -> DatabaseUrls:
    return EmbeddedPostgres(home).ensure()


@pytest.fixture(scope="module")
def open_clinic() -> Iterator[Clinic]:
    """One server for the module: every test leaves it with the images it lists, all readable."""
    with tempfile.TemporaryDirectory(prefix="derm-test-") as folder:
        Path(folder).chmod(0o711)
        made = Clinic(Path(folder) / "home")
        try:
            asyncio.run(migrate(made.server.ensure().owner, application_role="derm_app"))
            made.add_images(4)
            yield made
        finally:
            made.server.stop(mode="immediate")


@pytest.fixture
def clinic(open_clinic: Clinic) -> Clinic:
    open_clinic.server.ensure()
    return open_clinic
