"""What a graph is worth on one fold, source by source: `python -m data_jobs.training.source_figures --onnx M.onnx`.

A classifier alone: no temperature, no UNK. Both sources of the fold are scored, prepared as the service would prepare
them; nothing is chosen or fitted on them here. What `train` writes after every epoch becomes a graph by
`export --weights`; its logits need `--prior-shift 0.5`, say, which an export of a checkpoint has in it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

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
from data_jobs.training.evaluation.figures import accuracy_figures
from data_jobs.training.probabilities import area_under_curve, rounded, softmax
from data_jobs.training.recipe import read_recipe
from data_jobs.training.scan import open_onnx, scan_images
from deployments.preprocess.pixels import InputGeometry
from serve_app.domain.diagnosis import MALIGNANT, TRAINED


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
            "malignant_auc": rounded(
                area_under_curve(p[picked][:, malignant].sum(1), np.isin(labels[picked], malignant))
            ),
        }
        for name, picked in groups.items()
        if picked.any()
    }


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--onnx", type=Path, required=True, help="a model's graph")
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--side", type=int, required=True)
    parser.add_argument(
        "--prior-shift", type=float, default=0.0, help="share of log prior given back to logits"
    )
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--stride", type=int, default=1, help="every so many images only, to try things out")
    arguments = parser.parse_args()
    recipe, folder = read_recipe(arguments.recipe), isic_folder()
    rows = read_rows(folder)
    counts = np.bincount(labels_of(rows)[training_indices(rows, recipe.data)], minlength=len(TRAINED))
    rows += read_bcn84(folder)
    picked = fold_indices(rows, [arguments.fold])[:: arguments.stride]
    geometry = InputGeometry(arguments.side, recipe.data.interpolation)
    scan = scan_images(open_onnx(arguments.onnx), rows, picked, folder, geometry)
    logits = scan.logits + np.float32(arguments.prior_shift) * np.log(counts / counts.sum()).astype(
        np.float32
    )
    print(json.dumps(by_source(logits, [rows[i] for i in picked]), indent=1))


if __name__ == "__main__":
    main()
