"""Weights are scored as `train` writes them, each source by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_jobs.training.dataset import BCN84, LabelledImage
from data_jobs.training.recipe import read_recipe
from serve_app.domain.diagnosis import TRAINED

torch = pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("timm", reason="needs the train extra")

pytestmark = pytest.mark.torch

RECIPE = read_recipe(Path("data_jobs/training/recipes/tf_efficientnet_lite2_derm10.toml"))


def test_every_source_is_told_by_itself(make_row: Callable[..., LabelledImage]) -> None:
    from data_jobs.training.source_figures import by_source

    rows = [make_row(i, i % 8) for i in range(80)]
    rows += [replace(make_row(100 + i, i % 8), source=BCN84, lesion_id=f"BCN_{i}") for i in range(40)]
    logits = np.eye(8, dtype=np.float32)[[row.label for row in rows]]
    logits[80:] = logits[[80 + (i + 1) % 8 for i in range(40)]]
    figures = by_source(logits, rows)
    assert (figures["archive"]["images"], figures[BCN84]["images"]) == (80, 40)
    ham, rest = figures["HAM10000"]["images"], figures["archive without HAM10000"]["images"]
    assert ham + rest == 80
    assert min(ham, rest) > 0
    assert figures["archive"]["top1"] == figures["archive"]["melanoma_auc"] == 1.0
    assert figures[BCN84]["top1"] == 0.0


def test_what_training_writes_is_what_is_scored(tmp_path: Path) -> None:
    from torch.optim.swa_utils import AveragedModel

    from data_jobs.training.network import DermNetwork
    from data_jobs.training.source_figures import PRIOR_SHIFT, open_weights
    from data_jobs.training.train import write_weights

    torch.manual_seed(4)
    network = DermNetwork(RECIPE.architecture, RECIPE.network).eval()
    write_weights(AveragedModel(network), tmp_path / "stage-1.safetensors")
    pixels = np.random.default_rng(4).integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
    log_prior = np.log(np.full(len(TRAINED), 0.125))
    logits, bottleneck = open_weights(RECIPE, tmp_path / "stage-1.safetensors", log_prior)(pixels)
    with torch.inference_mode():
        expected = network(torch.from_numpy(pixels).permute(0, 3, 1, 2).float())[0].numpy()
    assert bottleneck.shape == (3, 512)
    assert logits - PRIOR_SHIFT * log_prior == pytest.approx(expected, abs=0.02)

    with torch.no_grad():
        network.reduce.weight[0, 0] = 1e9
    with pytest.raises(ValueError, match="beyond what float16 can hold"):
        write_weights(AveragedModel(network), tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()
