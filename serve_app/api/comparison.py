"""A recorded answer beside the same answer made again: which fields differ, and by how much."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from serve_app.domain.assessment import Assessment, Neighbours, SimilarCase

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
class Difference:
    """One field that did not come out as recorded; None where one side has no such field."""

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
        then += _weighed(recorded.neighbours)
        now += _weighed(found.neighbours)
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


def _weighed(neighbours: Neighbours) -> list[SimilarCase]:
    nearest = (neighbours.nearest_benign, neighbours.nearest_malignant)
    return [*neighbours.similar, *(case for case in nearest if case is not None)]
