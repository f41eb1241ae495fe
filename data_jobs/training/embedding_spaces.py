"""Embedding spaces: linear maps of the bottleneck, compared by what they retrieve, and what the chosen one gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from data_jobs.references.load import read_bundle
from data_jobs.training.dataset import LabelledImage, labels_of
from data_jobs.training.evaluation.figures import RESAMPLES, interval, resampled_weights, weighted_auc
from data_jobs.training.evaluation.predictions import MELANOMA, Predictions
from data_jobs.training.probabilities import Floats, Labels, area_under_curve, quantiles, rounded
from data_jobs.training.unknown import class_means, shrunk_covariance
from deployments.embedder.embedder import EmbeddingSpace
from model_store.registry import StoredModel
from model_store.session import Outputs
from serve_app.domain.diagnosis import TRAINED

WIDTH_SHRINKAGE = 0.1


def candidate_spaces(features: NDArray[np.floating], labels: Labels) -> dict[str, EmbeddingSpace]:
    """The maps to choose from by name, all fitted on the training folds' bottlenecks.

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
    # Between classes in the whitened frame. Every class weighs the same: a rare one must be as easy to find.
    deviations = (means - mean) @ within.T
    values, vectors = np.linalg.eigh(deviations.T @ deviations / len(means))
    stretch = vectors @ np.diag(np.sqrt(1.0 + np.clip(values, 0.0, None))) @ vectors.T
    matrices = {"centre": identity, "white": total, "within": within, "lda": stretch @ within}
    return {
        name: EmbeddingSpace(mean.astype(np.float32), matrix.astype(np.float32))
        for name, matrix in matrices.items()
    }


def _inverse_root(covariance: Floats) -> Floats:
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray(vectors @ np.diag(1.0 / np.sqrt(values)) @ vectors.T)


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


def precision_figures(
    neighbours: NDArray[np.int64], labels: Labels, reference_labels: Labels
) -> dict[str, float]:
    """`precision_at` ten neighbours, over all and as the mean over diagnoses: a common one cannot carry that."""
    share = (reference_labels[neighbours] == labels[:, None]).mean(1)
    return {
        "precision_at_10": rounded(precision_at(neighbours, labels, reference_labels)),
        "balanced_precision_at_10": rounded(np.mean([share[labels == c].mean() for c in np.unique(labels)])),
    }


def choose_space(
    train: Outputs, train_rows: list[LabelledImage], held: Outputs, held_rows: list[LabelledImage]
) -> tuple[str, EmbeddingSpace, dict[str, dict[str, float]]]:
    """The space of best precision@10 (mean of plain and balanced) and its name, and the figures of all.

    Of those that tell lesions apart, since a follow-up is known by it: see `apart`, within APART_TOLERANCE of the best.
    """
    train_labels, held_labels = labels_of(train_rows), labels_of(held_rows)
    train_lesions, held_lesions = ([row.lesion for row in rows] for rows in (train_rows, held_rows))
    figures = {}
    spaces = candidate_spaces(train.bottleneck, train_labels)
    for name, space in spaces.items():
        queries, references = space.embed(held.bottleneck), space.embed(train.bottleneck)
        found = nearest(queries, held_lesions, references, train_lesions, 10)
        figures[name] = precision_figures(found, held_labels, train_labels)
        figures[name]["apart"] = apart(queries, held_lesions)
    least = max(each["apart"] for each in figures.values()) - APART_TOLERANCE
    good = [name for name, each in figures.items() if each["apart"] >= least]
    best = max(
        good, key=lambda name: figures[name]["precision_at_10"] + figures[name]["balanced_precision_at_10"]
    )
    return best, spaces[best], figures


#: What a space may be short of the one that tells lesions apart best, and how many of one lesion's pairs may be questioned.
APART_TOLERANCE = 0.03
QUESTIONED = 0.09


def apart(vectors: NDArray[np.float32], lesions: Sequence[str]) -> float:
    """Share of two lesions' pairs that are less alike than all but QUESTIONED of one lesion's; 1 without any."""
    similarity, same = _pairs(vectors, lesions)
    if not same.any():
        return 1.0
    return rounded((similarity[~same] < np.quantile(similarity[same], QUESTIONED)).mean())


def _pairs(
    vectors: NDArray[np.float32], lesions: Sequence[str]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Cosine of every pair of N unit vectors, and whether both are of one lesion."""
    _, ids = np.unique(lesions, return_inverse=True)
    first, second = np.triu_indices(len(ids), 1)
    return (vectors @ vectors.T)[first, second], ids[first] == ids[second]


PAIR_QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


def pair_figures(vectors: NDArray[np.float32], lesions: Sequence[str]) -> dict[str, dict[str, float]]:
    """How alike two images of one lesion are, and of two: a risk policy's `same_lesion` limits are set from it.

    `vectors` N×512 unit vectors. Quantiles of the cosine over all pairs.
    """
    similarity, same = _pairs(vectors, lesions)
    return {
        name: quantiles(similarity[picked], PAIR_QUANTILES, 3)
        for name, picked in (("one lesion", same), ("two lesions", ~same))
        if picked.any()
    }


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


def retrieval_figures(
    model: StoredModel, scan: Outputs, predictions: Predictions, seed: int
) -> dict[str, Any]:
    """Precision@10, and a 16-neighbour vote for melanoma beside the softmax; `scan` holds the predictions' bottlenecks."""
    shipped, labels = ShippedReferences.from_model(model), predictions.labels
    queries = shipped.space.embed(scan.bottleneck)
    found = nearest(queries, predictions.lesions, shipped.vectors, shipped.lesions, VOTERS)
    vote = (shipped.labels[found] == MELANOMA).mean(1)
    return {
        "references": len(shipped.lesions),
        **precision_figures(found[:, :10], labels, shipped.labels),
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
        "vote_16_melanoma_auc": rounded(by_vote),
        "softmax_melanoma_auc": rounded(by_softmax),
        "vote_minus_softmax": rounded(by_vote - by_softmax),
        "vote_minus_softmax_interval": interval(resampled),
    }
