"""The images a copy is proven on: whole folds of the archive, and outliers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_jobs.training.dataset import (
    LabelledImage,
    build_cache,
    fold_indices,
    isic_folder,
    labels_of,
    read_rows,
)
from data_jobs.training.probabilities import Labels
from data_jobs.training.scan import Outputs, Pixels
from deployments.preprocess.pixels import InputGeometry
from serve_app.domain.diagnosis import Diagnosis

Run = Callable[[Pixels], Outputs]


@dataclass(frozen=True, slots=True)
class FoldImages:
    """Labelled images of one fold; `name` is the fold's, `pixels` uint8 N×side×side×3."""

    name: str
    rows: list[LabelledImage]
    labels: Labels
    pixels: Pixels

    @property
    def lesions(self) -> list[str]:
        """The lesion of every image."""
        return [row.lesion for row in self.rows]


@dataclass(frozen=True, slots=True)
class Archive:
    """All labelled images, prepared once by the service's own code (`build_cache`)."""

    rows: list[LabelledImage]
    pixels: NDArray[np.uint8]
    geometry: InputGeometry

    @classmethod
    def open(cls, cache: Path, geometry: InputGeometry) -> Archive:
        """Read the rows and the pixel cache; a first call prepares every image, a minute or two."""
        folder = isic_folder()
        rows = read_rows(folder)
        return cls(rows, build_cache(rows, folder, cache, geometry), geometry)

    def fold(self, number: int, sample: int | None = None) -> FoldImages:
        """One fold, in the order of the file; of a sample, half are melanomas as far as there are."""
        indices = fold_indices(self.rows, [number])
        if sample is not None:
            drawn = np.random.default_rng(number).permutation(indices)
            melanoma = np.array([self.rows[i].diagnosis is Diagnosis.MEL for i in drawn])
            found = drawn[melanoma][: sample // 2]
            indices = np.sort(np.concatenate([found, drawn[~melanoma][: sample - len(found)]]))
        rows = [self.rows[i] for i in indices]
        return FoldImages(f"fold{number}", rows, labels_of(rows), self.pixels[indices])

    def sample(self, folds: tuple[int, ...], per_diagnosis: int, seed: int) -> Pixels:
        """As many images of every diagnosis (or all there are), drawn from these folds; equal for equal seeds."""
        rng = np.random.default_rng(seed)
        indices = fold_indices(self.rows, folds)
        labels = labels_of([self.rows[i] for i in indices])
        picked = [rng.permutation(indices[labels == label])[:per_diagnosis] for label in np.unique(labels)]
        return np.asarray(self.pixels[np.sort(np.concatenate(picked))])
