from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def isic_dir() -> Path:
    """The labelled archive: `DERM_ISIC_DIR`, or ../shared/isic. It is no part of the repository."""
    folder = Path(os.environ.get("DERM_ISIC_DIR", "../shared/isic"))
    if not (folder / "train.csv").is_file():
        pytest.skip(f"{folder} has no train.csv: set DERM_ISIC_DIR to the labelled archive")
    return folder
