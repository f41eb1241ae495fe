"""What the similar cases of a query are worth, against the references that ship with the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.parquet as pq

from data_jobs.training.embedding_spaces import balanced_precision_at, nearest, precision_at
from data_jobs.training.evaluation.intervals import RESAMPLES, interval, resampled_weights, weighted_auc
from data_jobs.training.evaluation.predictions import MELANOMA, Predictions
from data_jobs.training.probabilities import Floats
from data_jobs.training.ranking import area_under_curve
from data_jobs.training.scan import Scan
from deployments.embedder.embedder import EmbeddingSpace
from model_store.registry import StoredModel
from serve_app.domain.diagnosis import TRAINED

VOTERS = 16


def retrieval_figures(model: StoredModel, scan: Scan, predictions: Predictions, seed: int) -> dict[str, Any]:
    """Precision@10, and a 16-neighbour vote for melanoma beside the softmax; `scan` holds the predictions' bottlenecks."""
    live = model.manifest.live_space
    table = pq.read_table(model.path(live.references))
    halves = table["embedding"].combine_chunks().flatten().to_numpy()
    references = halves.astype(np.float32).reshape(table.num_rows, -1)
    names = [d.value for d in TRAINED]
    reference_labels = np.array([names.index(d) for d in table["diagnosis"].to_pylist()])
    lesions = [
        lesion or isic_id
        for lesion, isic_id in zip(table["lesion_id"].to_pylist(), table["isic_id"].to_pylist(), strict=True)
    ]
    labels = predictions.labels
    queries = EmbeddingSpace.from_model(model, live).embed(scan.bottleneck)
    found = nearest(queries, predictions.lesions, references, lesions, VOTERS)
    vote = (reference_labels[found] == MELANOMA).mean(1)
    return {
        "references": table.num_rows,
        "precision_at_10": round(precision_at(found[:, :10], labels, reference_labels), 4),
        "balanced_precision_at_10": round(balanced_precision_at(found[:, :10], labels, reference_labels), 4),
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
