"""What an exact search finds under each filter: similarities by NumPy, some rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.search_data import SearchData
from serve_app.domain.assessment import Neighbours, ReferenceFilter

#: Similarities are sums of float32: as near as this is the same distance.
_TIE = 1e-5
_CHUNK = 20_000

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Truth:
    """What passes one filter, and how near the nearest of it are to each of Q queries; -inf where none passes.

    `passing` images; `nearest` (Q, K) descending; `malignant` and `benign` (Q,).
    """

    passing: int
    nearest: Floats
    malignant: Floats
    benign: Floats

    def share_found(self, found: Neighbours, query: int) -> float:
        """Of the K nearest the share that was found, by distance: one as near as the true Kth counts; all of none."""
        wanted = min(self.nearest.shape[1], self.passing)
        if not wanted:
            return 1.0
        farthest = self.nearest[query, wanted - 1]
        return float(sum(case.similarity >= farthest - _TIE for case in found.similar) / wanted)

    def is_short(self, found: Neighbours) -> bool:
        """Whether fewer than K were found though there are as many."""
        return bool(len(found.similar) < min(self.nearest.shape[1], self.passing))

    def kinds_missed(self, found: Neighbours, query: int) -> int:
        """How many of the nearest benign and the nearest malignant were passed over for a farther one."""
        missed = 0
        for case, best in (
            (found.nearest_malignant, self.malignant[query]),
            (found.nearest_benign, self.benign[query]),
        ):
            missed += bool((-np.inf if case is None else case.similarity) < best - _TIE)
        return missed


def search_exactly(data: SearchData, filters: Sequence[ReferenceFilter], k: int) -> list[Truth]:
    """Find the `k` highest cosines of each query under each filter."""
    passing, malignant = [data.passing(limits) for limits in filters], data.malignant()
    empty = np.full((len(data.queries), 0), -np.inf)
    nearest = [[empty, empty, empty] for _ in filters]
    queries = data.queries.astype(np.float64)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    for start in range(0, len(data.vectors), _CHUNK):
        rows = slice(start, start + _CHUNK)
        vectors = data.vectors[rows].astype(np.float64)
        cosines = queries @ (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).T
        kinds = malignant[rows]
        for best, passes in zip(nearest, passing, strict=True):
            some = passes[rows]
            for place, (mask, first) in enumerate(((some, k), (some & kinds, 1), (some & ~kinds, 1))):
                best[place] = _highest(np.hstack([best[place], cosines[:, mask]]), first)
    return [
        Truth(int(passes.sum()), every, of_malignant[:, 0], of_benign[:, 0])
        for passes, (every, of_malignant, of_benign) in (
            (passes, [_filled(values, first) for values, first in zip(best, (k, 1, 1), strict=True)])
            for passes, best in zip(passing, nearest, strict=True)
        )
    ]


def _highest(values: Floats, first: int) -> Floats:
    """The `first` highest of each row, descending; all where there are fewer."""
    if values.shape[1] > first:
        values = np.partition(values, -first, axis=1)[:, -first:]
    highest: Floats = np.sort(values, axis=1)[:, ::-1]
    return highest


def _filled(values: Floats, width: int) -> Floats:
    """Rows made `width` wide by -inf."""
    return np.pad(values, ((0, 0), (0, width - values.shape[1])), constant_values=-np.inf)
