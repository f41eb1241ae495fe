"""Lesions as they may be on record, drawn from a seed: every outcome, review, outcome of the lesion and erasure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from random import Random
from typing import Any
from uuid import UUID

from serve_app.domain.assessment import (
    CHECKLIST_REFERS,
    Assessment,
    Classification,
    Factor,
    OpenDemand,
    Outcome,
    Provenance,
    Quality,
    Reason,
    Risk,
    RiskLevel,
    Urgency,
)
from serve_app.domain.diagnosis import TRAINED, Diagnosis
from serve_app.domain.patient import AnatomSite
from serve_app.domain.review import (
    Decision,
    LesionOutcome,
    OutcomeKind,
    OutcomeSource,
    OverrideReason,
    RecordedImpression,
    Review,
)
from serve_app.keys.receipts import ErasureReason
from serve_app.records.lesion_rows import ErasureNote, ImageRecord, LesionTimeline

START = datetime(2026, 3, 1, 8, 30, 0, 250_000, tzinfo=UTC)
LOW = Reason("low_margin", "Two diagnoses are nearly as probable.", "Judge the lesion yourself.")
BLURRED = Reason("blurred", "The image is too blurred.", "Take it again, in focus.")
REFERS = Reason(
    CHECKLIST_REFERS, "The checklist demands a referral.", "Refer on the suspected-cancer pathway."
)


def within(part: Any) -> Iterator[dict[str, Any]]:
    """Every object in a resource, itself first."""
    if isinstance(part, dict):
        yield part
        part = list(part.values())
    if isinstance(part, list):
        for each in part:
            yield from within(each)


class History:
    """One lesion's; ids, times and findings follow from the seed."""

    def __init__(self, seed: int = 0) -> None:
        self.random = Random(seed)  # noqa: S311 - no secret

    def uuid(self) -> UUID:
        return UUID(int=self.random.getrandbits(128), version=4)

    def assessment(
        self,
        outcome: Outcome = Outcome.DECIDED,
        *,
        likeliest: Diagnosis = Diagnosis.NV,
        level: RiskLevel = RiskLevel.LOW,
        urgency: Urgency = Urgency.ROUTINE,
        model: str = "lite0.1",
        refers: bool = False,
    ) -> Assessment:
        """An answer, or for `refused` none; of that, `refers`: its checklist demands a referral."""
        shares = [self.random.random() for _ in Diagnosis]
        shares[list(Diagnosis).index(likeliest)] = 10.0
        probabilities = {each: share / sum(shares) for each, share in zip(Diagnosis, shares, strict=True)}
        known = outcome is not Outcome.REFUSED
        reasons = {Outcome.REVIEW: (LOW,), Outcome.REFUSED: (BLURRED, REFERS) if refers else (BLURRED,)}
        within = tuple(each for each in TRAINED if probabilities[each] > 0.1)
        factors = (Factor("melanoma", "demands", "Melanoma is plausible."),)
        return Assessment(
            outcome=outcome,
            reasons=reasons.get(outcome, ()),
            quality=Quality(120.5, 0.6, 0.2, 0.0, 0.0, 600, 450, known, 12.0, 0.1, 0.0),
            classification=Classification(probabilities, within, 0.95, 1.5) if known else None,
            risk=Risk(level, urgency, 0.4, factors, "2026-11.4") if known else None,
            neighbours=None,
            similar=(),
            change=None,
            provenance=Provenance(model, "ab" * 32, f"{model}.space", "3", "2026-11.4", "0.1.0"),
            embedding=None,
            timings_ms={"total": 500.0},
        )

    def image(self, days: float = 0, assessment: Assessment | None = None, **facts: Any) -> ImageRecord:
        """An image of so many days after the start; without an assessment it is pending unless `outcome` says else."""
        created_at = START + timedelta(days=days)
        outcome = facts.get("outcome", Outcome.PENDING if assessment is None else assessment.outcome)
        values: dict[str, Any] = {
            "lesion_id": UUID(int=0),
            "image_id": self.uuid(),
            "assessment_id": self.uuid(),
            "encounter_id": "e-1",
            "created_at": created_at,
            "content_type": "image/jpeg",
            "width": 600,
            "height": 450,
            "outcome": outcome,
            "assessment": assessment,
            "completed_at": None if outcome is Outcome.PENDING else created_at + timedelta(seconds=1),
            "anatom_site_general": AnatomSite.POSTERIOR_TORSO,
        }
        return ImageRecord(**values | facts)

    def failed(self, days: float = 0) -> ImageRecord:
        """One that can never be assessed."""
        return self.image(days, outcome=Outcome.FAILED, failure="undecodable_image")

    def erased(self, image: ImageRecord) -> ImageRecord:
        """The same, once its pixels are gone, and with them what was found."""
        receipt = ErasureNote(
            self.uuid(), image.created_at + timedelta(days=30), ErasureReason.PATIENT_REQUEST
        )
        outcome = Outcome.CANCELLED if image.outcome is Outcome.PENDING else Outcome.ERASED
        gone: dict[str, Any] = {"assessment": None, "failure": None, "anatom_site_general": None}
        return replace(image, outcome=outcome, erasure=receipt, **gone)

    def review(self, image: ImageRecord, decision: Decision | None = Decision.ACCEPT, **said: Any) -> Review:
        """A clinician's word, a day later; an accepted answer has the level and urgency that were demanded."""
        level, urgency = (image.assessment.demand if image.assessment else None) or (None, None)
        values: dict[str, Any] = {
            "review_id": self.uuid(),
            "assessment_id": image.assessment_id,
            "image_id": image.image_id,
            "clinician": "dr-7",
            "recorded_at": image.created_at + timedelta(days=1),
            "decision": decision,
            "reason": OverrideReason.CLINICAL_EXAMINATION if decision is Decision.OVERRIDE else None,
            "diagnosis": None,
            "level": level if decision else None,
            "urgency": urgency if decision else None,
            "referral_made": None,
            "follow_up_by": None,
            "note": None,
            "impression": None
            if decision
            else RecordedImpression(Diagnosis.NV, None, START, before_answer=True),
            "answers": (image.assessment_id,) if decision else (),
        }
        return Review(**values | said)

    def outcome(self, **said: Any) -> LesionOutcome:
        """What the lesion turned out to be."""
        values: dict[str, Any] = {
            "outcome_id": self.uuid(),
            "kind": OutcomeKind.HISTOLOGY,
            "diagnosis": Diagnosis.MEL,
            "malignant": True,
            "code": "8720/3",
            "code_system": "http://terminology.hl7.org/CodeSystem/icd-o-3",
            "observed_on": date(2026, 4, 1),
            "source": OutcomeSource.PATHOLOGY_REPORT,
            "image_id": None,
            "recorded_by": "dr-9",
            "recorded_at": datetime(2026, 4, 9, 7, tzinfo=UTC),
        }
        return LesionOutcome(**values | said)

    def timeline(
        self,
        *images: ImageRecord,
        outcomes: tuple[LesionOutcome, ...] = (),
        demanding: ImageRecord | None = None,
    ) -> LesionTimeline:
        """A lesion of these images, newest first; its open demand is that of `demanding`."""
        demand = None
        if demanding is not None and demanding.assessment and demanding.assessment.demand:
            level, urgency = demanding.assessment.demand
            ids = (demanding.image_id, demanding.assessment_id)
            demand = OpenDemand(level, urgency, *ids, demanding.created_at)
        lesion = self.uuid()
        filed = tuple(replace(image, lesion_id=lesion) for image in images)
        return LesionTimeline(lesion, "p-1", START, filed, demand, outcomes)

    def anything(self) -> LesionTimeline:
        """Whatever may be on record of a lesion of one to four images."""
        random, images = self.random, []
        for number in range(random.randint(1, 4)):
            images.insert(0, self._any_image(number))
        demanding = random.choice([None, *images])
        outcomes = tuple(self._any_outcome(images) for _ in range(random.choice((0, 0, 1, 2))))
        timeline = self.timeline(*images, outcomes=outcomes, demanding=demanding)
        # An erasure takes the answer, and neither the demand nor what a clinician said.
        gone = [self.erased(each) if random.random() < 0.25 else each for each in images]
        return replace(timeline, images=tuple(gone))

    def _any_image(self, number: int) -> ImageRecord:
        random = self.random
        facts = {
            "encounter_id": random.choice((None, "e-1", "E:2.b")),
            "content_type": random.choice(("image/jpeg", "image/png")),
            "anatom_site_general": random.choice((None, *AnatomSite)),
        }
        outcome = random.choice(
            (Outcome.DECIDED, Outcome.REVIEW, Outcome.REFUSED, Outcome.PENDING, Outcome.FAILED)
        )
        if outcome is Outcome.PENDING:
            return self.image(number * 40, **facts)
        if outcome is Outcome.FAILED:
            return replace(self.failed(number * 40), **facts)
        assessment = self.assessment(
            outcome,
            likeliest=random.choice(list(Diagnosis)),
            level=random.choice(list(RiskLevel)),
            urgency=random.choice(list(Urgency)),
            model=random.choice(("lite0.1", "b3.2")),
            refers=random.random() < 0.5,
        )
        image = self.image(number * 40, assessment, **facts)
        reviews = tuple(self._any_review(image) for _ in range(random.choice((0, 0, 1, 1, 2))))
        return replace(image, reviews=reviews)

    def _any_review(self, image: ImageRecord) -> Review:
        random = self.random
        decision = random.choice((None, *Decision))
        if decision is None:
            return self.review(image, None)
        said: dict[str, Any] = {
            "diagnosis": random.choice((None, *Diagnosis)),
            "referral_made": random.choice((None, True, False)),
            "follow_up_by": random.choice((None, date(2027, 1, 31))),
            "note": random.choice((None, "Mrs Example's mole")),
        }
        if decision is Decision.OVERRIDE:
            said |= {"level": random.choice((None, *RiskLevel)), "urgency": random.choice((None, *Urgency))}
            said["reason"] = random.choice(list(OverrideReason))
        return self.review(image, decision, **said)

    def _any_outcome(self, images: list[ImageRecord]) -> LesionOutcome:
        random = self.random
        diagnosis = random.choice((None, *Diagnosis))
        system = random.choice((None, "http://snomed.info/sct", "urn:oid:1.2.3", "not a URI"))
        return self.outcome(
            kind=random.choice(list(OutcomeKind)),
            diagnosis=diagnosis,
            malignant=random.choice((True, False) if diagnosis is None else (None, True, False)),
            code=system and random.choice(("8720/3", " two  words ", "93655004")),
            code_system=system,
            observed_on=date(2026, 3, 1) + timedelta(days=random.randint(0, 150)),
            source=random.choice(list(OutcomeSource)),
            image_id=random.choice((None, *(each.image_id for each in images))),
        )
