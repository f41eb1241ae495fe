"""The published tables of `summary` and `performance`: shapes, words, and the one way from counts to a share.

A count is null where it is hidden (suppression.py), and so is every share that it would give away.
docs/reports.md defines each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Annotated

from pydantic import Field

from serve_app.domain.assessment import Id, Shape, Share, Time

#: None where it is hidden.
Count = Annotated[int, Field(ge=0)] | None
Counts = Mapping[str, Count]

UNKNOWN = "unknown"
#: What a lesion turned out to be.
TRUTHS = ("melanoma", "other_malignant", "benign", UNKNOWN)
MALIGNANT = TRUTHS[:2]


@dataclass(frozen=True, slots=True)
class Proportion(Shape):
    """A share of `n`, with its 95 % interval (Wilson 1927)."""

    value: Share
    n: int
    lower: Share
    upper: Share


def proportion(part: Count, n: Count) -> Proportion | None:
    """Make a share of counts; None where one is hidden, or there is nothing to divide.

    Wilson's score interval, JASA 22:209 (1927), without continuity correction: close to its level for any share
    and small n, where the textbook's interval fails (Brown, Cai and DasGupta, Statistical Science 16:101, 2001).
    """
    if part is None or not n:
        return None
    share, z = part / n, 1.959963984540054
    middle = share + z * z / (2 * n)
    half = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    lower, upper = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    lower, upper = 0.0 if part == 0 else lower, 1.0 if part == n else upper
    return Proportion(round(share, 6), n, round(lower, 6), round(upper, 6))


@dataclass(frozen=True, slots=True)
class TimeToAnswer(Shape):
    """Seconds within which half and 95 % of the answers were there, to the next edge of a histogram; null for few."""

    p50_at_most: float | None
    p95_at_most: float | None


@dataclass(frozen=True, slots=True)
class Adoption(Shape):
    """Of the encounters with a skin complaint, how many had an image assessed; null where the PMS does not tell."""

    skin_complaint_encounters: Count
    assessed_encounters: Count
    share: Proportion | None
    told_by_pms: bool


@dataclass(frozen=True, slots=True)
class Summary(Shape):
    """What was done in one month.

    `assessments` by outcome when they ended; `diagnoses`, `levels` and `urgencies` of those that were answered, the
    diagnosis being the most probable one. `decisions` and `lesion_outcomes` as they were recorded in the month.
    """

    assessments: Counts
    diagnoses: Counts
    levels: Counts
    urgencies: Counts
    time_to_answer_s: TimeToAnswer
    decisions: Counts
    override_reasons: Counts
    lesion_outcomes: Mapping[str, Counts]
    adoption: Adoption


@dataclass(frozen=True, slots=True)
class Detection(Shape):
    """Of `n` lesions that turned out to be this, how many the service refers: level high or urgency urgent.

    `at_least`, where the sensitivity is hidden because 1 to 4 were missed, or 1 to 4 more than were last shown: what it
    is if it was 4.
    """

    n: Count
    referred: Count
    missed: Count
    sensitivity: Proportion | None
    at_least: Share | None


@dataclass(frozen=True, slots=True)
class Benign(Shape):
    """Of `n` lesions that turned out to be benign, how many the service refers."""

    n: Count
    referred: Count
    not_referred: Count
    specificity: Proportion | None


@dataclass(frozen=True, slots=True)
class Accuracy(Shape):
    """What became of the lesions of one group (of all: null), each counted once, by the model's first answer to it.

    `share_with_outcome` stands beside every figure: all of them are of these lesions alone. Of the others nothing is
    known, and they are not benign. `positive_predictive_value`: of the referred with an outcome, the share of malignant.
    """

    group: str | None
    lesions: Count
    with_outcome: Count
    share_with_outcome: Share | None
    melanoma: Detection
    other_malignant: Detection
    malignant: Detection
    benign: Benign
    positive_predictive_value: Proportion | None


@dataclass(frozen=True, slots=True)
class Intention(Shape):
    """Lesions for which clinicians said before the answer whether they would refer (`intended`), beside the service's word."""

    intended: str
    lesions: Count
    service_refers: Count
    service_does_not_refer: Count


@dataclass(frozen=True, slots=True)
class LowRisk(Shape):
    """Lesions of level `low` that the clinician had intended to refer: whether the referral was made after all.

    `avoided`: the share of not made among those of which that is known; of these, `avoided_malignant` turned out to be
    malignant, of `avoided_with_outcome` with a known outcome.
    """

    intended: Count
    made: Count
    not_made: Count
    not_known: Count
    avoided: Proportion | None
    avoided_with_outcome: Count
    avoided_malignant: Count


@dataclass(frozen=True, slots=True)
class ModelPerformance(Shape):
    """One model version against what became of the lesions, and against what clinicians intended."""

    model_id: str
    all: Accuracy
    by_site: list[Accuracy]
    by_age_band: list[Accuracy]
    by_skin_type: list[Accuracy]
    against_intention: list[Intention]
    low_risk_referrals: LowRisk


@dataclass(frozen=True, slots=True)
class Performance(Shape):
    """Every model version over all its lesions up to the end of the month, with the outcomes known when it was made."""

    models: list[ModelPerformance]


@dataclass(frozen=True, slots=True)
class SummaryReport(Shape):
    """The summary of one month, as it was published; it is made once, and never changed.

    `report_id` is the one under which the PMS was told, where it is. `notes`: how to read it.
    """

    report_id: Id
    kind: str
    period: str
    made_at: Time
    tables: Summary
    notes: list[str]


@dataclass(frozen=True, slots=True)
class PerformanceReport(Shape):
    """Performance up to the end of one month, as it was published; it is made once, and never changed."""

    report_id: Id
    kind: str
    period: str
    made_at: Time
    tables: Performance
    notes: list[str]
