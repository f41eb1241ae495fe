"""The model that is tested: the first of the store."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from model_store.registry import ModelStore
from serve_app.settings import REPOSITORY


@pytest.fixture(scope="session")
def models() -> Path:
    """The model store; skips while it is empty."""
    root = Path(os.environ.get("DERM_MODELS", REPOSITORY / "model_store" / "models"))
    if not list(ModelStore(root)):
        pytest.skip(f"there is no model in {root} (DERM_MODELS)")
    return root


@pytest.fixture(scope="session")
def model_id(models: Path) -> str:
    """The first model of the store."""
    return next(iter(ModelStore(models)))
