"""Whether a filled space may answer: every check has a name, what it found, and whether that will do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_jobs.references.catalogue import CatalogueEntry, read_references
from data_jobs.references.embedder import ReferenceEmbedder, identify_embedder, prepare_reference, space_spec
from deployments.preprocess.pixels import InputGeometry
from model_store.registry import StoredModel
from serve_app.records.pool import Pool
from serve_app.records.reference_cache import FailedReference, ReferenceCache, SpaceSummary
from serve_app.records.references import ReferenceStore

#: Share of a catalogue that may have failed: more is a broken fetch, not a few bad files.
MAX_FAILED_SHARE = 0.01
MIN_RECALL = 0.99
K = 10
SAMPLE = 200
CANARIES = 8
#: A halfvec keeps 11 bits of each of 512 coordinates: cosines are right to a few times 1e-4.
MIN_CANARY_SIMILARITY = 0.999
_NOISE = 0.02
_TIE = 1e-5


@dataclass(frozen=True, slots=True)
class Check:
    """One named check of a space."""

    name: str
    passed: bool
    found: str


async def verify_space(
    pool: Pool, model: StoredModel, embedding_space: str | None = None, *, folder: Path | None = None
) -> list[Check]:
    """Check a model's space (its first unless one is named) before it may answer; needs the owner's role.

    `folder`: where the images are, for the canaries: a few of those that the embed job takes are embedded again
    and must find themselves. Raises what `read_references` does.
    """
    spec = space_spec(model, embedding_space)
    cache = ReferenceCache(pool)
    summaries = {summary.embedding_space: summary for summary in await cache.spaces()}
    summary = summaries.get(spec.embedding_space)
    if summary is None or not summary.images:
        return [Check("filled", passed=False, found=f"{spec.embedding_space} holds no reference")]
    checks = [
        *_counts(summary),
        _embedder(summary, identify_embedder(model, spec).digest),
        await _norms(cache, spec.embedding_space),
        await _recall(pool, cache, spec.embedding_space),
    ]
    if folder is not None:
        checks.append(await _canaries(pool, model, spec.embedding_space, folder))
    return checks


def _counts(summary: SpaceSummary) -> list[Check]:
    if summary.completed_at is None or summary.images_expected is None:
        return [Check("filled", passed=False, found="a job began to fill it and has not come to its end")]
    accounted = summary.images + summary.failures >= summary.images_expected
    failed = summary.failures / summary.images_expected
    return [
        Check(
            "filled",
            accounted,
            f"{summary.images} references and {summary.failures} failures of {summary.images_expected} images",
        ),
        Check("failures", failed <= MAX_FAILED_SHARE, f"{failed:.2%} failed; {MAX_FAILED_SHARE:.0%} may"),
    ]


def _embedder(summary: SpaceSummary, digest: str) -> Check:
    known = summary.embedder_digest or "nobody knows what"
    return Check("embedder", known == digest, f"filled by {known[:12]}, the model is {digest[:12]}")


async def _norms(cache: ReferenceCache, embedding_space: str) -> Check:
    unfit = await cache.count_unfit(embedding_space)
    return Check("unit norms", unfit == 0, f"{unfit} vectors are not of unit norm")


async def _recall(pool: Pool, cache: ReferenceCache, embedding_space: str) -> Check:
    """recall@10 of the search as served against an exact one, by distance, near stored vectors."""
    rng = np.random.default_rng(SAMPLE)
    served, exact = ReferenceStore(pool), ReferenceStore(pool, exact_below=10**9)
    found = wanted = 0
    sample = await cache.sample(embedding_space, SAMPLE)
    for _, vector in sample:
        query = _unit(vector + _NOISE * rng.normal(size=vector.shape).astype(np.float32))
        truth = await exact.nearest(query, embedding_space=embedding_space, k=K)
        answer = await served.nearest(query, embedding_space=embedding_space, k=K)
        worst = min(case.similarity for case in truth.similar)
        found += sum(case.similarity >= worst - _TIE for case in answer.similar)
        wanted += len(truth.similar)
    recall = found / wanted
    return Check("recall", recall >= MIN_RECALL, f"recall@{K} {recall:.4f} over {len(sample)} queries")


async def _canaries(pool: Pool, model: StoredModel, embedding_space: str, folder: Path) -> Check:
    """Images of the folder, embedded anew as an upload would be, must find themselves first.

    One that cannot be read now says nothing of the space; where none can be, nothing was checked.
    """
    entries = _spread(read_references(folder), CANARIES)
    geometry = InputGeometry.from_manifest(model.manifest.input)
    embedder = ReferenceEmbedder(model, space_spec(model, embedding_space))
    store = ReferenceStore(pool)
    embedded, lost, unread = 0, [], set()
    for entry in entries:
        prepared = prepare_reference(
            folder / entry.path, entry.isic_id, geometry, sha256=entry.sha256, picture=False
        )
        if isinstance(prepared, FailedReference):
            unread.add(prepared.cause)
            continue
        embedded += 1
        query = embedder.embed(prepared.pixels[np.newaxis])[0]
        similar = (await store.nearest(query, embedding_space=embedding_space, k=K)).similar
        itself = [case for case in similar if case.isic_id == entry.isic_id or case.lesion_id == entry.lesion]
        if not itself or itself[0].similarity < MIN_CANARY_SIMILARITY:
            lost.append(entry.isic_id)
    found = f"{embedded} of {len(entries)} embedded anew"
    if unread:
        found += f" (the others: {', '.join(sorted(unread))})"
    if embedded:
        found += f", {', '.join(lost)} lost" if lost else ", all found"
    return Check("canaries", bool(embedded) and not lost, found)


def _spread(entries: list[CatalogueEntry], count: int) -> list[CatalogueEntry]:
    step = max(1, len(entries) // count)
    return entries[::step][:count]


def _unit(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(vector / np.linalg.norm(vector), dtype=np.float32)
