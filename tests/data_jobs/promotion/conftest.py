"""A small archive of real images, a store of two models, and a database in which one of them answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
import csv
import json
import os
from pathlib import Path
import shutil
import tomllib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.postgres import DatabaseUrls
from data_jobs.references.load import publish_bundled
from data_jobs.training.manifest_file import seal, write_manifest
from model_store.manifest import MANIFEST_NAME
from model_store.registry import ModelStore
from serve_app.domain.diagnosis import TRAINED
from serve_app.records.pool import open_pool
from serve_app.records.serving import live_model

#: Cases of fold 0: few enough for seconds, enough melanomas for a sensitivity.
MELANOMAS, OTHERS = 12, 12
LENIENT = {"max_top1_loss": 0.0, "max_melanoma_sensitivity_loss": 0.0, "max_malignant_downgrade_share": 0.0}


def link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


Rows = list[dict[str, str]]


def write_part(isic: Path, folder: Path, choose: Callable[[Rows], Rows]) -> Path:
    """A folder with some rows of the archive's train.csv and all of its images."""
    with (isic / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (folder / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(choose(rows))
    (folder / "images").symlink_to((isic / "images").resolve())
    return folder


@pytest.fixture(scope="session")
def small_archive(isic_dir: Path, tmp_path_factory) -> Path:
    """A few dozen rows of fold 0, and all of the others."""

    def choose(rows: Rows) -> Rows:
        held = [row for row in rows if row["fold"] == "0"]
        chosen = [row for row in held if row["diagnosis"] == "MEL"][:MELANOMAS]
        chosen += [row for row in held if row["diagnosis"] != "MEL"][::20][:OTHERS]
        return chosen + [row for row in rows if row["fold"] != "0"]

    return write_part(isic_dir, tmp_path_factory.mktemp("archive"), choose)


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """References embedded anew, and queries of a recall: each costs a forward pass or two searches."""
    monkeypatch.setattr("data_jobs.promotion.candidate.SAMPLED", 8)
    monkeypatch.setattr("data_jobs.references.load.SAMPLE", 20)


@pytest.fixture
def archive(small_archive: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small archive, where the jobs look for it."""
    monkeypatch.setenv("DERM_ISIC_DIR", str(small_archive))
    return small_archive


@pytest.fixture(scope="session")
def answers_cache(tmp_path_factory) -> Path:
    """Where promotions keep answers: the same model answers the same cases once a session."""
    return tmp_path_factory.mktemp("answers")


@pytest.fixture(scope="session")
def small_store(models: Path, model_id: str, tmp_path_factory) -> Path:
    """The shipped model with 300 of its references: thousands take the database seconds for every test."""
    folder = tmp_path_factory.mktemp("small") / "models"
    shutil.copytree(models / model_id, folder / model_id, copy_function=link)
    path = folder / model_id / "references.parquet"
    table = pq.read_table(path)
    path.unlink()  # a hard link: the original stays as it is
    # The candidates get criteria of their own.
    (folder / model_id / "acceptance.json").unlink(missing_ok=True)
    pq.write_table(table.take(list(range(0, table.num_rows, table.num_rows // 300))[:300]), path)
    manifest = folder / model_id / MANIFEST_NAME
    rewrite(manifest, manifest.read_bytes())
    seal(folder / model_id, references=300)
    return folder


@pytest.fixture
def store(small_store: Path, model_id: str, tmp_path: Path) -> Path:
    """A store of its own with that model in it."""
    folder = tmp_path / "models"
    shutil.copytree(small_store / model_id, folder / model_id, copy_function=link)
    return folder


@pytest.fixture
def make_candidate(small_store: Path, model_id: str) -> Callable[..., str]:
    """Copy a store's model under another tag: `(store, tag, acceptance, change) -> model_id`."""

    def make(
        store: Path,
        tag: str = "candidate",
        acceptance: dict[str, float] | None = None,
        change: Callable[[dict[str, Any]], object] | None = None,
    ) -> str:
        content = tomllib.loads((small_store / model_id / MANIFEST_NAME).read_text())
        new_id = f"{content['architecture']}.{tag}"
        folder = store / new_id
        folder.mkdir()
        (space,) = content["spaces"]
        renamed = {space["transform"]: f"{new_id}.space1.npz"}
        for name in content.pop("files"):
            link(str(small_store / model_id / name), str(folder / renamed.get(name, name)))
        space |= {"embedding_space": f"{new_id}.space1", "transform": f"{new_id}.space1.npz"}
        content |= {"model_id": new_id, "tag": tag}
        (folder / "acceptance.json").write_text(json.dumps(LENIENT if acceptance is None else acceptance))
        if change is not None:
            change(content)
        write_manifest(folder, content)
        return new_id

    return make


async def answering(dsn: str) -> str | None:
    """The model that answers in a database."""
    pool = await open_pool(dsn, minimum=0, maximum=1)
    try:
        live = await live_model(pool)
        return live.model_id if live else None
    finally:
        await pool.close()


@pytest.fixture
async def served(new_database: Callable[..., Awaitable[DatabaseUrls]], store: Path, model_id: str) -> str:
    """The owner's URL of a database in which the shipped model answers."""
    urls = await new_database()
    await publish_bundled(urls.owner, store, model_id)
    return urls.owner


MILK10K = ["AKIEC", "BCC", "BEN_OTH", "BKL", "DF", "INF", "MAL_OTH", "MEL", "NV", "SCCKA", "VASC"]
MILK10K_MAP = {label: label if label in set(TRAINED) else "ignored" for label in MILK10K}
MILK10K_MAP |= {"AKIEC": "AK", "SCCKA": "SCC"}


def write_map(path: Path, labels: list[str], mapping: dict[str, str], modality: str = "dermoscopic") -> Path:
    lines = [f'modality = "{modality}"', f"label_space = {labels}", "[label_map]"]
    path.write_text("\n".join([*lines, *(f'"{name}" = "{value}"' for name, value in mapping.items())]) + "\n")
    return path


def weaken_melanoma(content: dict[str, Any]) -> None:
    """As if calibration had chosen a far too high threshold: most melanomas are no longer flagged."""
    content["operating_points"]["melanoma"]["threshold"] = 0.9


def rewrite(path: Path, content: bytes) -> None:
    path.unlink()  # a hard link: the original stays as it is
    path.write_bytes(content)


def replace_references(store: Path, model_id: str) -> None:
    """Ship vectors of another model: unit, finite, of the right count, and meaningless."""
    path = store / model_id / ModelStore(store).open(model_id).manifest.live_space.references
    table = pq.read_table(path)
    vectors = np.random.default_rng(0).normal(size=(table.num_rows, 512))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    halves = pa.FixedSizeListArray.from_arrays(
        pa.array(vectors.astype(np.float16).ravel(), pa.float16()), 512
    )
    path.unlink()
    pq.write_table(table.set_column(table.schema.get_field_index("embedding"), "embedding", halves), path)
    seal(store / model_id)
