"""Outliers: equal draws, whole patients in one part, both sides captured alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
import pytest

pytest.importorskip("skimage", reason="needs the train extra")
pytest.importorskip("matplotlib", reason="needs the train extra")

from data_jobs.training import outliers as subject
from data_jobs.training.dataset import load_pixels, read_rows
from data_jobs.training.outliers import CLINICAL, DRAWINGS, captured, clinical_photographs, make_outliers
from data_jobs.training.recipe import read_recipe
from data_jobs.training.scan import scan_pixels
from deployments.classifier.calibration import Calibrator, unknown_probability
from deployments.preprocess.pixels import InputGeometry
from model_store.registry import ModelStore
from model_store.session import InferenceSession
from tests.model_folders import RECIPES

SMALL = InputGeometry(32, "bicubic")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Twelve photographs of six patients."""
    images = tmp_path / "clinical" / "images"
    images.mkdir(parents=True)
    rows = [f"P{i},PAT_{i // 2}" for i in range(12)]
    (images.parent / "clinical.csv").write_text("\n".join(["image_id,patient_id", *rows]))
    for i in range(12):
        Image.new("RGB", (60, 50), (200, 150, 10 * i)).save(images / f"P{i}.png")
    return tmp_path


def test_outliers_are_equal_for_a_seed_and_no_source_is_in_both_parts(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "_VIEWS", 1)
    monkeypatch.setattr(subject, "_DRAWN", 2)
    found, again = make_outliers(SMALL, 4, archive), make_outliers(SMALL, 4, archive)
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(found, again, strict=True))
    assert {o.kind for o in found} == {*DRAWINGS, "photograph", "other department", CLINICAL}
    sources = {part: {o.source for o in found if o.part == part} for part in ("fit", "test")}
    assert not sources["fit"] & sources["test"]
    patients = [o.source for o in found if o.kind == CLINICAL]
    assert len(patients) == 12
    assert len(set(patients)) == 6
    assert CLINICAL not in {o.kind for o in make_outliers(SMALL, 4)}


def test_captures_keep_their_size_and_are_equal_for_a_seed() -> None:
    plan = read_recipe(RECIPES / "tf_efficientnet_lite2_derm10.toml").augment
    pixels = np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
    first = captured(pixels, plan, 7)
    assert first.shape == pixels.shape
    assert np.array_equal(first, captured(pixels, plan, 7))
    assert not np.array_equal(first, captured(pixels, plan, 8))


def test_a_model_whose_graph_scores_it_knows_a_phone_photograph_and_a_fundus(
    models: Path, isic_dir: Path
) -> None:
    store = ModelStore(models)
    scoring = [m for m in map(store.open, store) if m.manifest.output.unknown is not None]
    assert scoring, "the one that ships does"
    rows = [row for row in read_rows(isic_dir) if row.fold == 0][::60]
    for model in scoring:
        geometry = InputGeometry.from_manifest(model.manifest.input)
        calibrator, run = Calibrator.from_model(model), InferenceSession(model, threads=2).run
        patients = [o.pixels for o in clinical_photographs(geometry, isic_dir) if o.part == "test"]
        retina = [o.pixels for o in make_outliers(geometry, seed=1) if o.source == "retina"]
        known = load_pixels(rows, range(len(rows)), isic_dir, geometry)
        clinical, fundus, dermoscopy = (
            unknown_probability(
                calibrator.score(scan_pixels(run, np.stack(shown))), calibrator.slope, calibrator.intercept
            )
            for shown in (patients, retina, known)
        )
        assert (clinical >= 0.2).mean() > 0.9
        assert (fundus >= 0.2).mean() > 0.8
        assert (dermoscopy >= 0.2).mean() < 0.1
