"""The space a candidate will answer in: enough references, all of them its own, checked as any space that goes live."""

from __future__ import annotations

from data_jobs.promotion.refusal import PromotionRefused
from data_jobs.references.embedder import identify_embedder
from data_jobs.references.load import read_bundle
from data_jobs.references.verify import verify_space
from model_store.registry import StoredModel
from serve_app.records.pool import Pool
from serve_app.records.reference_cache import ReferenceCache
from serve_app.records.references import ReferenceStore
from serve_app.records.serving import LiveModel

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
    if own and (there > space.count or not await _is_complete(cache, space.embedding_space)):
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


async def _is_complete(cache: ReferenceCache, embedding_space: str) -> bool:
    return any(
        summary.completed_at is not None
        for summary in await cache.spaces()
        if summary.embedding_space == embedding_space
    )
