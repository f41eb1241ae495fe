"""The job as it is started: whole, killed and started again, beside a database that goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
import json
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest

from data_jobs.references.load import publish_space
from data_jobs.references.verify import verify_space
from model_store.registry import ModelStore
from serve_app.domain.errors import Conflict
from serve_app.records.pool import open_pool
from serve_app.records.reference_cache import ReferenceCache
from serve_app.records.serving import live_model
from serve_app.settings import REPOSITORY

IMAGES, BAD = 90, (7, 8)

#: Ray starts and stops five times.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(make_folder) -> Path:
    """Drawn references, two of them no image."""
    return make_folder(IMAGES, bad=BAD)


@pytest.fixture(scope="module")
async def undisturbed(folder, new_database, models, model_id):
    """A space filled by one run: the database, what the run said, and where Ray wrote about it."""
    urls = await new_database()
    # Short: a socket's path may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="derm-r-") as written:
        done = run_job(
            folder,
            urls.owner,
            models,
            model_id,
            RAY_TMPDIR=written,
            # Ray's fullest record of a run, the arguments of every operator included.
            RAY_enable_export_api_write="1",
        )
        assert done.returncode == 3, done.stderr[-4000:]
        yield urls, json.loads(done.stdout.splitlines()[-1]), done.stderr, Path(written)


async def test_every_image_is_in_the_space_or_has_a_cause(undisturbed, model_id, models) -> None:
    urls, report, said, _ = undisturbed
    space = ModelStore(models).open(model_id).manifest.live_space.embedding_space
    assert report["embedded"] == IMAGES - len(BAD)
    assert report["failures"] == {"unreadable": 1, "unsupported_image": 1}
    assert f"{IMAGES} images to embed into {space}" in said
    assert f"{IMAGES} of {IMAGES} images (100.0 %)" in said
    vectors = await stored(urls.owner)
    assert len(vectors) == IMAGES - len(BAD)
    pool = await open_pool(urls.owner, minimum=0, maximum=1)
    try:
        (summary,) = await ReferenceCache(pool).spaces()
        assert summary.completed_at is not None
        assert await pool.fetchval("SELECT count(*) FROM reference_pictures") == IMAGES - len(BAD)
    finally:
        await pool.close()


def test_the_owners_password_is_in_nothing_that_ray_writes(undisturbed) -> None:
    urls, report, said, written = undisturbed
    (password,) = re.findall(r"//derm_owner:(.*?)@", urls.owner)
    files = [path for path in written.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any("ReferenceSink" in path.read_text(errors="replace") for path in files)
    assert not [path for path in files if password.encode() in path.read_bytes()]
    assert password not in f"{report}{said}"


async def test_killed_at_any_moment_it_goes_on_and_gives_the_same_bits(
    undisturbed, folder, new_database, models, model_id
) -> None:
    urls = await new_database()
    rng = np.random.default_rng(4)
    for found in (1, 30):
        process = start_job(folder, urls.owner, models, model_id)
        try:
            await until_stored(urls.owner, found)
            await asyncio.sleep(rng.uniform(0.0, 0.5))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    before = await stored(urls.owner)
    assert 0 < len(before) <= IMAGES - len(BAD)
    # Prepared in a step of its own, as for a GPU: that makes no difference to a vector either.
    done = run_job(folder, urls.owner, models, model_id, "--prepare-cpus", "0.5")
    assert done.returncode == 3, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["found"] >= len(before)
    assert await stored(urls.owner) == await stored(undisturbed[0].owner)


async def test_a_space_is_verified_before_its_model_answers_in_it(
    undisturbed, folder, models, model_id
) -> None:
    urls, *_ = undisturbed
    model = ModelStore(models).open(model_id)
    pool = await open_pool(urls.owner, minimum=0, maximum=2, timeout_s=20)
    try:
        checks = {check.name: check for check in await verify_space(pool, model, folder=folder)}
        assert {name for name, check in checks.items() if not check.passed} == {"failures"}
        assert checks["failures"].found == "2.22% failed; 1% may"
        with pytest.raises(Conflict, match="must not answer: failures"):
            await publish_space(pool, models, model_id)
        assert await live_model(pool) is None
    finally:
        await pool.close()


async def test_what_cannot_run_says_why(folder, undisturbed, models, model_id, tmp_path) -> None:
    urls, *_ = undisturbed
    unknown = run_job(folder, urls.owner, models, "no_model.none")
    assert unknown.returncode == 1
    assert "no_model.none" in unknown.stderr
    empty = run_job(tmp_path, urls.owner, models, model_id)
    assert empty.returncode == 1
    assert "has none of metadata.parquet" in empty.stderr
    assert "Traceback" not in unknown.stderr + empty.stderr


async def stored(dsn: str) -> Mapping[str, bytes]:
    """Every vector of the database, bit by bit."""
    pool = await open_pool(dsn, minimum=0, maximum=1, timeout_s=20)
    try:
        rows = await pool.fetch("SELECT isic_id, embedding FROM reference_embeddings")
        return {row["isic_id"]: row["embedding"].to_numpy().tobytes() for row in rows}
    finally:
        await pool.close()


async def until_stored(dsn: str, count: int) -> None:
    """Wait until so many vectors are there."""
    deadline = time.monotonic() + 240
    while len(await stored(dsn)) < count:
        assert time.monotonic() < deadline, "the job stored nothing"
        await asyncio.sleep(0.2)


def command(folder: Path, models: Path, model_id: str) -> list[str]:
    options = ["--model", model_id, "--models", str(models), "--actors", "1", "--niceness", "0"]
    return [
        sys.executable,
        "-m",
        "data_jobs.references.embed",
        str(folder),
        *options,
        "--rows-per-write",
        "16",
    ]


def environment(dsn: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"DERM_OWNER_DATABASE_URL": dsn, "PYTHONWARNINGS": ""}


def run_job(
    folder: Path, dsn: str, models: Path, model_id: str, *options: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command(folder, models, model_id), *options],
        env=environment(dsn) | variables,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def start_job(folder: Path, dsn: str, models: Path, model_id: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(folder, models, model_id),
        env=environment(dsn),
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
