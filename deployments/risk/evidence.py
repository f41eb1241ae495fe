"""One thing that went into the risk: what it demands, by how much it raises, and its words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from serve_app.domain.assessment import Factor, RiskLevel, Urgency

LEVELS = tuple(RiskLevel)
URGENCIES = tuple(Urgency)


class Effect(StrEnum):
    """What a factor did, strongest first."""

    DEMANDS = "demands"  # a rule: the level and urgency are at least this
    RAISES = "raises"  # the score
    NONE = "none"  # weighed, and found not to matter
    NOT_AVAILABLE = "not_available"  # could not be weighed


@dataclass(frozen=True, slots=True)
class Evidence:
    """A factor with its force: the least level and urgency, and `raises` 0 to 1 for the score.

    No evidence can lower anything: a level and urgency are joined by the highest, raises by a
    product of what is left.
    """

    code: str
    effect: Effect
    message: str
    raises: float = 0.0
    level: RiskLevel = RiskLevel.LOW
    urgency: Urgency = Urgency.ROUTINE

    @property
    def factor(self) -> Factor:
        """As the answer shows it."""
        return Factor(code=self.code, effect=self.effect.value, message=self.message)


def highest_level(levels: Iterable[RiskLevel]) -> RiskLevel:
    """Give the highest, low if there is none."""
    return max(levels, key=LEVELS.index, default=RiskLevel.LOW)


def most_urgent(urgencies: Iterable[Urgency]) -> Urgency:
    """Give the most urgent, routine if there is none."""
    return max(urgencies, key=URGENCIES.index, default=Urgency.ROUTINE)
