"""A candidate, and the space it will answer in: intact, loadable, with references enough, all of them its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_jobs.references.embedder import embed_rows, identify_embedder
from data_jobs.references.load import read_bundle, verify_space
from data_jobs.training.dataset import isic_folder, read_rows
from deployments.classifier.calibration import Calibrator
from deployments.embedder.embedder import EmbeddingSpace
from model_store.registry import ModelStore, StoredModel
from model_store.session import InferenceSession
from serve_app.domain.errors import DermError
from serve_app.records.pool import Pool
from serve_app.records.references import ReferenceCache, ReferenceStore
from serve_app.records.serving import LiveModel


class PromotionRefused(DermError):
    """The model that answers stays as it is."""

    code = "promotion_refused"


class ImportRefused(DermError):
    """The model was not imported; nothing was left in the store."""

    code = "import_refused"


#: References embedded anew to prove that the bundle is this model's.
SAMPLED = 32
#: Half floats and another processor's rounding move a unit vector by less than this.
LEAST_COSINE = 0.999


@dataclass(frozen=True, slots=True)
class ReferenceProof:
    """The candidate's references: how many, how many the live model has too, and a sample embedded anew."""

    count: int
    shared_with_live: int
    sampled: int
    least_cosine: float


def open_whole(store: ModelStore, model_id: str) -> StoredModel:
    """Verify a model and load all that serving would: session, calibration, embedding space.

    Raises ModelContractError when any of it must not be loaded.
    """
    model = store.open(model_id)
    session = InferenceSession(model, threads=1)
    _, height, width = model.manifest.input.input_size
    grey = np.full((1, height, width, 3), 128, np.uint8)
    Calibrator.from_model(model).classify(session.run(grey))
    EmbeddingSpace.from_model(model, model.manifest.live_space)
    return model


def prove_references(candidate: StoredModel, live: StoredModel, *, threads: int) -> ReferenceProof:
    """Embed a sample of the candidate's references anew, and compare with what it ships.

    Raises PromotionRefused when it has no references, shares the live model's space, or
    ships vectors that are not its own.
    """
    space, live_space = candidate.manifest.live_space, live.manifest.live_space
    if space.embedding_space == live_space.embedding_space:
        raise PromotionRefused(
            f"Both models name their space {space.embedding_space}: the candidate must have a space of its own."
        )
    bundle, live_bundle = read_bundle(candidate, space), read_bundle(live, live_space)
    if not bundle.images:
        raise PromotionRefused(
            f"{candidate.manifest.model_id} ships no references: "
            f"run `python -m data_jobs.references.bundle --model {candidate.manifest.model_id}`."
        )
    archive = isic_folder()
    rows = {row.isic_id: row for row in read_rows(archive)}
    there = [i for i, image in enumerate(bundle.images) if image.isic_id in rows]
    if not there:
        raise PromotionRefused(f"{archive} holds none of the references of {candidate.manifest.model_id}.")
    picked = there[:: max(1, len(there) // SAMPLED)][:SAMPLED]
    sample = [rows[bundle.images[i].isic_id] for i in picked]
    fresh = embed_rows(sample, archive, candidate, space, threads=threads)
    least = float((fresh * bundle.embeddings[picked]).sum(1).min())
    if not least >= LEAST_COSINE:
        raise PromotionRefused(
            f"The references of {candidate.manifest.model_id} are not embedded by this model: of {len(picked)} "
            f"embedded anew one differs (cosine {least:.4f}). Bundle them again."
        )
    live_ids = {image.isic_id for image in live_bundle.images}
    shared = sum(image.isic_id in live_ids for image in bundle.images)
    return ReferenceProof(len(bundle.images), shared, len(picked), least)


#: A candidate may find a tenth fewer references than the live model; fewer still is a loss for the clinician.
LEAST_REFERENCE_SHARE = 0.9


async def require_references(pool: Pool, candidate: StoredModel, answering: LiveModel) -> None:
    """Raise PromotionRefused when the candidate would find far fewer similar cases than the live model does."""
    references = ReferenceStore(pool)
    space = candidate.manifest.live_space
    there = await references.count(answering.embedding_space)
    coming = space.count
    if await _is_own(pool, candidate):
        coming = max(coming, await references.count(space.embedding_space))
    if coming < LEAST_REFERENCE_SHARE * there:
        raise PromotionRefused(
            f"{answering.embedding_space} has {there} references and {space.embedding_space} would have "
            f"{coming}: fill it first, with `derm-cds references embed`, or similar cases go missing."
        )


async def fill_space(pool: Pool, candidate: StoredModel) -> str:
    """Put the candidate's references beside those of the live model, whose space is not touched; says what is there.

    What another embedder, or nobody knows which, left in the space is replaced. A space that `derm-cds
    references embed` filled further than the bundle reaches, or is still filling, stays as that left it.
    """
    references, cache, space = ReferenceStore(pool), ReferenceCache(pool), candidate.manifest.live_space
    own = await _is_own(pool, candidate)
    there = await references.count(space.embedding_space)
    complete = {summary.embedding_space for summary in await cache.spaces() if summary.completed_at}
    if own and (there > space.count or space.embedding_space not in complete):
        return f"{space.embedding_space} holds {there} references"
    bundle = read_bundle(candidate, space)
    # Vectors first: a stop in between leaves a space that is still known as another's, and is filled again.
    await references.load(
        bundle.images, bundle.embeddings, embedding_space=space.embedding_space, replace=not own
    )
    if not own:
        await cache.reassign(identify_embedder(candidate, space), expected=space.count)
    return f"{len(bundle.images)} references loaded into {space.embedding_space}"


async def require_verified(pool: Pool, candidate: StoredModel) -> None:
    """Raise PromotionRefused, naming every failed check, unless the space passes what `references publish` asks."""
    space = candidate.manifest.live_space.embedding_space
    failed = [check for check in await verify_space(pool, candidate) if not check.passed]
    if failed:
        found = "; ".join(f"{check.name}: {check.found}" for check in failed)
        raise PromotionRefused(f"{space} must not answer. {found}.")


async def _is_own(pool: Pool, candidate: StoredModel) -> bool:
    """Whether the space is on record as filled by this very network, transform and preprocessing."""
    space = candidate.manifest.live_space
    known = await ReferenceCache(pool).embedder(space.embedding_space)
    return known is not None and known.digest == identify_embedder(candidate, space).digest
