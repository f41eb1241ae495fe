"""A past answer made again, and compared with its record: which fields differ, and by how much."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal
from uuid import UUID

from deployments.risk.policy import site_mark
from model_store.registry import ModelStore
from serve_app.domain.assessment import Assessment, Id, Outcome, Provenance, Shape, one_of
from serve_app.domain.errors import Erased, ModelContractError, RejectedUpload, StageFailed
from serve_app.keys.keystore import KeyStore
from serve_app.lesions.assess import DEADLINE_S, Assessor
from serve_app.lesions.triage import read_original
from serve_app.records.answers import Document
from serve_app.records.lesion_rows import PreviousAssessment, RecordedCase
from serve_app.records.lesions import LesionStore
from serve_app.records.pool import Pool
from serve_app.records.serving import LiveModel, operating_points_then

#: What the service promises of a probability: the same image, model and versions again.
TOLERANCE = 1e-6
#: The score is rounded to four places: a difference within TOLERANCE can move the last one.
SCORE_TOLERANCE = 1e-4

Value = str | float | list[str] | None


class Verdict(StrEnum):
    """What came of replaying an assessment."""

    IDENTICAL = "identical"
    WITHIN_TOLERANCE = "within_tolerance"
    DIFFERS = "differs"
    CANNOT = "cannot"


@dataclass(frozen=True, slots=True)
class Difference(Shape):
    """One field that did not come out as recorded; null where one side has no such field."""

    field: str
    recorded: Value
    recomputed: Value

    @property
    def tolerable(self) -> bool:
        """Whether both are numbers, and as good as the same."""
        if not (isinstance(self.recorded, float) and isinstance(self.recomputed, float)):
            return False
        most = SCORE_TOLERANCE if self.field == "risk.score" else TOLERANCE
        # Rounded: 0.5001 - 0.5 is not quite 0.0001.
        return round(abs(self.recorded - self.recomputed), 9) <= most


def compare(recorded: Assessment, recomputed: Assessment) -> tuple[Verdict, tuple[Difference, ...]]:
    """Hold an answer against its record: all but messages, timings, quality measures and references."""
    then, now = _fields(recorded), _fields(recomputed)
    differences = tuple(
        Difference(field, then.get(field), now.get(field))
        for field in {**then, **now}
        if then.get(field) != now.get(field)
    )
    if not differences:
        return Verdict.IDENTICAL, ()
    tolerable = all(difference.tolerable for difference in differences)
    return Verdict.WITHIN_TOLERANCE if tolerable else Verdict.DIFFERS, differences


def same_references(recorded: Assessment, found: Assessment) -> bool:
    """Whether the same references were found, in the same order and as similar, if both answers show any.

    A record from before what is weighed was apart from what is shown holds the latter alone: only that is compared.
    """
    if recorded.neighbours is None or found.neighbours is None:
        return True
    then, now = list(recorded.similar), list(found.similar)
    if recorded.similar != recorded.neighbours.similar:
        then += recorded.neighbours.cases
        now += found.neighbours.cases
    return len(then) == len(now) and all(
        a.isic_id == b.isic_id and abs(a.similarity - b.similarity) <= TOLERANCE
        for a, b in zip(then, now, strict=True)
    )


def _fields(assessment: Assessment) -> dict[str, Value]:
    fields: dict[str, Value] = {
        "outcome": assessment.outcome,
        "reasons": [reason.code for reason in assessment.reasons],
    }
    if (classification := assessment.classification) is not None:
        for diagnosis, probability in classification.probabilities.items():
            fields[f"probabilities.{diagnosis}"] = probability
        fields["prediction_set"] = list(classification.prediction_set)
    if (risk := assessment.risk) is not None:
        fields |= {f"risk.{name}": getattr(risk, name) for name in ("level", "urgency", "score")}
        fields["risk.factors"] = [f"{factor.code}: {factor.effect}" for factor in risk.factors]
    if (change := assessment.change) is not None:
        compared = ("compared_image_id", "similarity", "melanoma_probability_delta")
        fields |= {f"change.{name}": getattr(change, name) for name in compared}
    return fields


class Cause(StrEnum):
    """Why an assessment cannot be replayed; each has its message in MESSAGES."""

    ASSESSMENT_PENDING = "assessment_pending"
    ASSESSMENT_FAILED = "assessment_failed"
    IMAGE_ERASED = "image_erased"
    MODEL_GONE = "model_gone"
    MODEL_CHANGED = "model_changed"
    IMAGE_REJECTED = "image_rejected"
    PREPROCESS_CHANGED = "preprocess_changed"
    COMPARED_IMAGE_GONE = "compared_image_gone"
    POLICY_CHANGED = "policy_changed"


MESSAGES = {
    Cause.ASSESSMENT_PENDING: "The assessment has not finished: there is no answer to make again.",
    Cause.ASSESSMENT_FAILED: "The image could not be assessed: there is no answer to make again.",
    Cause.IMAGE_ERASED: "The image was erased, and what was found on it, too.",
    Cause.MODEL_GONE: "The model that answered is no longer in the model store.",
    Cause.MODEL_CHANGED: "The model store holds another model under the id of the one that answered.",
    Cause.IMAGE_REJECTED: "The image is outside the limits that this service has today.",
    Cause.PREPROCESS_CHANGED: "Images are prepared by another version than the one that answered.",
    Cause.COMPARED_IMAGE_GONE: "The earlier image that this one was compared with is no longer on record.",
    Cause.POLICY_CHANGED: "The risk policy in force is another than the one that answered.",
}

_NO_ANSWER = {
    Outcome.PENDING: Cause.ASSESSMENT_PENDING,
    Outcome.FAILED: Cause.ASSESSMENT_FAILED,
    Outcome.CANCELLED: Cause.IMAGE_ERASED,
    Outcome.ERASED: Cause.IMAGE_ERASED,
}


class ReplayCauseDocument(Document):
    """Why an assessment could not be replayed; `code` is stable, `message` is for people."""

    code: Annotated[Cause, one_of(Cause, "Code")]
    message: str


class ReplayToleranceDocument(Document):
    """How far two numbers may be apart and still count as the same, absolutely; the score is rounded."""

    probability: float
    score: float


class ReplayNoteDocument(Document):
    """Something that is other than then without being a difference of the answer."""

    field: Literal["similar"]
    code: Literal["references_changed"]
    message: str


class ReplayProvenanceDocument(Document):
    """What made the recorded answer, and the one made again; null where there is none."""

    recorded: Provenance | None
    current: Provenance | None


class ReplayDocument(Document):
    """A past answer, made again: `cannot` has a cause, `within_tolerance` and `differs` have differences."""

    assessment_id: Id
    verdict: Annotated[Verdict, one_of(Verdict, "Verdict")]
    cause: ReplayCauseDocument | None
    tolerance: ReplayToleranceDocument
    differences: list[Difference]
    notes: list[ReplayNoteDocument]
    provenance: ReplayProvenanceDocument


_REFERENCES_CHANGED = ReplayNoteDocument(
    field="similar",
    code="references_changed",
    message="The most similar references are others than then; the risk was drawn from the recorded ones.",
)


class _CannotError(Exception):
    """Ends a replay; `difference` is the version that stands in the way, then and now, where one does."""

    def __init__(
        self, cause: Cause, difference: Difference | None = None, current: Provenance | None = None
    ) -> None:
        super().__init__(cause)
        self.cause, self.difference, self.current = cause, difference, current


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayer:
    """Makes recorded answers again."""

    assessor: Assessor
    pool: Pool
    records: LesionStore
    keys: KeyStore
    models: Path

    async def replay(self, case: RecordedCase) -> ReplayDocument:
        """Make one answer again and compare.

        Raises StageFailed when that takes longer than an upload may, or a stage fails;
        Overloaded, RecordsUnavailable, IntegrityError; NotFound when the image is gone.
        """
        recorded = case.assessment
        if recorded is None:
            return _document(case, Verdict.CANNOT, cause=_NO_ANSWER[case.outcome])
        try:
            async with asyncio.timeout(DEADLINE_S):
                again = await self._again(case, recorded)
        except _CannotError as cannot:
            differences = [cannot.difference] if cannot.difference else []
            return _document(case, Verdict.CANNOT, differences, cannot.current, cause=cannot.cause)
        except TimeoutError as error:
            raise StageFailed("The replay took too long; nothing was stored, try again.") from error
        notes = [] if same_references(recorded, again) else [_REFERENCES_CHANGED]
        return _document(case, *compare(recorded, again), again.provenance, notes=notes)

    async def _again(self, case: RecordedCase, recorded: Assessment) -> Assessment:
        then = recorded.provenance
        # First, because a stage on another node can only say that it failed, not why.
        await asyncio.to_thread(self._require_model, then)
        previous = await self._previous(case, recorded)
        points = await self._operating_points(then)
        model = LiveModel(then.model_id, then.model_digest, then.embedding_space, points)
        try:
            image, _ = await read_original(self.records, self.keys, case.lesion_id, case.image_id)
            examination = await self.assessor.examine(image, model)
        except Erased as erased:  # a moment ago
            raise _CannotError(Cause.IMAGE_ERASED) from erased
        except RejectedUpload as rejection:
            difference = Difference("rejection", None, rejection.code)
            raise _CannotError(Cause.IMAGE_REJECTED, difference) from rejection
        try:
            prepared = examination.prepared.preprocess_version
            _require(Cause.PREPROCESS_CHANGED, "preprocess_version", then, prepared)
            # A classifier that has run for long may hold another model than the store does now.
            digest = (await examination.classifying).model_digest
            _require(Cause.MODEL_CHANGED, "model_digest", then, digest)
            again = await self.assessor.assess(
                examination, case, previous=previous, recorded=recorded.neighbours
            )
        finally:
            await examination.discard()
        policy = again.provenance.policy_version
        _require(Cause.POLICY_CHANGED, "policy_version", then, policy, current=again.provenance)
        return again

    def _require_model(self, then: Provenance) -> None:
        # A store of its own: one that verified the model earlier would not look again.
        store = ModelStore(self.models)
        there = then.model_id in set(store)
        _require(Cause.MODEL_GONE, "model_id", then, then.model_id if there else None)
        try:
            digest: str | None = store.open(then.model_id).digest
        except ModelContractError:
            digest = None
        _require(Cause.MODEL_CHANGED, "model_digest", then, digest)

    async def _operating_points(self, then: Provenance) -> Mapping[str, float]:
        """What the site had set when it was answered, found by the mark in the policy's version."""
        ever = await operating_points_then(self.pool, then.model_id, then.model_digest)
        return next((points for points in ever if then.policy_version.endswith(site_mark(points))), {})

    async def _previous(self, case: RecordedCase, recorded: Assessment) -> PreviousAssessment | None:
        """The very image that it was compared with then: a newer one may have been finished since."""
        change = recorded.change
        if change is None:
            return None
        compared, space = change.compared_image_id, recorded.provenance.embedding_space
        previous = await self.records.compared(case.lesion_id, UUID(compared), embedding_space=space)
        if previous is None or (previous.embedding is None and change.similarity is not None):
            difference = Difference("change.compared_image_id", compared, None)
            raise _CannotError(Cause.COMPARED_IMAGE_GONE, difference)
        return previous


def _require(
    cause: Cause, version: str, then: Provenance, now: str | None, *, current: Provenance | None = None
) -> None:
    """Refuse to replay with another version of something than the one that answered."""
    recorded: str = getattr(then, version)
    if now != recorded:
        raise _CannotError(cause, Difference(f"provenance.{version}", recorded, now), current)


def _document(
    case: RecordedCase,
    verdict: Verdict,
    differences: Sequence[Difference] = (),
    current: Provenance | None = None,
    *,
    cause: Cause | None = None,
    notes: Sequence[ReplayNoteDocument] = (),
) -> ReplayDocument:
    recorded = case.assessment.provenance if case.assessment else None
    return ReplayDocument(
        assessment_id=case.assessment_id,
        verdict=verdict,
        cause=ReplayCauseDocument(code=cause, message=MESSAGES[cause]) if cause else None,
        tolerance=ReplayToleranceDocument(probability=TOLERANCE, score=SCORE_TOLERANCE),
        differences=list(differences),
        notes=list(notes),
        provenance=ReplayProvenanceDocument(recorded=recorded, current=current),
    )
