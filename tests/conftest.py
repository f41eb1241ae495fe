"""What any test may need: a real PostgreSQL, and the data sets where there are any."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
import logging
import os
from pathlib import Path
import re
import shutil
import subprocess
import tempfile

import asyncpg
import pytest

from cluster.postgres import DatabaseUrls, EmbeddedPostgres, PostgresState, programs
from model_store.edge_copies import EDGE_NAME
from model_store.registry import ModelStore, StoredModel
from serve_app.records.lesions import LesionStore
from serve_app.records.migrate import migrate
from serve_app.records.pool import open_pool
from serve_app.records.references import ReferenceStore

REPOSITORY = Path(__file__).resolve().parent.parent
# torch's threads spin while they wait for each other: on networks as small as the tests' two take three times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """As deployments/preprocess/decode.py has it for the process: pytest puts filters of its own before those."""
    config.addinivalue_line("filterwarnings", r"ignore::UserWarning:PIL\..*")


@pytest.fixture
def outside_serve() -> Iterator[None]:
    """This process is no replica, whatever was imported before: Serve's logger has no handlers.

    It must pass its records on meanwhile, because pytest puts a handler of its own on every logger that does not.
    """
    serve = logging.getLogger("ray.serve")
    handlers, propagate = serve.handlers[:], serve.propagate
    for handler in handlers:
        serve.removeHandler(handler)
    serve.propagate = True
    yield
    serve.propagate = propagate
    for handler in handlers:
        if not type(handler).__module__.startswith("_pytest"):
            serve.addHandler(handler)


def _data_set(name: str, what: str) -> Callable[[], Path]:
    """A fixture: the folder of shared data that $DERM_<NAME>_DIR or the folder beside the repository holds."""

    def find() -> Path:
        directory = Path(os.environ.get(f"DERM_{name.upper()}_DIR", REPOSITORY.parent / "shared" / name))
        if not directory.is_dir():
            pytest.skip(f"DERM_{name.upper()}_DIR names no data set ({what}), and {directory} is not there")
        return directory

    return pytest.fixture(scope="session", name=f"{name}_dir")(find)


isic_dir = _data_set("isic", "labelled dermoscopic images: train.csv, images/, uploads/")
corpora_dir = _data_set("corpora", "malformed images and crypto vectors")
failing_dir = _data_set("failing", "files that an earlier version answered wrongly")


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """A running server for the whole session."""
    # Not pytest's tmp_path: a second pytest run closes that to other users, PostgreSQL's account too.
    with tempfile.TemporaryDirectory(prefix="derm-test-", dir=_memory()) as home:
        server = EmbeddedPostgres(Path(home))
        # Many databases, thrown away at the end: what survives a power cut is tested elsewhere.
        local = server.directory / "etc" / "local.conf"
        local.parent.mkdir(parents=True)
        local.write_text("fsync = off\n")
        server.ensure()
        _keep_empty(server)
        try:
            yield server
        finally:
            server.stop(mode="immediate")


def _keep_empty(server: EmbeddedPostgres) -> None:
    """Copy the database while nothing is in it: some tests migrate the server's own."""
    state = PostgresState.read(server.home / "postgres.json")
    assert state is not None
    subprocess.run(
        [programs() / "psql", "--no-psqlrc", "--quiet", "-c", "CREATE DATABASE derm_empty TEMPLATE derm"],
        env=state.superuser_environment(None),
        check=True,
    )


def _memory() -> str | None:
    """Where there is room in memory, thousands of small files come and go there much faster."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 2 * 1024**3
    return str(memory) if roomy else None


@pytest.fixture(scope="session")
def as_superuser(postgres: EmbeddedPostgres) -> Callable[[DatabaseUrls], str]:
    """Turn a database's URLs into the superuser's."""

    def url(database: DatabaseUrls) -> str:
        state = PostgresState.read(postgres.home / "postgres.json")
        assert state is not None
        return re.sub(r"//.*?@", f"//derm_superuser:{state.superuser_password}@", database.owner)

    return url


@pytest.fixture(scope="session")
def new_database(postgres: EmbeddedPostgres, as_superuser) -> Callable[..., Awaitable[DatabaseUrls]]:
    """Make one more database on the session's server, migrated unless told otherwise."""
    made = 0
    templates = {False: "derm_empty"}

    async def copy(name: str, template: str) -> DatabaseUrls:
        first = postgres.ensure()
        connection = await asyncpg.connect(as_superuser(first))
        try:
            await connection.execute(f"CREATE DATABASE {name} OWNER derm_owner TEMPLATE {template}")
            await connection.execute(f"REVOKE ALL ON DATABASE {name} FROM PUBLIC")
            await connection.execute(f"GRANT CONNECT ON DATABASE {name} TO derm_app")
        finally:
            await connection.close()
        return DatabaseUrls(*(re.sub(r"/derm\?", f"/{name}?", url) for url in (first.owner, first.app)))

    async def make(*, migrated: bool = True) -> DatabaseUrls:
        nonlocal made
        if migrated not in templates:  # migrating costs ten times what copying does
            template = await copy("derm_migrated", templates[False])
            await migrate(template.owner, application_role="derm_app")
            templates[migrated] = "derm_migrated"
        made += 1
        return await copy(f"derm_{made}", templates[migrated])

    return make


@pytest.fixture(scope="module")
async def database(new_database) -> DatabaseUrls:
    """A fresh, migrated database for each test module."""
    return await new_database()


@pytest.fixture(scope="module")
async def owner_pool(database: DatabaseUrls):
    """A pool of the role that migrates, loads references and assigns care."""
    pool = await open_pool(database.owner, minimum=0, maximum=2, timeout_s=20)
    yield pool
    await pool.close()


@pytest.fixture(scope="module")
async def pool(database: DatabaseUrls):
    """A pool of the role that serves."""
    pool = await open_pool(database.app, minimum=1, maximum=4, timeout_s=20)
    yield pool
    await pool.close()


@pytest.fixture
def lesions(pool) -> LesionStore:
    """The clinical record as the service sees it."""
    return LesionStore(pool)


@pytest.fixture
def references(pool) -> ReferenceStore:
    """The references as the service sees them."""
    return ReferenceStore(pool)


@pytest.fixture(scope="session")
def models() -> Path:
    """The model store: the repository's own, or $DERM_MODELS."""
    return Path(os.environ.get("DERM_MODELS", REPOSITORY / "model_store" / "models"))


@pytest.fixture(scope="session")
def model_id(models: Path) -> str:
    """The model that most tests speak of: one network with copies for devices, which takes drawings for lesions."""
    store = ModelStore(models)
    return next(name for name in store if EDGE_NAME in store.open(name).manifest.files)


@pytest.fixture(scope="session")
def model(models: Path, model_id: str) -> StoredModel:
    """That model, opened and verified."""
    return ModelStore(models).open(model_id)
