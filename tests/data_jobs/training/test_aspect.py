from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
import pytest

from data_jobs.training.aspect import agreement
from data_jobs.training.dataset import read_pixels, read_rows
from data_jobs.training.evaluation.predictions import Predictions
from data_jobs.training.reshape import SQUARE_FILES, WAYS, nearest_square, reshaped
from deployments.preprocess.decode import UploadLimits
from deployments.preprocess.preprocess import PreparedImage, prepare_or_reject
from deployments.preprocess.resize import InputGeometry
from model_store.manifest import InputSpec
from model_store.registry import ModelStore


def _jpeg(width: int, height: int) -> bytes:
    """A white disc on black: what is done to its shape can be read from the pixels."""
    y, x = np.mgrid[0:height, 0:width]
    disc = np.hypot(x - width / 2, y - height / 2) < height / 3
    buffer = io.BytesIO()
    Image.fromarray((disc * 255).astype(np.uint8)).convert("RGB").save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _white(data: bytes) -> float:
    """Width by height of what is white."""
    white = np.asarray(Image.open(io.BytesIO(data)).convert("L")) > 128
    return float(white.any(0).sum() / white.any(1).sum())


def test_a_file_becomes_the_archives_square_file_of_its_size() -> None:
    assert nearest_square(200, 150) == 180
    assert nearest_square(427, 320) == 320
    assert nearest_square(224, 224) == 224


@pytest.mark.parametrize("way", ["squashed", "letter-boxed", "cropped"])
def test_reshaped_files_are_square(way: str) -> None:
    with Image.open(io.BytesIO(reshaped(_jpeg(427, 320), way))) as image:
        assert image.size == (320, 320)
        assert image.format == "JPEG"


def test_only_squashing_changes_a_shape() -> None:
    wide = _jpeg(400, 300)
    ratios = {way: _white(reshaped(wide, way)) for way in WAYS}
    assert ratios["squashed"] == pytest.approx(0.75, abs=0.02)
    for way in ("saved again", "letter-boxed", "cropped"):
        assert ratios[way] == pytest.approx(1.0, abs=0.02)
    saved = Image.open(io.BytesIO(reshaped(wide, "saved again")))
    assert saved.size == (400, 300)


def test_squashed_files_are_compressed_like_the_archives(isic_dir: Path) -> None:
    """Their quantization tables are those of Pillow at SQUARE_FILES' quality."""
    rows = [row for row in read_rows(isic_dir) if row.aspect == "squashed"]
    for side, quality in SQUARE_FILES.items():
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "JPEG", quality=quality)
        expected = Image.open(buffer).quantization
        for row in [row for row in rows if row.width == side][:20]:
            with Image.open(isic_dir / "images" / f"{row.isic_id}.jpg") as image:
                assert image.quantization == expected, row.isic_id


def test_preprocess_gives_nearly_the_same_pixels_both_ways(isic_dir: Path) -> None:
    rows = [row for row in read_rows(isic_dir) if row.aspect == "true"][:: 4114 // 12]
    limits = UploadLimits(min_side=128)
    for row in rows:
        data = (isic_dir / "images" / f"{row.isic_id}.jpg").read_bytes()
        own, squashed = (_served(d, limits) for d in (data, reshaped(data, "squashed")))
        assert np.abs(own.astype(float) - squashed).mean() < 3.0, row.isic_id


def test_training_batch_and_service_see_the_same_pixels(isic_dir: Path, models: Path, model_id: str) -> None:
    """Training and batch jobs read by `read_pixels`, the service by `prepare_or_reject`."""
    spec = ModelStore(models).open(model_id).manifest.input
    limits = UploadLimits(min_side=128)
    rows = read_rows(isic_dir)
    shapes = [[row for row in rows if row.aspect == aspect][::500] for aspect in ("true", "squashed")]
    for row in [row for shape in shapes for row in shape]:
        data = (isic_dir / "images" / f"{row.isic_id}.jpg").read_bytes()
        online = prepare_or_reject(data, spec, limits)
        assert isinstance(online, PreparedImage)
        offline = read_pixels(row, isic_dir, InputGeometry.from_manifest(spec))
        assert np.array_equal(online.pixels, offline), row.isic_id


def test_agreement_by_hand(make_row) -> None:
    rows = [make_row(i) for i in range(3)]
    before = np.zeros((3, 9))
    before[:, 0], before[:, 1] = (0.6, 0.4, 0.02), (0.4, 0.6, 0.98)
    after = before.copy()
    after[0, :2] = (0.3, 0.7)
    found = agreement(Predictions(rows, before, np.zeros(3)), Predictions(rows, after, np.zeros(3)), 0.5)
    assert found["top1_agreement"] == 0.6667
    assert (found["right_to_wrong"], found["wrong_to_right"]) == (1, 0)
    assert found["melanoma_change"]["1.0"] == 0.3
    assert found["same_side_of_melanoma_point"] == 0.6667
    assert found["drift"]["MEL"] == -0.1
    assert found["mean_change"] == pytest.approx(0.6 / 27, abs=1e-5)


def _served(data: bytes, limits: UploadLimits) -> np.ndarray:
    spec = InputSpec("pixels", (3, 176, 176), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "squash")
    prepared = prepare_or_reject(data, spec, limits)
    assert isinstance(prepared, PreparedImage)
    return prepared.pixels
