"""Embedding spaces: linear maps of the bottleneck, compared by what they retrieve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from data_jobs.references.load import read_bundle
from data_jobs.training.evaluation.intervals import RESAMPLES, interval, resampled_weights, weighted_auc
from data_jobs.training.evaluation.predictions import MELANOMA, Predictions
from data_jobs.training.probabilities import Floats, Labels, area_under_curve
from data_jobs.training.scan import Scan
from data_jobs.training.unknown import class_means, shrunk_covariance
from deployments.embedder.embedder import EmbeddingSpace
from model_store.registry import StoredModel
from serve_app.domain.diagnosis import TRAINED

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


@dataclass(frozen=True, slots=True)
class ShippedReferences:
    """The references that a model ships: R×512 unit vectors in its live space, their diagnoses and lesions."""

    space: EmbeddingSpace
    vectors: NDArray[np.float32]
    labels: Labels
    lesions: list[str]

    @classmethod
    def from_model(cls, model: StoredModel) -> Self:
        """Read those of a verified model."""
        live = model.manifest.live_space
        bundle = read_bundle(model, live)
        labels = np.array([TRAINED.index(image.diagnosis) for image in bundle.images])
        lesions = [image.lesion_id or image.isic_id for image in bundle.images]
        return cls(EmbeddingSpace.from_model(model, live), bundle.embeddings, labels, lesions)


VOTERS = 16


def retrieval_figures(model: StoredModel, scan: Scan, predictions: Predictions, seed: int) -> dict[str, Any]:
    """Precision@10, and a 16-neighbour vote for melanoma beside the softmax; `scan` holds the predictions' bottlenecks."""
    shipped, labels = ShippedReferences.from_model(model), predictions.labels
    queries = shipped.space.embed(scan.bottleneck)
    found = nearest(queries, predictions.lesions, shipped.vectors, shipped.lesions, VOTERS)
    vote = (shipped.labels[found] == MELANOMA).mean(1)
    return {
        "references": len(shipped.lesions),
        "precision_at_10": round(precision_at(found[:, :10], labels, shipped.labels), 4),
        "balanced_precision_at_10": round(balanced_precision_at(found[:, :10], labels, shipped.labels), 4),
        **vote_figures(vote, predictions, seed),
    }


def vote_figures(
    vote: Floats, predictions: Predictions, seed: int, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """Melanoma AUC of the neighbours' vote (N shares) and of the softmax, and the former minus the latter.

    The softmax is calibrated and without UNK, of which neighbours say nothing. Both are scored on the
    same images, and again in the same resamples of lesions, so that the interval is that of the
    difference: what makes a draw hard makes it hard for both.
    """
    melanoma, softmax = predictions.labels == MELANOMA, predictions.eight[:, MELANOMA]
    weights = resampled_weights(predictions.lesions, resamples, seed)
    resampled = weighted_auc(vote, melanoma, weights) - weighted_auc(softmax, melanoma, weights)
    by_vote, by_softmax = area_under_curve(vote, melanoma), area_under_curve(softmax, melanoma)
    return {
        "vote_16_melanoma_auc": round(by_vote, 4),
        "softmax_melanoma_auc": round(by_softmax, 4),
        "vote_minus_softmax": round(by_vote - by_softmax, 4),
        "vote_minus_softmax_interval": interval(resampled),
    }
