"""Real images of one lesion, and what the shipped segmenter makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_jobs.training.dataset import read_rows
from data_jobs.training.repeatability import Picture, archive_pictures
from deployments.change.segmenter import Segmenter
from model_store.segmenter import StoredSegmenter, open_segmenter
from serve_app.settings import REPOSITORY


@pytest.fixture(scope="session")
def stored() -> StoredSegmenter:
    (folder,) = (REPOSITORY / "model_store" / "segmenters").iterdir()
    return open_segmenter(folder)


@pytest.fixture(scope="session")
def segmenter(stored: StoredSegmenter) -> Segmenter:
    return Segmenter(stored, threads=1)


@pytest.fixture(scope="session")
def pictures(isic_dir: Path) -> list[Picture]:
    """The images of fold 0, on which nothing was fitted."""
    return list(archive_pictures(read_rows(isic_dir), isic_dir, (0,)))


@pytest.fixture(scope="session")
def whole(pictures: list[Picture], segmenter: Segmenter) -> list[np.ndarray]:
    """Eight images of different lesions that are whole, sure and surrounded by skin."""
    found: dict[str, np.ndarray] = {}
    for picture in pictures[::7]:
        pixels = picture.read()
        outline = segmenter.outline(pixels)
        if outline.sure and 0.05 < outline.mask.mean() < 0.25 and picture.lesion not in found:
            found[picture.lesion] = pixels
        if len(found) == 8:
            break
    return list(found.values())
