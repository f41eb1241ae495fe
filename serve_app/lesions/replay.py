"""A past answer made again, and compared with its record: which fields differ, and by how much."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from uuid import UUID

from model_store.registry import ModelStore
from serve_app.domain.assessment import Assessment, Outcome, Provenance, Shape
from serve_app.domain.errors import Erased, ModelContractError, NotFound, RejectedUpload, StageFailed
from serve_app.keys.envelope import ImageBinding
from serve_app.keys.keystore import KeyStore
from serve_app.lesions.assess import Assessor, Examination
from serve_app.lesions.triage import DEADLINE_S
from serve_app.records.lesion_rows import PreviousAssessment, RecordedCase
from serve_app.records.lesions import LesionStore
from serve_app.records.serving import LiveModel

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
        fields["risk.level"] = risk.level
        fields["risk.urgency"] = risk.urgency
        fields["risk.score"] = risk.score
        fields["risk.factors"] = [f"{factor.code}: {factor.effect}" for factor in risk.factors]
    if (change := assessment.change) is not None:
        fields["change.compared_image_id"] = change.compared_image_id
        fields["change.similarity"] = change.similarity
        fields["change.melanoma_probability_delta"] = change.melanoma_probability_delta
    return fields


class Cause(StrEnum):
    """Why an assessment cannot be replayed."""

    ASSESSMENT_PENDING = "assessment_pending"
    ASSESSMENT_FAILED = "assessment_failed"
    IMAGE_ERASED = "image_erased"
    MODEL_GONE = "model_gone"
    MODEL_CHANGED = "model_changed"
    IMAGE_REJECTED = "image_rejected"
    PREPROCESS_CHANGED = "preprocess_changed"
    COMPARED_IMAGE_GONE = "compared_image_gone"
    POLICY_CHANGED = "policy_changed"

    @property
    def message(self) -> str:
        """The cause in plain words."""
        return _MESSAGES[self]


_MESSAGES = {
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


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of it; `current` is what made the answer again, None when none was made."""

    verdict: Verdict
    recorded: Provenance | None
    current: Provenance | None = None
    cause: Cause | None = None
    differences: tuple[Difference, ...] = ()
    references_changed: bool = False


class _CannotError(Exception):
    """Ends a replay; `difference` is the version that stands in the way, then and now, where one does."""

    def __init__(self, cause: Cause, *difference: Value, current: Provenance | None = None) -> None:
        super().__init__(cause)
        self.cause, self.current = cause, current
        self.differences = (Difference(str(difference[0]), *difference[1:]),) if difference else ()


class Replayer:
    """Makes recorded answers again."""

    def __init__(self, *, assessor: Assessor, records: LesionStore, keys: KeyStore, models: Path) -> None:
        self._assessor = assessor
        self._records = records
        self._keys = keys
        self._models = models

    async def replay(self, case: RecordedCase) -> Replayed:
        """Make one answer again and compare.

        Raises StageFailed when that takes longer than an upload may, or a stage fails;
        Overloaded, RecordsUnavailable, IntegrityError; NotFound when the image is gone.
        """
        if case.assessment is None:
            return Replayed(Verdict.CANNOT, None, cause=_NO_ANSWER[case.outcome])
        recorded = case.assessment
        try:
            async with asyncio.timeout(DEADLINE_S):
                again = await self._again(case, recorded)
        except _CannotError as cannot:
            return Replayed(
                Verdict.CANNOT, recorded.provenance, cannot.current, cannot.cause, cannot.differences
            )
        except TimeoutError as error:
            raise StageFailed("The replay took too long; nothing was stored, try again.") from error
        verdict, differences = compare(recorded, again)
        return Replayed(
            verdict,
            recorded.provenance,
            again.provenance,
            differences=differences,
            references_changed=not same_references(recorded, again),
        )

    async def _again(self, case: RecordedCase, recorded: Assessment) -> Assessment:
        versions = recorded.provenance
        # First, because a stage on another node can only say that it failed, not why.
        await asyncio.to_thread(self._require_model, versions)
        previous = await self._previous(case, recorded)
        model = LiveModel(versions.model_id, versions.model_digest, versions.embedding_space)
        try:
            examination = await self._assessor.examine(await self._image(case), model)
        except Erased as erased:  # a moment ago
            raise _CannotError(Cause.IMAGE_ERASED) from erased
        except RejectedUpload as rejection:
            raise _CannotError(Cause.IMAGE_REJECTED, "rejection", None, rejection.code) from rejection
        try:
            await _require_versions(examination, versions)
            again = await self._assessor.assess(
                examination,
                context=case.context,
                top_k=case.top_k,
                reference_filter=case.reference_filter,
                previous=previous,
                recorded=recorded.neighbours,
            )
        finally:
            await examination.discard()
        policies = (versions.policy_version, again.provenance.policy_version)
        if len(set(policies)) > 1:
            raise _CannotError(
                Cause.POLICY_CHANGED, "provenance.policy_version", *policies, current=again.provenance
            )
        return again

    def _require_model(self, recorded: Provenance) -> None:
        # A store of its own: one that verified the model earlier would not look again.
        store = ModelStore(self._models)
        if recorded.model_id not in set(store):
            raise _CannotError(Cause.MODEL_GONE, "provenance.model_id", recorded.model_id, None)
        try:
            digest: str | None = store.open(recorded.model_id).digest
        except ModelContractError:
            digest = None
        _require_digest(recorded, digest)

    async def _previous(self, case: RecordedCase, recorded: Assessment) -> PreviousAssessment | None:
        """The very image that it was compared with then: a newer one may have been finished since."""
        change = recorded.change
        if change is None:
            return None
        previous = await self._records.compared(
            case.lesion_id,
            UUID(change.compared_image_id),
            embedding_space=recorded.provenance.embedding_space,
        )
        if previous is None or (previous.embedding is None and change.similarity is not None):
            compared = change.compared_image_id
            raise _CannotError(Cause.COMPARED_IMAGE_GONE, "change.compared_image_id", compared, None)
        return previous

    async def _image(self, case: RecordedCase) -> bytes:
        found = await self._records.sealed_image(case.lesion_id, case.image_id)
        if found is None:
            raise NotFound
        binding = ImageBinding(case.image_id, found.patient_id, found.content_type)
        return await asyncio.to_thread(self._keys.open_image, found.sealed, binding)


async def _require_versions(examination: Examination, recorded: Provenance) -> None:
    versions = (recorded.preprocess_version, examination.prepared.preprocess_version)
    if len(set(versions)) > 1:
        raise _CannotError(Cause.PREPROCESS_CHANGED, "provenance.preprocess_version", *versions)
    # A classifier that has run for long may hold another model than the store does now.
    _require_digest(recorded, (await examination.classifying).model_digest)


def _require_digest(recorded: Provenance, digest: str | None) -> None:
    if digest != recorded.model_digest:
        raise _CannotError(Cause.MODEL_CHANGED, "provenance.model_digest", recorded.model_digest, digest)
