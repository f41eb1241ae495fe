"""A candidate before it may be compared: intact, loadable, with references of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_jobs.promotion.acceptance import ACCEPTANCE_NAME, parse_acceptance
from data_jobs.promotion.refusal import PromotionRefused
from data_jobs.references.bundle import embed_rows
from data_jobs.references.load import ReferenceBundle, read_bundle
from data_jobs.training.dataset import isic_folder, read_rows
from data_jobs.training.plans import AcceptancePlan
from deployments.classifier.calibration import Calibrator
from deployments.embedder.embedder import EmbeddingSpace
from model_store.registry import ModelStore, StoredModel
from model_store.session import InferenceSession

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
    logits, bottleneck = session.run(grey)
    Calibrator.from_model(model).classify(logits, bottleneck)
    EmbeddingSpace.from_model(model, model.manifest.live_space)
    return model


def read_plan(candidate: StoredModel, given: Path | None) -> AcceptancePlan:
    """Read the criteria that travel with the candidate; those `given` only for one that has none.

    Raises PromotionRefused when there are none, with which anything would pass, or when its own
    would be passed over.
    """
    model_id = candidate.manifest.model_id
    own = ACCEPTANCE_NAME in candidate.manifest.files
    if own and given is not None:
        raise PromotionRefused(
            f"{model_id} has its own acceptance criteria, agreed on before it was measured; {given} cannot replace "
            "them."
        )
    if not own and given is None:
        raise PromotionRefused(
            f"{model_id} comes without acceptance criteria: give a recipe that has an [acceptance] table, with "
            "--acceptance."
        )
    path = given or candidate.path(ACCEPTANCE_NAME)
    return parse_acceptance(path.read_text(encoding="utf-8"), path)


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
    sampled, least = _embed_again(candidate, bundle, threads)
    if not least >= LEAST_COSINE:
        raise PromotionRefused(
            f"The references of {candidate.manifest.model_id} are not embedded by this model: of {sampled} "
            f"embedded anew one differs (cosine {least:.4f}). Bundle them again."
        )
    live_ids = {image.isic_id for image in live_bundle.images}
    shared = sum(image.isic_id in live_ids for image in bundle.images)
    return ReferenceProof(len(bundle.images), shared, sampled, least)


def _embed_again(candidate: StoredModel, bundle: ReferenceBundle, threads: int) -> tuple[int, float]:
    archive = isic_folder()
    rows = {row.isic_id: row for row in read_rows(archive)}
    there = [i for i, image in enumerate(bundle.images) if image.isic_id in rows]
    if not there:
        raise PromotionRefused(f"{archive} holds none of the references of {candidate.manifest.model_id}.")
    picked = there[:: max(1, len(there) // SAMPLED)][:SAMPLED]
    fresh = embed_rows(
        [rows[bundle.images[i].isic_id] for i in picked],
        archive,
        candidate,
        candidate.manifest.live_space,
        threads=threads,
    )
    return len(picked), float((fresh * bundle.embeddings[picked]).sum(1).min())
