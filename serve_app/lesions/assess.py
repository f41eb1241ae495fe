"""One image through the stages: what is asked of each, and what is found, in the order it is found.

And a search with an image that was assessed: nothing is concluded from it and nothing is stored, so it may be
limited in any way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from deployments.classifier.classifier import ClassifierOutput
from deployments.preprocess.preprocess import PreparedImage
from deployments.risk.rules import Findings
from serve_app.domain.assessment import (
    EVERY_REFERENCE,
    WEIGHED,
    Assessment,
    Change,
    Conclusion,
    Neighbours,
    Outcome,
    Provenance,
    ReferenceFilter,
    SimilarCase,
    format_time,
)
from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.errors import (
    AssessmentPending,
    NoEmbedding,
    NotFound,
    ReferencesDropped,
    RejectedUpload,
    StageFailed,
)
from serve_app.records.lesion_rows import AdmittedImage, PreviousAssessment, RecordedCase
from serve_app.records.lesions import LesionStore
from serve_app.records.references import ReferenceStore
from serve_app.records.serving import LiveModel

#: How long the stages may take, seconds; for an upload from T1 on. A later answer finds nobody waiting.
DEADLINE_S = 15.0


class Stages(Protocol):
    """The way of one lesion, a method a stage: on Ray Serve a deployment, in tests a plain function of this process.

    Every method raises Overloaded when its stage refused the work, and StageFailed when it did not answer.
    """

    async def warm(self, models: Sequence[LiveModel]) -> Sequence[Mapping[str, str]]:
        """Have every replica of every stage load these models, and keep them until others are named.

        Returns what each replica has in memory, digests by model id; a stage that holds no models gives none.
        Raises StageFailed when one cannot, or takes too long.
        """

    async def prepare(self, model_id: str, data: bytes) -> PreparedImage | RejectedUpload:
        """Uploaded bytes to pixels at the model's input size."""

    async def classify(self, model_id: str, pixels: NDArray[np.uint8]) -> ClassifierOutput:
        """Pixels, uint8 H×W×3, to probabilities and bottleneck."""

    async def embed(
        self, model_id: str, embedding_space: str, bottleneck: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Bottleneck (512) to a unit vector (512) of one embedding space."""

    async def nearest(
        self, embedding: NDArray[np.float32], embedding_space: str, k: int, reference_filter: ReferenceFilter
    ) -> Neighbours:
        """A unit vector to the nearest references of its space, among those that pass the filter."""

    async def conclude(self, model: LiveModel, findings: Findings) -> Conclusion:
        """Everything found to outcome, risk and urgency."""


class Timings(dict[str, float]):
    """Milliseconds of each stage as the interface waited for it, hops included."""

    def __init__(self) -> None:
        super().__init__()
        self._started = perf_counter()

    @contextmanager
    def lap(self, stage: str) -> Iterator[None]:
        """Add how long this takes to a stage's time."""
        since = perf_counter()
        yield
        self[stage] = round(self.get(stage, 0.0) + (perf_counter() - since) * 1000.0, 2)

    def stop(self) -> None:
        """Note the whole time up to now."""
        self["total"] = round((perf_counter() - self._started) * 1000.0, 2)


@dataclass(slots=True)
class Examination:
    """An accepted image with the classifier already at work on it, on one model from end to end."""

    live: LiveModel
    prepared: PreparedImage
    classifying: asyncio.Task[ClassifierOutput]
    timings: Timings

    async def discard(self) -> None:
        """End the classifier's work if it is still wanted by nobody."""
        self.classifying.cancel()
        # Gathered, so that a failure that nobody will look at is not reported as one.
        await asyncio.gather(self.classifying, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class Assessor:
    """Runs the stages; stores nothing."""

    stages: Stages
    service_version: str

    async def examine(self, image: bytes, live: LiveModel) -> Examination:
        """Prepare an image and start classifying it; RejectedUpload for one that this service does not take."""
        timings = Timings()
        with timings.lap("preprocess"):
            prepared = await self.stages.prepare(live.model_id, image)
        if isinstance(prepared, RejectedUpload):
            raise prepared
        classifying = asyncio.create_task(self._classify(live.model_id, prepared.pixels, timings))
        return Examination(live, prepared, classifying, timings)

    async def _classify(self, model_id: str, pixels: NDArray[np.uint8], timings: Timings) -> ClassifierOutput:
        with timings.lap("classifier"):
            return await self.stages.classify(model_id, pixels)

    async def assess(
        self,
        examination: Examination,
        case: AdmittedImage | RecordedCase,
        *,
        previous: PreviousAssessment | None,
        recorded: Neighbours | None = None,
    ) -> Assessment:
        """Wait for the classifier, and conclude from everything.

        With `recorded` neighbours the conclusion is drawn from them, not from those found now:
        a replay must not depend on which references came or went since.
        Raises StageFailed when a stage does not answer, or the classifier ran another model
        than the published one; Overloaded when a stage refused the work.
        """
        live, prepared, timings = examination.live, examination.prepared, examination.timings
        output = await examination.classifying
        if output.model_digest != live.model_digest:
            raise StageFailed("The classifier's model is not the one that was published.")
        space = live.embedding_space
        with timings.lap("embedder"):
            embedding = await self.stages.embed(live.model_id, space, output.bottleneck)
        with timings.lap("retriever"):
            neighbours, similar = await self._search(embedding, space, case)
        change = None if previous is None else _compare(previous, output, embedding)
        findings = Findings(
            quality=prepared.quality,
            width=prepared.width,
            height=prepared.height,
            classification=output.classification,
            neighbours=recorded or neighbours,
            context=case.context,
            change=change,
            compared_level=previous.level if previous else None,
        )
        with timings.lap("risk"):
            conclusion = await self.stages.conclude(live, findings)
        timings.stop()
        answered = conclusion.outcome is not Outcome.REFUSED
        return Assessment(
            outcome=conclusion.outcome,
            reasons=conclusion.reasons,
            quality=conclusion.quality,
            classification=output.classification if answered else None,
            risk=conclusion.risk if answered else None,
            neighbours=neighbours if answered else None,
            similar=similar if answered else (),
            change=change if answered else None,
            provenance=Provenance(
                model_id=output.model_id,
                model_digest=output.model_digest,
                embedding_space=space,
                preprocess_version=prepared.preprocess_version,
                policy_version=conclusion.policy_version,
                service_version=self.service_version,
            ),
            embedding=embedding if answered else None,
            timings_ms=timings,
        )

    async def _search(
        self, embedding: NDArray[np.float32], space: str, case: AdmittedImage | RecordedCase
    ) -> tuple[Neighbours, tuple[SimilarCase, ...]]:
        """Find the neighbours to weigh, and the similar cases to show: no conclusion depends on those."""
        weigh = self.stages.nearest(embedding, space, WEIGHED, EVERY_REFERENCE)
        if case.top_k <= WEIGHED and not case.reference_filter:
            weighed = await weigh
            return weighed, weighed.similar[: case.top_k]
        # Two searches: one for more than WEIGHED may walk an index further, and find others among the nearest.
        weighed, shown = await asyncio.gather(
            weigh, self.stages.nearest(embedding, space, case.top_k, case.reference_filter)
        )
        return weighed, shown.similar


def _compare(
    previous: PreviousAssessment, output: ClassifierOutput, embedding: NDArray[np.float32]
) -> Change:
    """What moved since the last visit; similarity is a cosine, both vectors being unit."""
    now, then = _melanoma(output.classification.probabilities), _melanoma(previous.probabilities)
    return Change(
        since=format_time(previous.created_at),
        compared_image_id=str(previous.image_id),
        similarity=None if previous.embedding is None else float(previous.embedding @ embedding),
        melanoma_probability_delta=now - then,
    )


def _melanoma(probabilities: Mapping[Diagnosis, float]) -> float:
    """p(MEL) among the known eight: more doubt in one of two images must not hide a rise."""
    known = 1.0 - probabilities[Diagnosis.UNK]
    return probabilities[Diagnosis.MEL] / known if known > 0.0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Searcher:
    """Searches with the embeddings on record; they are patients' data, so access is decided before."""

    stages: Stages
    records: LesionStore
    references: ReferenceStore

    async def search(
        self, lesion_id: UUID, image_id: UUID, *, k: int, reference_filter: ReferenceFilter
    ) -> tuple[str, Neighbours]:
        """Find the space that an image was assessed in, and the K references there that are most similar.

        NotFound when the lesion has no such image, Erased when it had; AssessmentPending, or NoEmbedding
        where its assessment left none; ReferencesDropped when nothing is left of the space that it was
        assessed in. StageFailed when the search takes longer than an upload may; Overloaded, RecordsUnavailable.
        """
        image = await self.records.image_embedding(lesion_id, image_id)
        if image is None:
            raise NotFound
        if image.outcome is Outcome.PENDING:
            raise AssessmentPending
        if image.embedding is None or image.embedding_space is None:
            raise NoEmbedding
        space = image.embedding_space
        try:
            async with asyncio.timeout(DEADLINE_S):
                neighbours = await self.stages.nearest(image.embedding, space, k, reference_filter)
        except TimeoutError as error:
            raise StageFailed("The search took too long; try again.") from error
        # Asked afterwards, and only where it matters: a space may be dropped while it is searched.
        if not neighbours.similar and not await self.references.count(space):
            raise ReferencesDropped
        return space, neighbours
