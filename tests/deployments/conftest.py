"""Folders of real images that are not part of the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def isic_dir() -> Path:
    """The labelled archive; skips where it is absent."""
    folder = Path(os.environ.get("DERM_ISIC_DIR", REPOSITORY / "../shared/isic"))
    if not (folder / "train.csv").is_file():
        pytest.skip(f"no labelled images at {folder} (DERM_ISIC_DIR)")
    return folder


@pytest.fixture(scope="session")
def corpora_dir() -> Path:
    """The hostile corpora; skips where they are absent."""
    folder = Path(os.environ.get("DERM_CORPORA_DIR", REPOSITORY / "../shared/corpora"))
    if not folder.is_dir():
        pytest.skip(f"no corpora at {folder} (DERM_CORPORA_DIR)")
    return folder
