"""What weights are worth on one fold, source by source: `python -m data_jobs.training.source_figures`.

`--weights W.safetensors --recipe R --side 176` scores what `train` writes after every epoch; `--model M` an
exported model folder, to compare with. A classifier alone: no temperature, no UNK. Both sources of the fold are
scored, prepared as the service would prepare them; nothing is chosen or fitted on them here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file
import torch

from data_jobs.training.dataset import (
    ARCHIVE,
    BCN84,
    LabelledImage,
    fold_indices,
    isic_folder,
    labels_of,
    read_bcn84,
    read_rows,
    training_indices,
)
from data_jobs.training.draws import sampled_prior
from data_jobs.training.evaluation.figures import accuracy_figures
from data_jobs.training.machine import Machine
from data_jobs.training.network import DermNetwork, load_weights
from data_jobs.training.probabilities import area_under_curve, softmax
from data_jobs.training.recipe import Recipe, read_recipe
from data_jobs.training.scan import Outputs, open_onnx, scan_images
from deployments.preprocess.pixels import InputGeometry
from serve_app.domain.diagnosis import MALIGNANT, TRAINED

#: How much of the archive's prior is given back to the logits of weights; an exported model has its own.
PRIOR_SHIFT = 0.5


def by_source(logits: NDArray[np.float32], rows: list[LabelledImage]) -> dict[str, dict[str, float]]:
    """Figures of N×8 logits: all of the archive, HAM10000 in it, the rest of it, and bcn84."""
    labels, p = labels_of(rows), softmax(logits)
    source = np.array([row.source for row in rows])
    ham = np.array([(row.lesion_id or "").startswith("HAM_") for row in rows])
    malignant = [i for i, d in enumerate(TRAINED) if d in MALIGNANT]
    groups = {
        "archive": source == ARCHIVE,
        "HAM10000": ham,
        "archive without HAM10000": (source == ARCHIVE) & ~ham,
        BCN84: source == BCN84,
    }
    return {
        name: {
            **accuracy_figures(p[picked], labels[picked]),
            "malignant_auc": round(
                area_under_curve(p[picked][:, malignant].sum(1), np.isin(labels[picked], malignant)), 4
            ),
        }
        for name, picked in groups.items()
        if picked.any()
    }


def open_weights(
    recipe: Recipe, weights: Path, log_prior: NDArray[np.float64], *, bfloat16: bool = False
) -> Callable[[NDArray[np.uint8]], Outputs]:
    """A forward pass of our own network's safetensors, PRIOR_SHIFT of the prior restored."""
    machine = Machine.of("cpu", bfloat16=bfloat16)
    network = DermNetwork(recipe.architecture, recipe.network).eval()
    load_weights(network, recipe.architecture, load_file(weights))

    @torch.inference_mode()
    def run(pixels: NDArray[np.uint8]) -> Outputs:
        with machine.autocast():
            logits, bottleneck = network(machine.as_input(torch.from_numpy(pixels)))
        shifted = logits.float().numpy() + PRIOR_SHIFT * log_prior.astype(np.float32)
        return shifted, bottleneck.float().numpy()

    return run


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--weights", type=Path, help="safetensors, as `train` writes them")
    given.add_argument("--model", type=Path, help="a model folder")
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--side", type=int, required=True)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--stride", type=int, default=1, help="every so many images only, to try things out")
    parser.add_argument("--bfloat16", action="store_true", help="on a CPU with AMX, where it is faster")
    arguments = parser.parse_args()
    recipe, folder = read_recipe(arguments.recipe), isic_folder()
    rows = read_rows(folder)
    labels = labels_of(rows)
    log_prior = np.log(sampled_prior(labels[training_indices(rows, recipe.data)], 1.0))
    if arguments.model:
        run = open_onnx(arguments.model / "model.onnx")
    else:
        run = open_weights(recipe, arguments.weights, log_prior, bfloat16=arguments.bfloat16)
    rows += read_bcn84(folder)
    picked = fold_indices(rows, [arguments.fold])[:: arguments.stride]
    geometry = InputGeometry(arguments.side, recipe.data.interpolation)
    scan = scan_images(run, rows, picked, folder, geometry)
    print(json.dumps(by_source(scan.logits, [rows[i] for i in picked]), indent=1))


if __name__ == "__main__":
    main()
