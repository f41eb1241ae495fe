"""Which space answers: the references that ship with a model loaded, or a filled space verified, and the row that says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
import pyarrow.parquet as pq

from data_jobs.references.catalogue import read_references
from data_jobs.references.embedder import ReferenceEmbedder, identify_embedder, prepare_reference, space_spec
from deployments.preprocess.pixels import InputGeometry
from model_store.manifest import EMBEDDING_DIM, EmbeddingSpaceSpec
from model_store.registry import ModelStore, StoredModel
from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.errors import Conflict, ModelContractError
from serve_app.records.pool import Pool, open_pool
from serve_app.records.references import (
    FailedReference,
    ReferenceCache,
    ReferenceImage,
    ReferenceStore,
    SpaceSummary,
)
from serve_app.records.serving import Approval, LiveModel, live_model, publish_when_ready

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
class ReferenceBundle:
    """The references that ship with a model: metadata, and embeddings float32 N×512 of unit norm."""

    images: list[ReferenceImage]
    embeddings: NDArray[np.float32]


def read_bundle(model: StoredModel, space: EmbeddingSpaceSpec) -> ReferenceBundle:
    """Read a space's Parquet. Raises ModelContractError unless it holds what the manifest says."""
    table = pq.read_table(model.path(space.references))
    if table.num_rows != space.count:
        raise ModelContractError(f"{space.references} has {table.num_rows} rows, not {space.count}.")
    flat = table.column("embedding").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    rows = table.select([field.name for field in fields(ReferenceImage)]).to_pylist()
    images = [ReferenceImage(**{**row, "diagnosis": Diagnosis(row["diagnosis"])}) for row in rows]
    return ReferenceBundle(images, flat.astype(np.float32).reshape(-1, EMBEDDING_DIM))


async def publish_bundled(owner_dsn: str, models: Path, model_id: str) -> int:
    """Load a model's references unless they are there, then make it the one that answers.

    Safe to repeat; returns how many references were loaded now. `owner_dsn` is of the role
    that owns the schema.
    """
    model = ModelStore(models).open(model_id)
    space = model.manifest.live_space
    pool = await open_pool(owner_dsn, minimum=0, maximum=1)
    try:
        references, cache = ReferenceStore(pool), ReferenceCache(pool)
        target = LiveModel(model.manifest.model_id, model.digest, space.embedding_space)
        live = await live_model(pool)
        embedder = identify_embedder(model, space)
        known = await cache.embedder(space.embedding_space)
        # A space of this name that another network or transform filled: none of it may stay.
        foreign = known is not None and known.digest != embedder.digest
        # The same space in a changed folder: its vectors may be others.
        rebuilt = live is not None and live != target and live.embedding_space == target.embedding_space
        loaded = 0
        if foreign or rebuilt or await references.count(space.embedding_space) < space.count:
            bundle = read_bundle(model, space)
            await references.load(
                bundle.images,
                bundle.embeddings,
                embedding_space=space.embedding_space,
                replace=foreign or (rebuilt and known is None),
            )
            loaded = len(bundle.images)
        if foreign or known is None:
            await cache.reassign(embedder, expected=space.count)
        if live != target:
            await publish_when_ready(pool, target)
        return loaded
    finally:
        await pool.close()


async def publish_space(
    pool: Pool,
    models: Path,
    model_id: str,
    *,
    embedding_space: str | None = None,
    folder: Path | None = None,
    approval: Approval | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> LiveModel:
    """Verify a model's space and let the model answer in it, from the next request on.

    Raises Conflict when a check fails, and nothing has changed then. Safe to repeat.
    """
    before = await live_model(pool)
    model = ModelStore(models).open(model_id)
    spec = space_spec(model, embedding_space)
    checks = await verify_space(pool, model, spec.embedding_space, folder=folder)
    for check in checks:
        say(f"{'ok' if check.passed else 'NO':>3}  {check.name}: {check.found}")
    if failed := [check.name for check in checks if not check.passed]:
        raise Conflict(f"{spec.embedding_space} must not answer: {', '.join(failed)}.")
    target = LiveModel(model_id, model.digest, spec.embedding_space)
    await publish_when_ready(pool, target, approval, over=before)
    return target


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
    digest, known = identify_embedder(model, spec).digest, summary.embedder_digest or "nobody knows what"
    unfit = await cache.count_unfit(spec.embedding_space)
    checks = [
        *_counts(summary),
        Check("embedder", known == digest, f"filled by {known[:12]}, the model is {digest[:12]}"),
        Check("unit norms", unfit == 0, f"{unfit} vectors are not of unit norm"),
        await _recall(pool, cache, spec.embedding_space),
    ]
    if folder is not None:
        checks.append(await _canaries(pool, model, spec.embedding_space, folder))
    return checks


def _counts(summary: SpaceSummary) -> list[Check]:
    if summary.completed_at is None or summary.images_expected is None:
        return [Check("filled", passed=False, found="a job began to fill it and has not come to its end")]
    images, failures, expected = summary.images, summary.failures, summary.images_expected
    found, failed = f"{images} references and {failures} failures of {expected} images", failures / expected
    return [
        Check("filled", images + failures >= expected, found),
        Check("failures", failed <= MAX_FAILED_SHARE, f"{failed:.2%} failed; {MAX_FAILED_SHARE:.0%} may"),
    ]


async def _recall(pool: Pool, cache: ReferenceCache, embedding_space: str) -> Check:
    """recall@10 of the search as served against an exact one, by distance, near stored vectors."""
    rng = np.random.default_rng(SAMPLE)
    served, exact = ReferenceStore(pool), ReferenceStore(pool, exact_below=10**9)
    found = wanted = 0
    sample = await cache.sample(embedding_space, SAMPLE)
    for _, vector in sample:
        query = vector + _NOISE * rng.normal(size=vector.shape).astype(np.float32)
        query /= np.linalg.norm(query)
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
    entries = read_references(folder)
    entries = entries[:: max(1, len(entries) // CANARIES)][:CANARIES]
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
