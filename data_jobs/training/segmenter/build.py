"""Make a segmenter's folder: `python -m data_jobs.training.segmenter.build --recipe R --weights W --segmenters S`.

`W` is a `stage-N.safetensors` that `train` wrote. The calibration fold sets how sure an outline must be; on the test
fold nothing is chosen. Writes `S/<model_id>/`: `model.onnx` (weights stored in half floats), `evaluation.json`,
`MODEL_CARD.md` and `manifest.toml` with their digests.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from datetime import UTC, datetime
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
import numpy as np
from numpy.typing import NDArray
import onnxruntime as ort
from safetensors.torch import load_file
import torch
from torch import Tensor, nn

from data_jobs.training.card import CARD_NAME, between
from data_jobs.training.dataset import (
    LabelledImage,
    fold_indices,
    isic_folder,
    load_pixels,
    read_rows,
    training_indices,
)
from data_jobs.training.edge.onnx_copies import plain_graph, write_float16
from data_jobs.training.manifest_file import write_digests
from data_jobs.training.network import load_weights
from data_jobs.training.repeatability import FILE_NAME as REPEATABILITY_NAME
from data_jobs.training.segmenter.evaluate import RELIABLE, evaluate, least_confidence, score
from data_jobs.training.segmenter.masks import outlined, read_mask
from data_jobs.training.segmenter.network import SegmenterNetwork
from data_jobs.training.segmenter.recipe import SegmenterRecipe, read_segmenter_recipe
from deployments.change.segmenter import Segmenter
from deployments.preprocess.pixels import InputGeometry
from model_store.segmenter import open_segmenter

OPSET = 18
ONNX_NAME, EVALUATION_NAME = "model.onnx", "evaluation.json"
#: Limits that follow from what they mean, whatever the network; docs/models.md.
LEAST_AREA, FRAME_SHARE, MAIN_SHARE = 0.003, 0.01, 0.9


class OutlinePixels(nn.Module):
    """The network as served: uint8 N×S×S×3 to log-odds N×S/2×S/2."""

    def __init__(self, network: SegmenterNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        """One pass."""
        logits: Tensor = self.network(pixels.to(torch.float32).permute(0, 3, 1, 2))
        return logits[:, 0]


def read_network(recipe: SegmenterRecipe, weights: Path) -> SegmenterNetwork:
    """The network with these weights. Raises ValueError when they are another's."""
    network = SegmenterNetwork(recipe.trunk, recipe.network)
    load_weights(network, recipe.architecture, load_file(weights))
    return network.float().eval()


@torch.inference_mode()
def write_graph(network: SegmenterNetwork, side: int, path: Path, pixels: NDArray[np.uint8]) -> float:
    """Write the served graph; returns the largest difference to torch on uint8 pixels N×side×side×3, in log-odds."""
    served = OutlinePixels(network).eval()
    torch.onnx.export(
        served,
        (torch.from_numpy(pixels[:2]),),
        str(path),
        input_names=["pixels"],
        output_names=["logits"],
        dynamic_axes={"pixels": {0: "batch"}, "logits": {0: "batch"}},
        opset_version=OPSET,
        dynamo=False,
    )
    write_float16(plain_graph(path, side), path)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"pixels": pixels})
    return float(np.abs(found - served(torch.from_numpy(pixels)).numpy()).max())


