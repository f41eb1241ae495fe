"""What the similar cases of a query are worth, against the references that ship with the model."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq

from data_jobs.training.embedding_spaces import balanced_precision_at, nearest, precision_at
from data_jobs.training.evaluation.predictions import MELANOMA, Predictions
from data_jobs.training.ranking import area_under_curve
from data_jobs.training.scan import Scan
from deployments.embedder.embedder import EmbeddingSpace
from model_store.registry import StoredModel
from serve_app.domain.diagnosis import TRAINED


def retrieval_figures(model: StoredModel, scan: Scan, predictions: Predictions) -> dict[str, float]:
    """Precision@10 and the melanoma AUC of a 16-neighbour vote; `scan` holds the predictions' bottlenecks."""
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
    found = nearest(queries, predictions.lesions, references, lesions, 16)
    vote = (reference_labels[found] == MELANOMA).mean(1)
    return {
        "references": table.num_rows,
        "precision_at_10": round(precision_at(found[:, :10], labels, reference_labels), 4),
        "balanced_precision_at_10": round(balanced_precision_at(found[:, :10], labels, reference_labels), 4),
        "vote_16_melanoma_auc": round(area_under_curve(vote, labels == MELANOMA), 4),
    }
