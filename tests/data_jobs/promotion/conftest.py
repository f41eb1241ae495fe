"""A small archive of real images, a store of two models, and a database in which one of them answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
import csv
from importlib.util import find_spec
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.postgres import DatabaseUrls
from data_jobs.references.load import publish_bundled
from data_jobs.training.manifest_file import seal
from serve_app.domain.diagnosis import TRAINED
from serve_app.records.serving import live_model
from tests.model_folders import Change, copy_model, thin_references, turn_references
from tests.pools import connected

#: It imports what the train extra has, and its steps do.
collect_ignore = [] if find_spec("onnx") and find_spec("skimage") else ["test_import.py"]
#: Cases of fold 0: few enough for seconds, enough melanomas for a sensitivity.
MELANOMAS, OTHERS = 12, 12
LENIENT = {"max_top1_loss": 0.0, "max_melanoma_sensitivity_loss": 0.0, "max_malignant_downgrade_share": 0.0}


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
    """The shipped model with 300 of its references."""
    folder = tmp_path_factory.mktemp("small") / "models"
    copy_model(models / model_id, folder)
    # The candidates get criteria of their own.
    (folder / model_id / "acceptance.json").unlink(missing_ok=True)
    thin_references(folder / model_id, 300)
    return folder


@pytest.fixture
def store(small_store: Path, model_id: str, tmp_path: Path) -> Path:
    """A store of its own with that model in it."""
    copy_model(small_store / model_id, tmp_path / "models")
    return tmp_path / "models"


@pytest.fixture
def make_candidate(small_store: Path, model_id: str) -> Callable[..., str]:
    """Copy a store's model under another tag, with a space of its own: `(store, tag, change) -> model_id`."""

    def make(store: Path, tag: str = "candidate", change: Change = lambda _: None) -> str:
        def changed(content: dict[str, Any]) -> None:
            content["spaces"][0]["embedding_space"] = f"{content['model_id']}.space1"
            change(content)

        candidate = copy_model(small_store / model_id, store, tag, changed)
        (store / candidate / "acceptance.json").write_text(json.dumps(LENIENT))
        seal(store / candidate)
        return candidate

    return make


async def answering(dsn: str) -> str | None:
    """The model that answers in a database."""
    async with connected(dsn) as pool:
        live = await live_model(pool)
        return live.model_id if live else None


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


def replace_references(folder: Path) -> None:
    """Ship vectors of another model: unit, finite, of the right count, and meaningless."""

    def random(vectors: np.ndarray) -> np.ndarray:
        found = np.random.default_rng(0).normal(size=vectors.shape)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    turn_references(folder, random)
    seal(folder)
