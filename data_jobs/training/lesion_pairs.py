"""How alike two images of one lesion are, and of two: what the risk policy's `same_lesion` limits are set from.

`python -m data_jobs.training.lesion_pairs --model model_store/models/M --output pairs.json`
"""

from __future__ import annotations

import argparse
import asyncio
from collections import defaultdict
from itertools import permutations
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_jobs.references.catalogue import ARCHIVE_LIMITS
from data_jobs.training.dataset import LabelledImage, isic_folder, read_rows
from deployments.classifier.classifier import Classifier
from deployments.embedder.embedder import Embedder
from deployments.preprocess.pixels import InputGeometry
from deployments.preprocess.preprocess import prepare_image
from deployments.risk.policy import CURRENT_VERSION
from deployments.risk.risk import RiskStage
from deployments.risk.rules import Findings
from model_store.registry import ModelStore
from serve_app.domain.assessment import Neighbours, RiskLevel
from serve_app.domain.patient import ClinicalContext

_LEVELS = tuple(RiskLevel)
_QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
_NONE_FOUND = Neighbours((), None, None, None)


def pair_up(rows: list[LabelledImage], seed: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(earlier, later) positions, N×2, of every two images of one lesion, and of `count` drawn from two lesions.

    The archive does not say which of two images is the earlier: each order of a true pair is one.
    """
    lesions: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        lesions[row.lesion].append(i)
    true = [pair for images in lesions.values() for pair in permutations(images, 2)]
    drawn = np.random.default_rng(seed).integers(0, len(rows), (2 * count, 2))
    different = [pair for pair in drawn if rows[pair[0]].lesion != rows[pair[1]].lesion][:count]
    return np.array(true, dtype=np.int64), np.array(different, dtype=np.int64)


def questioned(
    similarities: NDArray[np.float32], falls: NDArray[np.bool_], limits: tuple[float, ...]
) -> dict[str, dict[str, float]]:
    """Share of pairs below each limit, cosine: of all, of those whose level falls, and of those whose level does not."""
    return {
        f"{limit:.2f}": {
            "all": round(float(np.mean(below := similarities < limit)), 4),
            "level falls": round(float(np.mean(below[falls])), 4) if falls.any() else float("nan"),
            "level stays or rises": round(float(np.mean(below[~falls])), 4),
        }
        for limit in limits
    }


def measure(
    model: Path, rows: list[LabelledImage], folder: Path
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Unit vectors in the model's first space, N×512, and each image's risk level by the model alone (0 low, 2 high)."""
    store = ModelStore(model.parent)
    manifest = store.open(model.name).manifest
    geometry = InputGeometry.from_manifest(manifest.input)
    classifier, embedder = Classifier(store), Embedder(store)
    risk, space = RiskStage(store, CURRENT_VERSION), manifest.live_space.embedding_space
    vectors, levels = [], []
    for row in rows:
        data = (folder / "images" / f"{row.isic_id}.jpg").read_bytes()
        prepared = prepare_image(data, geometry, ARCHIVE_LIMITS)
        (output,) = classifier.classify(model.name, [prepared.pixels])
        vectors.append(embedder.embed(model.name, space, output.bottleneck))
        findings = Findings(
            prepared.quality,
            prepared.width,
            prepared.height,
            output.classification,
            _NONE_FOUND,
            ClinicalContext(),
            None,
        )
        concluded = asyncio.run(risk.conclude(model.name, findings)).risk
        levels.append(_LEVELS.index(concluded.level) if concluded else 0)
    return np.stack(vectors), np.array(levels, dtype=np.int64)


def report(
    rows: list[LabelledImage],
    vectors: NDArray[np.float32],
    levels: NDArray[np.int64],
    limits: tuple[float, ...],
    *,
    pairs: int,
    seed: int = 1,
) -> dict[str, Any]:
    """What each limit would question, of repeated captures and of different lesions; seeded."""
    answer: dict[str, Any] = {"images": len(rows), "seed": seed}
    for name, found in zip(("one lesion", "two lesions"), pair_up(rows, seed, pairs), strict=True):
        earlier, later = found.T
        similarities = np.sum(vectors[earlier] * vectors[later], axis=1)
        falls = levels[later] < levels[earlier]
        answer[name] = {
            "pairs": len(found),
            "level falls": round(float(np.mean(falls)), 4),
            "quantiles": {str(q): round(float(np.quantile(similarities, q)), 3) for q in _QUANTILES},
            "questioned below": questioned(similarities, falls, limits),
        }
    return answer


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the model's folder")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--fold", type=int, default=0, help="a fold that the model was not trained on")
    parser.add_argument("--pairs", type=int, default=20_000, help="how many pairs of two lesions")
    arguments = parser.parse_args()
    rows = [row for row in read_rows(isic_folder()) if row.fold == arguments.fold]
    vectors, levels = measure(arguments.model, rows, isic_folder())
    limits = tuple(round(0.05 * i, 2) for i in range(1, 20))
    found = {"model": arguments.model.name, "fold": arguments.fold}
    found |= report(rows, vectors, levels, limits, pairs=arguments.pairs)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
