"""Copies of the model with something wrong about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.model_folders import Change, copy_model


@pytest.fixture
def altered(models: Path, model_id: str, tmp_path: Path) -> Callable[..., Path]:
    """Copy the model and change its manifest; `(change) -> store`."""

    def copy(change: Change | None = None) -> Path:
        copy_model(models / model_id, tmp_path / "models", change=change)
        return tmp_path / "models"

    return copy
