"""Embedding spaces: linear maps of the bottleneck, compared by what they retrieve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_jobs.training.probabilities import Floats, Labels
from data_jobs.training.unknown import class_means, shrunk_covariance

WIDTH_SHRINKAGE = 0.1


@dataclass(frozen=True, slots=True)
class LinearSpace:
    """unit(matrix @ (bottleneck - mean)); mean 512, matrix 512×512, float32."""

    name: str
    mean: NDArray[np.float32]
    matrix: NDArray[np.float32]

    def embed(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        """N×512 unit vectors."""
        mapped = (np.asarray(features, np.float32) - self.mean) @ self.matrix.T
        result: NDArray[np.float32] = mapped / np.linalg.norm(mapped, axis=1, keepdims=True)
        return result


def candidate_spaces(features: NDArray[np.floating], labels: Labels) -> list[LinearSpace]:
    """The maps to choose from, all fitted on the training folds' bottlenecks.

    centre  the bottleneck, centred
    white   whitened by the total covariance (shrunk)
    within  whitened by the within-class covariance (shrunk): distance as linear discriminant analysis sees it
    lda     `within`, with the discriminant directions stretched as far as they separate classes
    """
    mean = np.asarray(features, np.float64).mean(0)
    means = class_means(features, labels)
    identity = np.eye(features.shape[1])
    total = _inverse_root(shrunk_covariance(features - mean, WIDTH_SHRINKAGE))
    within = _inverse_root(shrunk_covariance(features - means[labels], WIDTH_SHRINKAGE))
    values, vectors = np.linalg.eigh(_between(within, means, mean))
    stretch = vectors @ np.diag(np.sqrt(1.0 + np.clip(values, 0.0, None))) @ vectors.T
    matrices = {"centre": identity, "white": total, "within": within, "lda": stretch @ within}
    return [
        LinearSpace(name, mean.astype(np.float32), matrix.astype(np.float32))
        for name, matrix in matrices.items()
    ]


def _inverse_root(covariance: Floats) -> Floats:
    values, vectors = np.linalg.eigh(covariance)
    result: Floats = vectors @ np.diag(1.0 / np.sqrt(values)) @ vectors.T
    return result


def _between(whitening: Floats, means: Floats, mean: Floats) -> Floats:
    """Between-class covariance in the whitened frame.

    Every class weighs the same, however common: a rare one must be as easy to find.
    """
    deviations = (means - mean) @ whitening.T
    result: Floats = deviations.T @ deviations / len(means)
    return result


def nearest(
    queries: NDArray[np.floating],
    query_lesions: Sequence[str],
    references: NDArray[np.floating],
    reference_lesions: Sequence[str],
    k: int,
) -> NDArray[np.int64]:
    """Q×k positions of the references most similar by cosine, never one of the query's own lesion."""
    _, ids = np.unique([*query_lesions, *reference_lesions], return_inverse=True)
    own, other = ids[: len(query_lesions)], ids[len(query_lesions) :]
    found = np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), 256):
        stop = start + 256
        similarity = queries[start:stop] @ references.T
        similarity[own[start:stop, None] == other[None, :]] = -np.inf
        best = np.argpartition(-similarity, k, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(similarity, best, 1), axis=1)
        found[start:stop] = np.take_along_axis(best, order, 1)
    return found


def precision_at(neighbours: NDArray[np.int64], labels: Labels, reference_labels: Labels) -> float:
    """Mean share of the neighbours with the query's diagnosis."""
    return float((reference_labels[neighbours] == labels[:, None]).mean())


def balanced_precision_at(neighbours: NDArray[np.int64], labels: Labels, reference_labels: Labels) -> float:
    """The same, as the mean over diagnoses: a common one cannot carry it."""
    share = (reference_labels[neighbours] == labels[:, None]).mean(1)
    return float(np.mean([share[labels == c].mean() for c in np.unique(labels)]))
