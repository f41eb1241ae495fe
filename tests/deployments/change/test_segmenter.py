"""An outline is the lesion's in the image's own frame, and says by itself when it is not to be relied on."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
import pytest

from deployments.change.segmenter import OutlineDoubt, Segmenter, components, filled, largest, read_outline
from model_store.segmenter import DoubtLimits, StoredSegmenter
from serve_app.domain.errors import ModelContractError

LIMITS = DoubtLimits(0.003, 0.01, 0.9, 0.75, "made up")
SIDE = 80


def disc(x: float, y: float, radius: float, sharp: float = 40.0) -> np.ndarray:
    """Log-odds that are positive within a disc, in shares of the side."""
    at = (np.arange(SIDE) + 0.5) / SIDE
    distance = np.hypot(at[None, :] - x, at[:, None] - y)
    return np.clip(sharp * 10.0 * (radius - distance), -sharp, sharp).astype(np.float32)


def test_a_clear_lesion_is_outlined_in_the_images_own_frame_without_doubt() -> None:
    outline = read_outline(disc(0.4, 0.5, 0.2), (300, 200), LIMITS)
    assert outline.sure
    assert outline.mask.shape == (200, 300)
    # An ellipse of 60 by 40 pixels.
    assert outline.mask.sum() == pytest.approx(np.pi * 60 * 40, rel=0.02)
    rows, columns = np.nonzero(outline.mask)
    assert (columns.mean(), rows.mean()) == pytest.approx((119.5, 99.5), abs=0.6)
    assert outline.confidence > 0.95


@pytest.mark.parametrize(
    ("logits", "doubts"),
    [
        (disc(0.5, 0.5, 0.0), (OutlineDoubt.NO_LESION, OutlineDoubt.LOW_CONFIDENCE)),
        (disc(0.1, 0.5, 0.3), (OutlineDoubt.TOUCHES_FRAME,)),
        (np.maximum(disc(0.3, 0.5, 0.15), disc(0.7, 0.5, 0.06)), (OutlineDoubt.SEVERAL_COMPONENTS,)),
        (disc(0.5, 0.5, 0.2, sharp=0.8), (OutlineDoubt.LOW_CONFIDENCE,)),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_every_doubt_is_named(logits: np.ndarray, doubts: tuple[OutlineDoubt, ...]) -> None:
    outline = read_outline(logits, (120, 90), LIMITS)
    assert outline.doubts == doubts
    assert not outline.sure


def test_the_largest_piece_is_kept_and_its_holes_are_filled() -> None:
    ring = np.minimum(disc(0.4, 0.5, 0.25), -disc(0.4, 0.5, 0.1))
    speck = disc(0.9, 0.1, 0.04)
    outline = read_outline(np.maximum(ring, speck), (SIDE, SIDE), LIMITS)
    assert OutlineDoubt.SEVERAL_COMPONENTS not in outline.doubts
    assert outline.mask[40, 32], "the hole"
    assert not outline.mask[:16, 64:].any(), "the speck"


def test_pieces_are_those_of_scipy() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    rng = np.random.default_rng(0)
    for share in (0.0, 0.3, 0.5, 0.6, 0.9, 1.0):
        mask = rng.random((37, 53)) < share
        ours, (theirs, count) = components(mask), ndimage.label(mask)
        assert np.array_equal(ours > 0, mask)
        assert len({*zip(ours[mask], theirs[mask], strict=True)}) == count == len(set(ours[mask]))
        assert np.array_equal(filled(mask), ndimage.binary_fill_holes(mask))
        assert largest(mask).sum() == max(np.bincount(theirs[mask], minlength=1), default=0)


def drawn(size: tuple[int, int], ellipse: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Skin with a brown ellipse (left, top, right, bottom in shares), soft at its edge and uneven; and where it is."""
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).ellipse([v * s for v, s in zip(ellipse, size * 2, strict=True)], fill=255)
    rng = np.random.default_rng(1)
    soft = np.asarray(mask.filter(ImageFilter.GaussianBlur(0.01 * size[1])))[..., None] / 255.0
    coarse = Image.fromarray(rng.normal(0.0, 12.0, (size[1] // 12, size[0] // 12)).astype(np.float32))
    uneven = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC))[..., None] * (0.3 + soft)
    skin, brown = np.array((214, 168, 150)), np.array((96, 58, 44))
    pixels = skin + (brown - skin) * soft + uneven + rng.normal(0.0, 3.0, (size[1], size[0], 1))
    return np.clip(pixels, 0, 255).astype(np.uint8), np.asarray(mask) > 127


@pytest.mark.parametrize("size", [(600, 450), (150, 200), (320, 320)])
def test_the_shipped_segmenter_finds_a_drawn_lesion(stored: StoredSegmenter, size: tuple[int, int]) -> None:
    pixels, lesion = drawn(size, (0.3, 0.35, 0.65, 0.7))
    outline = Segmenter(stored, threads=1).outline(pixels)
    assert outline.mask.shape == lesion.shape
    assert (outline.mask & lesion).sum() > 0.85 * (outline.mask | lesion).sum()
    assert outline.sure


def test_the_shipped_segmenter_says_that_the_frame_cuts_a_lesion(stored: StoredSegmenter) -> None:
    pixels, _ = drawn((320, 240), (-0.2, 0.2, 0.35, 0.8))
    assert OutlineDoubt.TOUCHES_FRAME in Segmenter(stored, threads=1).outline(pixels).doubts


def test_the_shipped_segmenter_outlines_real_lesions_as_experts_do(
    stored: StoredSegmenter, isic_dir: Path
) -> None:
    """Images of fold 0 at true aspect, on which nothing was fitted."""
    with (isic_dir / "train.csv").open(newline="", encoding="utf-8") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if (row["fold"], row["aspect"], row["has_mask"]) == ("0", "true", "1")
        ]
    segmenter, overlaps = Segmenter(stored, threads=1), []
    for row in rows[:: max(1, len(rows) // 24)]:
        with Image.open(isic_dir / "images" / f"{row['isic_id']}.jpg") as file:
            found = segmenter.outline(np.asarray(file.convert("RGB"))).mask
        with Image.open(isic_dir / "masks" / f"{row['isic_id']}.png") as file:
            lesion = np.asarray(file.convert("L").resize(found.shape[::-1])) > 127
        overlaps.append((found & lesion).sum() / (found | lesion).sum())
    assert len(overlaps) >= 24
    assert np.mean(overlaps) > 0.82


def test_another_graph_than_the_manifest_says_is_refused(stored: StoredSegmenter) -> None:
    output = replace(stored.manifest.output, size=(10, 10))
    with pytest.raises(ModelContractError, match="manifest says"):
        Segmenter(replace(stored, manifest=replace(stored.manifest, output=output)), threads=1)
