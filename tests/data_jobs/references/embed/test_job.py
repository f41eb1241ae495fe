"""The job as it is started: killed, started again to its end, and its space verified."""

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

from data_jobs.references.catalogue import read_catalogue
from data_jobs.references.embed import job
from data_jobs.references.embed.pipeline import EmbedImages, PrepareImages, Target, catalogue_table
from data_jobs.references.embed.resources import Resources
from data_jobs.references.load import publish_space, verify_space
from deployments.preprocess.pixels import InputGeometry
from serve_app.domain.errors import Conflict
from serve_app.records.references import ReferenceCache
from serve_app.records.serving import live_model
from serve_app.settings import REPOSITORY
from tests.pools import connected

IMAGES, BAD = 64, (7, 8)

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(make_folder) -> Path:
    """Drawn references, two of them no image."""
    return make_folder(IMAGES, bad=BAD)


@pytest.fixture(scope="module")
async def resumed(folder, new_database, models, model_id):
    """A space filled by a run that was killed and one after it: the database, how far the first came, the second's
    report, what it said, and where Ray wrote about it."""
    urls = await new_database()
    options = ["--model", model_id, "--models", str(models), "--actors", "1", "--niceness", "0"]
    command = [sys.executable, "-m", "data_jobs.references.embed", str(folder), *options]
    command += ["--rows-per-write", "2"]  # many writes, to be killed between two
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = kept | {"DERM_OWNER_DATABASE_URL": urls.owner, "PYTHONWARNINGS": ""}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    first = subprocess.Popen(command, env=environment, cwd=REPOSITORY, start_new_session=True, **quiet)  # noqa: ASYNC220
    try:
        deadline = time.monotonic() + 240
        while not await stored(urls.owner):
            assert time.monotonic() < deadline, "the job stored nothing"
            await asyncio.sleep(0.02)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    before = len(await stored(urls.owner))
    # Short: a socket's path may have 107 bytes. With Ray's fullest record of a run, all operators' arguments included.
    with tempfile.TemporaryDirectory(prefix="derm-r-") as written:
        environment |= {"RAY_TMPDIR": written, "RAY_enable_export_api_write": "1"}
        # Prepared in a step of its own, as for a GPU: that makes no difference to a vector.
        done = subprocess.run(  # noqa: ASYNC221
            [*command, "--prepare-cpus", "0.5"],
            env=environment,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 3, done.stderr[-4000:]
        yield urls, before, json.loads(done.stdout.splitlines()[-1]), done.stderr, Path(written)


async def test_killed_and_started_again_every_image_is_in_the_space_or_has_a_cause(
    resumed, folder, model, models
) -> None:
    urls, before, report, said, _ = resumed
    space = model.manifest.live_space.embedding_space
    assert 0 < before < IMAGES - len(BAD)
    assert report["found"] >= before
    assert report["found"] + report["embedded"] == IMAGES - len(BAD)
    assert report["failures"] == {"unreadable": 1, "unsupported_image": 1}
    assert f"{IMAGES - report['found']} images to embed into {space}; {report['found']} are there" in said
    assert f"{IMAGES} of {IMAGES} images (100.0 %)" in said
    # Bit by bit what one process without Ray makes of them.
    prepare = PrepareImages(folder, InputGeometry.from_manifest(model.manifest.input), pictures=False)
    embed = EmbedImages(Target(models, model.manifest.model_id, space), Resources(actors=1), prepare)
    rows = embed(catalogue_table(read_catalogue(folder))).to_pylist()
    assert await stored(urls.owner) == {
        row["isic_id"]: np.frombuffer(row["embedding"], np.float32).astype(np.float16).tobytes()
        for row in rows
        if row["embedding"] is not None
    }
    async with connected(urls.owner) as pool:
        (summary,) = await ReferenceCache(pool).spaces()
        assert summary.completed_at is not None
        assert await pool.fetchval("SELECT count(*) FROM reference_pictures") == IMAGES - len(BAD)


def test_the_owners_password_is_in_nothing_that_ray_writes(resumed) -> None:
    urls, _, report, said, written = resumed
    (password,) = re.findall(r"//derm_owner:(.*?)@", urls.owner)
    files = [path for path in written.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any("ReferenceSink" in path.read_text(errors="replace") for path in files)
    assert not [path for path in files if password.encode() in path.read_bytes()]
    assert password not in f"{report}{said}"


async def test_a_space_is_verified_before_its_model_answers_in_it(resumed, folder, models, model) -> None:
    urls, *_ = resumed
    async with connected(urls.owner) as pool:
        checks = {check.name: check for check in await verify_space(pool, model, folder=folder)}
        assert {name for name, check in checks.items() if not check.passed} == {"failures"}
        assert checks["failures"].found == "3.12% failed; 1% may"
        with pytest.raises(Conflict, match="must not answer: failures"):
            await publish_space(pool, models, model.manifest.model_id)
        assert await live_model(pool) is None


def test_what_cannot_run_says_why(models, model_id, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("DERM_OWNER_DATABASE_URL", "postgresql://nobody@localhost/none")
    monkeypatch.setattr(job, "_start_ray", lambda _: Resources(actors=1))
    for model, message in (("no_model.none", "no_model.none"), (model_id, "has none of metadata.parquet")):
        assert job.main([str(tmp_path), "--model", model, "--models", str(models)]) == 1
        said = capsys.readouterr().err
        assert said.startswith("data_jobs.references.embed: ")
        assert message in said


async def stored(dsn: str) -> Mapping[str, bytes]:
    """Every vector of the database, bit by bit."""
    async with connected(dsn) as pool:
        rows = await pool.fetch("SELECT isic_id, embedding FROM reference_embeddings")
        return {row["isic_id"]: row["embedding"].to_numpy().tobytes() for row in rows}
