"""Export a trained network: `python -m data_jobs.training.export --recipe R --checkpoint C --output O`.

Chooses the serving input side and the prior shift on the calibration fold, writes
`O/model.onnx` and proves that ONNX Runtime answers as torch does; `O/export.json` says all.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

from data_jobs.training.dataset import (
    fold_indices,
    isic_folder,
    labels_of,
    load_pixels,
    read_rows,
    training_indices,
)
from data_jobs.training.network import DermNetwork
from data_jobs.training.probabilities import (
    area_under_curve,
    balanced_accuracy,
    calibration_error,
    fit_prior_shift,
    log_loss,
    prior_shifts,
    softmax,
    top_k_accuracy,
)
from data_jobs.training.recipe import Recipe, read_recipe
from data_jobs.training.served_graph import state_labels
from deployments.preprocess.pixels import InputGeometry
from serve_app.domain.diagnosis import TRAINED, Diagnosis

OPSET = 18


@dataclass(frozen=True, slots=True)
class SideFigures:
    """What one input side gives on the calibration fold, after its own prior shift and temperature."""

    side: int
    shift: float
    temperature: float
    top1: float
    top3: float
    balanced_accuracy: float
    melanoma_auc: float
    ece: float
    log_loss: float


class PixelsIn(nn.Module):
    """The network as served: uint8 N×H×W×3 in, mean and std inside."""

    def __init__(self, network: DermNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits N×8 and bottleneck N×512."""
        logits, bottleneck = self.network(pixels.to(torch.float32).permute(0, 3, 1, 2))
        return logits, bottleneck


def load_averaged(recipe: Recipe, checkpoint: Path) -> DermNetwork:
    """The network with its averaged weights, in evaluation mode."""
    state: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    weights = {
        name.removeprefix("module."): value
        for name, value in state["ema"].items()
        if name.startswith("module.")
    }
    network = DermNetwork(recipe.architecture, recipe.network)
    network.load_state_dict(weights)
    return network.eval()


@torch.inference_mode()
def run_torch(model: nn.Module, pixels: NDArray[np.uint8], batch: int = 64) -> NDArray[np.float32]:
    """Logits of uint8 N×H×W×3."""
    parts = [model(torch.from_numpy(pixels[i : i + batch]))[0].numpy() for i in range(0, len(pixels), batch)]
    return np.concatenate(parts)


def side_figures(
    side: int, logits: NDArray[np.float32], labels: NDArray[np.int64], prior: NDArray[np.float64]
) -> SideFigures:
    """Figures of one side from raw logits."""
    shift, temperature = fit_prior_shift(logits, labels, prior, prior_shifts())
    p = softmax(logits + shift * np.log(prior), temperature)
    melanoma = TRAINED.index(Diagnosis.MEL)
    return SideFigures(
        side=side,
        shift=shift,
        temperature=round(temperature, 4),
        top1=round(top_k_accuracy(p, labels, 1), 4),
        top3=round(top_k_accuracy(p, labels, 3), 4),
        balanced_accuracy=round(balanced_accuracy(p, labels, len(TRAINED)), 4),
        melanoma_auc=round(area_under_curve(p[:, melanoma], labels == melanoma), 4),
        ece=round(calibration_error(p, labels), 4),
        log_loss=round(log_loss(p, labels), 4),
    )


def choose_side(figures: list[SideFigures], tolerance: float = 0.005) -> SideFigures:
    """The smallest side within `tolerance` of the best (melanoma AUC + balanced accuracy) / 2."""
    scores = {f.side: (f.melanoma_auc + f.balanced_accuracy) / 2.0 for f in figures}
    best = max(scores.values())
    return min((f for f in figures if scores[f.side] >= best - tolerance), key=lambda f: f.side)


def write_onnx(network: DermNetwork, side: int, path: Path) -> None:
    """Write the served graph: input `pixels`, outputs `logits` and `bottleneck`, any batch size; it names its labels."""
    example = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8)
    torch.onnx.export(
        PixelsIn(network).eval(),
        (example,),
        str(path),
        input_names=["pixels"],
        output_names=["logits", "bottleneck"],
        dynamic_axes={name: {0: "batch"} for name in ("pixels", "logits", "bottleneck")},
        opset_version=OPSET,
        dynamo=False,
    )
    model = onnx.load(path)
    state_labels(model)
    onnx.save(model, path)


@torch.inference_mode()
def onnx_parity(network: DermNetwork, path: Path, pixels: NDArray[np.uint8]) -> dict[str, float]:
    """Largest differences between torch and ONNX Runtime on uint8 N×H×W×3."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    logits, bottleneck = session.run(["logits", "bottleneck"], {"pixels": pixels})
    expected = PixelsIn(network).eval()(torch.from_numpy(pixels))
    return {
        "images": len(pixels),
        "max_abs_logit": float(np.abs(logits - expected[0].numpy()).max()),
        "max_abs_bottleneck": float(np.abs(bottleneck - expected[1].numpy()).max()),
    }


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    recipe = read_recipe(arguments.recipe)
    arguments.output.mkdir(parents=True, exist_ok=True)
    network = load_averaged(recipe, arguments.checkpoint)
    folder = isic_folder()
    rows = read_rows(folder)
    all_labels = labels_of(rows)
    trained_on = all_labels[training_indices(rows, recipe.data)]
    prior = np.bincount(trained_on, minlength=len(TRAINED)) / len(trained_on)
    fold = fold_indices(rows, [recipe.data.calibration_fold])
    figures = []
    for side in recipe.serving_sides:
        pixels = load_pixels(rows, fold, folder, InputGeometry(side, recipe.data.interpolation))
        figures.append(side_figures(side, run_torch(PixelsIn(network), pixels), all_labels[fold], prior))
        print(json.dumps(asdict(figures[-1])), flush=True)
    chosen = choose_side(figures)
    with torch.no_grad():
        network.classify.bias += torch.from_numpy(chosen.shift * np.log(prior)).float()
    path = arguments.output / "model.onnx"
    write_onnx(network, chosen.side, path)
    sample = load_pixels(rows, fold[:64], folder, InputGeometry(chosen.side, recipe.data.interpolation))
    report = {
        "model_id": recipe.model_id,
        "side": chosen.side,
        "prior_shift": chosen.shift,
        "training_images": len(trained_on),
        "opset": OPSET,
        "parity": onnx_parity(network, path, sample),
        "sides": [asdict(f) for f in figures],
    }
    (arguments.output / "export.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["parity"]))


if __name__ == "__main__":
    main()