def manifest_content(recipe: SegmenterRecipe, trained_on: int, confidence: float) -> dict[str, Any]:
    """The manifest as plain tables, without digests."""
    side, folds = recipe.side, ", ".join(map(str, recipe.data.train_folds))
    return {
        "model_id": recipe.model_id,
        "architecture": recipe.architecture,
        "tag": recipe.tag,
        "modality": "dermoscopic",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "licence": "CC-BY-NC-4.0",
        "training_data": f"HAM10000's lesion masks, folds {folds}, {trained_on} images; trunk of {recipe.start.model_id}",
        "onnx": ONNX_NAME,
        "evaluation": EVALUATION_NAME,
        "input": {
            "name": "pixels",
            "input_size": [3, side, side],
            "mean": [recipe.network.mean] * 3,
            "std": [recipe.network.std] * 3,
            "interpolation": recipe.data.interpolation,
            "crop_pct": 1.0,
            "aspect": "squash",
        },
        "output": {"logits": "logits", "size": [side // 2, side // 2]},
        "doubts": {
            "least_area": LEAST_AREA,
            "frame_share": FRAME_SHARE,
            "main_share": MAIN_SHARE,
            "confidence": confidence,
            "fitted_on": f"fold {recipe.data.calibration_fold}: {RELIABLE:.0%} of the sure outlines have an IoU of 0.65",
        },
    }


def read_fold(
    rows: list[LabelledImage], indices: Iterable[int], folder: Path, recipe: SegmenterRecipe
) -> tuple[list[LabelledImage], NDArray[np.uint8], NDArray[np.bool_]]:
    """Rows at `indices`, their pixels at the cache's side, and the expert's lesions in the same frame."""
    picked = list(indices)
    side = recipe.data.cache_side
    pixels = load_pixels(rows, picked, folder, InputGeometry(side, recipe.data.interpolation))
    truth = np.stack([read_mask(rows[i], folder, side) > 127 for i in picked])
    return [rows[i] for i in picked], pixels, truth


def build(recipe: SegmenterRecipe, weights: Path, segmenters: Path, stride: int = 1) -> dict[str, Any]:
    """Write the folder and return its figures; of both folds every `stride`-th image is looked at."""
    archive = isic_folder()
    rows = read_rows(archive)
    masked = outlined(rows, archive)
    trained_on = len(np.intersect1d(training_indices(rows, recipe.data), masked))
    known, tested = (
        read_fold(rows, np.intersect1d(fold_indices(rows, [fold]), masked)[::stride], archive, recipe)
        for fold in (recipe.data.calibration_fold, recipe.data.test_fold)
    )
    folder = segmenters / recipe.model_id
    folder.mkdir(parents=True, exist_ok=True)
    sample = load_pixels(rows, masked[:16], archive, InputGeometry(recipe.side, recipe.data.interpolation))
    parity = write_graph(read_network(recipe, weights), recipe.side, folder / ONNX_NAME, sample)
    (folder / EVALUATION_NAME).write_text("{}\n")
    # Limits of another graph's: `data_jobs.training.repeatability` measures this one's.
    (folder / REPEATABILITY_NAME).unlink(missing_ok=True)
    write_digests(folder, manifest_content(recipe, trained_on, 0.0))
    confidence = least_confidence(score(Segmenter(open_segmenter(folder), threads=1), *known[1:]))
    content = manifest_content(recipe, trained_on, confidence)
    write_digests(folder, content)
    segmenter = Segmenter(open_segmenter(folder), threads=1)
    report = evaluate(segmenter, *tested, recipe.seed) | {
        "fold": recipe.data.test_fold,
        "parity": parity,
        "megabytes": round((folder / ONNX_NAME).stat().st_size / 1e6, 2),
    }
    (folder / EVALUATION_NAME).write_text(json.dumps(report, indent=1) + "\n")
    write_card(folder, content, report)
    write_digests(folder, content)
    open_segmenter(folder)
    return report


def write_card(folder: Path, manifest: dict[str, Any], report: dict[str, Any]) -> None:
    """Write `MODEL_CARD.md`; its text is the template beside this file."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701 - Markdown, which nobody's browser runs
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"between": between}
    card = environment.get_template(f"{CARD_NAME}.j2").render(manifest=manifest, evaluated=report)
    (folder / CARD_NAME).write_text(card, encoding="utf-8")


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--segmenters", type=Path, default=Path("model_store/segmenters"))
    parser.add_argument(
        "--stride", type=int, default=1, help="to try things out: every so many images of a fold"
    )
    arguments = parser.parse_args()
    recipe = read_segmenter_recipe(arguments.recipe)
    report = build(recipe, arguments.weights, arguments.segmenters, arguments.stride)
    print(
        json.dumps({name: report[name] for name in ("all", "doubts", "clutter", "milliseconds", "megabytes")})
    )


if __name__ == "__main__":
    main()
