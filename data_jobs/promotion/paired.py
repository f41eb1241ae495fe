"""Statistics of two models on the same cases."""

from __future__ import annotations

from dataclasses import dataclass
import math

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class PairedCounts:
    """Cases that only the live model, or only the candidate, gets right; p of McNemar's exact test."""

    cases: int
    lost: int
    gained: int
    p_value: float


def compare_pairs(live: NDArray[np.bool_], candidate: NDArray[np.bool_]) -> PairedCounts:
    """Count the discordant of N pairs of right (true) and wrong answers.

    The p-value is McNemar's exact, two-sided: twice the tail of Binomial(lost + gained, 1/2), at
    most 1 (McNemar, Psychometrika 1947; exact form in Fagerland et al., BMC Med Res Methodol 2013).
    """
    lost, gained = int((live & ~candidate).sum()), int((~live & candidate).sum())
    discordant = lost + gained
    tail = sum(math.comb(discordant, i) for i in range(min(lost, gained) + 1))
    # Whole numbers up to the one division: no rounding however many pairs there are.
    p_value = min(1.0, 2 * tail / 2**discordant)
    return PairedCounts(len(live), lost, gained, p_value)
