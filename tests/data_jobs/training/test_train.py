"""A run that was stopped goes on as if it had not been."""

from __future__ import annotations

from dataclasses import replace
import json
from pathlib import Path

import numpy as np
import pytest

from data_jobs.training.recipe import Stage, read_recipe
from serve_app.domain.diagnosis import TRAINED

torch = pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("timm", reason="needs the train extra")

pytestmark = [
    pytest.mark.torch,
    # torch's own deprecations are not ours to fix
    pytest.mark.filterwarnings("ignore"),
]

RECIPE = read_recipe(Path("data_jobs/training/recipes/tf_efficientnet_lite0_derm4.toml"))
RECIPE = replace(
    RECIPE,
    start=None,
    optimiser=replace(RECIPE.optimiser, batch_size=8),
    stages=(Stage(side=32, epochs=1), Stage(side=40, epochs=1)),
)


class StoppedError(Exception):
    """The process dies here."""


def test_a_stopped_run_ends_with_the_weights_of_an_undisturbed_one(tmp_path: Path, monkeypatch) -> None:
    from data_jobs.training import train as training

    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (24, 48, 48, 3), dtype=np.uint8)
    labels = np.arange(24) % len(TRAINED)
    arguments = (RECIPE, pixels, labels, np.arange(24))

    training.train(*arguments, tmp_path / "whole")

    real, begun = training.run_epoch, []

    def stopping(*given: object) -> tuple[float, float]:
        begun.append(1)
        if len(begun) == 2:
            raise StoppedError
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(training, "run_epoch", stopping)
        with pytest.raises(StoppedError):
            training.train(*arguments, tmp_path / "stopped")
    training.train(*arguments, tmp_path / "stopped")

    whole, stopped = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "stopped")
    )
    assert stopped["epochs_done"] == whole["epochs_done"] == 2
    for part in ("network", "ema"):
        assert all(torch.equal(whole[part][name], tensor) for name, tensor in stopped[part].items())
    log = [json.loads(line) for line in (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()]
    assert [line["side"] for line in log] == [32, 40]
    assert all(np.isfinite(line["loss"]) and 0.0 <= line["train_accuracy"] <= 1.0 for line in log)
