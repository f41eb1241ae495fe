"""Can a copy's embedding search the server's references? The same ten neighbours, or as good ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
import pyarrow.parquet as pq

from data_jobs.training.edge.fold_images import FoldImages
from data_jobs.training.embedding_spaces import nearest, precision_at
from data_jobs.training.probabilities import Labels
from deployments.embedder.embedder import EmbeddingSpace
from model_store.registry import StoredModel
from serve_app.domain.diagnosis import TRAINED, Diagnosis

NEIGHBOURS = 10


@dataclass(frozen=True, slots=True)
class ReferenceSearch:
    """The shipped references (R×512 unit vectors in the live space), their diagnoses and lesions."""

    space: EmbeddingSpace
    vectors: NDArray[np.float32]
    labels: Labels
    lesions: list[str]

    @classmethod
    def from_model(cls, model: StoredModel) -> Self:
        """Read the references that a verified model ships."""
        live = model.manifest.live_space
        table = pq.read_table(model.path(live.references))
        halves = table["embedding"].combine_chunks().flatten().to_numpy()
        return cls(
            EmbeddingSpace.from_model(model, live),
            halves.astype(np.float32).reshape(table.num_rows, -1),
            np.array([TRAINED.index(Diagnosis(d)) for d in table["diagnosis"].to_pylist()]),
            [a or b for a, b in zip(*(table[c].to_pylist() for c in ("lesion_id", "isic_id")), strict=True)],
        )

    def compare(
        self, images: FoldImages, server: NDArray[np.float32], copy: NDArray[np.float32]
    ) -> dict[str, float | dict[str, float]]:
        """Neighbours found with the copy's bottlenecks (N×512) against those found with the server's."""
        queries_server, queries = self.space.embed(server), self.space.embed(copy)
        found_server, found = self._nearest(queries_server, images), self._nearest(queries, images)
        shared = [len(np.intersect1d(a, b)) for a, b in zip(found_server, found, strict=True)]
        return {
            "cosine": cosines(queries_server, queries),
            "shared_of_ten": round(float(np.mean(shared)), 3),
            "same_first": round(float((found_server[:, 0] == found[:, 0]).mean()), 4),
            "precision_at_10_server": round(precision_at(found_server, images.labels, self.labels), 4),
            "precision_at_10": round(precision_at(found, images.labels, self.labels), 4),
        }

    def _nearest(self, queries: NDArray[np.float32], images: FoldImages) -> NDArray[np.int64]:
        return nearest(queries, images.lesions, self.vectors, self.lesions, NEIGHBOURS)


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> dict[str, float]:
    """Least, first percentile and median of the cosine between rows."""
    products = (a.astype(np.float64) * b).sum(1)
    values = products / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return {
        "min": round(float(values.min()), 5),
        "quantile_01": round(float(np.quantile(values, 0.01)), 5),
        "median": round(float(np.median(values)), 5),
    }
