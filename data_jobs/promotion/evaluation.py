"""Evaluation of a stored model on a copy: a folder in the store never changes."""

from __future__ import annotations

import json
from pathlib import Path
import shutil
import tempfile
from typing import Any

from data_jobs.promotion.training_step import run_step
from model_store.registry import ModelStore


def evaluate_model(models: Path, model_id: str, *, recipe: Path, threads: int) -> dict[str, Any]:
    """Measure a model on its recipe's test fold and return all figures.

    Raises ModelContractError when it must not be loaded, ImportRefused when the job fails.
    """
    model = ModelStore(models).open(model_id)
    with tempfile.TemporaryDirectory(prefix="derm-evaluate-") as scratch:
        shutil.copytree(model.folder, Path(scratch) / model_id)
        run_step(
            "data_jobs.training.evaluate",
            *("--model", model_id, "--models", scratch, "--recipe", recipe, "--threads", threads),
        )
        evaluated: dict[str, Any] = json.loads((Path(scratch) / model_id / "evaluation.json").read_text())
    return evaluated
