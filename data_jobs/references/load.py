"""Which space answers: a model's shipped references loaded, or a filled and verified space, and the row that says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
import pyarrow.parquet as pq

from data_jobs.references.embedder import identify_embedder, space_spec
from data_jobs.references.verify import verify_space
from model_store.manifest import EMBEDDING_DIM, EmbeddingSpaceSpec
from model_store.registry import ModelStore, StoredModel
from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.errors import Conflict, ModelContractError
from serve_app.records.pool import Pool, open_pool
from serve_app.records.reference_cache import ReferenceCache
from serve_app.records.references import ReferenceImage, ReferenceStore
from serve_app.records.serving import Approval, LiveModel, live_model, publish


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
    rows = table.drop_columns(["embedding"]).to_pylist()
    images = [
        ReferenceImage(
            isic_id=row["isic_id"],
            lesion_id=row["lesion_id"],
            diagnosis=Diagnosis(row["diagnosis"]),
            diagnosis_confirm_type=row["diagnosis_confirm_type"],
            age_approx=row["age_approx"],
            sex=row["sex"],
            anatom_site_general=row["anatom_site_general"],
            copyright_license=row["copyright_license"],
            attribution=row["attribution"],
        )
        for row in rows
    ]
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
            await publish(pool, target)
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
    await publish(pool, target, approval, over=before)
    return target
