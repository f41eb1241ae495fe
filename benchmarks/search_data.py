"""References and queries for the search, real embeddings and real ones perturbed; what an exact search finds in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_jobs.references.load import ReferenceBundle, read_bundle
from model_store.registry import ModelStore
from serve_app.domain.assessment import EVERY_REFERENCE, Neighbours, ReferenceFilter
from serve_app.domain.diagnosis import MALIGNANT, TRAINED, Diagnosis
from serve_app.records.references import DIMENSIONS, ReferenceImage

#: Perturbed copies are spread over the licences as the archive's public images roughly are.
LICENCES = {"CC-0": 0.5, "CC-BY": 0.15, "CC-BY-NC": 0.35}
#: Share of the copies of which nobody says how the diagnosis was confirmed.
UNCONFIRMED = 0.3
#: Length of what is added to a vector of length 1: a cosine of 0.96 to 0.71 with the real one.
NOISE = (0.3, 1.0)

# Copies are made so many at a time: what 400,000 of them need in between would be gigabytes.
_CHUNK = 20_000


@dataclass(frozen=True, slots=True)
class SearchData:
    """`vectors` float32 N×512 as the database rounds them, a row an image; `queries` float32 Q×512, none a row."""

    images: list[ReferenceImage]
    vectors: NDArray[np.float32]
    queries: NDArray[np.float32]

    def passing(self, limits: ReferenceFilter) -> NDArray[np.bool_]:
        """Which images a filter lets pass (N,)."""
        return np.array(
            [
                (not limits.licences or image.copyright_license in limits.licences)
                and (not limits.sites or image.anatom_site_general in limits.sites)
                and (not limits.confirmed_only or image.confirmed)
                and (not limits.diagnoses or image.diagnosis in limits.diagnoses)
                for image in self.images
            ]
        )

    def malignant(self) -> NDArray[np.bool_]:
        """Which images are malignant (N,)."""
        return np.array([image.diagnosis in MALIGNANT for image in self.images])

    def filters(self) -> list[ReferenceFilter]:
        """None, confirmed ones, each licence, each site, the rarest licence at each site, some diagnoses."""
        sites = sorted({image.anatom_site_general for image in self.images} - {None}, key=str)
        rarest = min(LICENCES, key=lambda licence: LICENCES[licence])
        counted = Counter(image.diagnosis for image in self.images)
        rare = min(counted, key=lambda diagnosis: (counted[diagnosis], diagnosis))
        benign = tuple(d for d in TRAINED if d not in MALIGNANT)
        return [
            EVERY_REFERENCE,
            ReferenceFilter(confirmed_only=True),
            *(ReferenceFilter(licences=(licence,)) for licence in LICENCES),
            *(ReferenceFilter(sites=(str(site),)) for site in sites),
            *(ReferenceFilter((rarest,), (str(site),)) for site in sites),
            ReferenceFilter(licences=(rarest,), confirmed_only=True),
            *(ReferenceFilter(diagnoses=(diagnosis,)) for diagnosis in (Diagnosis.NV, Diagnosis.MEL, rare)),
            ReferenceFilter(diagnoses=benign),
            # A share of the benign that may be far from a naevus: the hardest for the index of a kind.
            ReferenceFilter(diagnoses=tuple(d for d in benign if d is not Diagnosis.NV)),
            ReferenceFilter(licences=(rarest,), diagnoses=(Diagnosis.MEL,)),
        ]


def describe(limits: ReferenceFilter) -> str:
    """Say what a search is limited to."""
    confirmed = ("confirmed",) if limits.confirmed_only else ()
    diagnoses = ("/".join(limits.diagnoses),) if limits.diagnoses else ()
    return " and ".join((*limits.licences, *limits.sites, *diagnoses, *confirmed)) or "none"


def make_search_data(models: Path, *, rows: int, queries: int, seed: int = 20261124) -> SearchData:
    """Take the references of the one model and perturb them until there are `rows`, each of its own lesion.

    Half the queries are real images, of which neither they nor anything made of them is a
    reference; half are fresh perturbations of references.
    """
    store = ModelStore(models)
    (model_id,) = store
    model = store.open(model_id)
    bundle = read_bundle(model, model.manifest.live_space)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(bundle.images))
    asked, kept = order[: queries // 2], order[queries // 2 :][:rows]
    parents = rng.choice(kept, size=rows - len(kept))
    vectors = np.empty((rows, DIMENSIONS), np.float32)
    vectors[: len(kept)] = _rounded(bundle.embeddings[kept])
    for start in range(0, len(parents), _CHUNK):
        some = parents[start : start + _CHUNK]
        place = len(kept) + start
        vectors[place : place + len(some)] = _perturbed(bundle.embeddings[some], rng)
    again = rng.choice(kept, size=queries - len(asked))
    return SearchData(
        [*(bundle.images[place] for place in kept), *_copies(bundle, parents, rng)],
        vectors,
        np.vstack([_rounded(bundle.embeddings[asked]), _perturbed(bundle.embeddings[again], rng)]),
    )


def _copies(
    bundle: ReferenceBundle, parents: NDArray[np.int64], rng: np.random.Generator
) -> list[ReferenceImage]:
    licences = rng.choice(list(LICENCES), size=len(parents), p=list(LICENCES.values()))
    unconfirmed = rng.random(len(parents)) < UNCONFIRMED
    return [
        replace(
            bundle.images[parent],
            isic_id=f"COPY_{number:07d}",
            lesion_id=f"IL_COPY_{number:07d}",
            copyright_license=str(licence),
            **({"diagnosis_confirm_type": None} if unknown else {}),
        )
        for number, (parent, licence, unknown) in enumerate(zip(parents, licences, unconfirmed, strict=True))
    ]


def _perturbed(vectors: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    lengths = rng.uniform(*NOISE, size=(len(vectors), 1)) / np.sqrt(DIMENSIONS)
    noisy = vectors + lengths * rng.standard_normal(vectors.shape, dtype=np.float32)
    return _rounded(noisy / np.linalg.norm(noisy, axis=1, keepdims=True))


def _rounded(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    return vectors.astype(np.float16).astype(np.float32)


#: Similarities are sums of float32: as near as this is the same distance.
_TIE = 1e-5

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
