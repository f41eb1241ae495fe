"""Thresholds whose promise is proven, not just measured: operating points, and conformal prediction sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from data_jobs.training.probabilities import Floats, Labels
from serve_app.domain.diagnosis import MALIGNANT, TRAINED, Diagnosis

#: The points every model must have, by name: the diagnoses whose probabilities are summed.
POINTS = {"melanoma": (Diagnosis.MEL,), "malignant": tuple(d for d in TRAINED if d in MALIGNANT)}

#: Of an ensemble's many out-of-fold lesions, at most this share may be missed: 9 of 574 keep fold 0's bound of 0.95
#: (8 of 289) with a probability of 0.91, the 16 that CHOICE_CONFIDENCE would allow with 0.56 (beta-binomial).
OUT_OF_FOLD_SENSITIVITY = 0.983

#: A point is chosen at this confidence, and reported at 95 %. Chosen at 95 %, it stands on the edge: of 284 melanomas 7
#: may be missed, and other 289 prove 0.95 again with a probability of 0.64 only (beta-binomial, Jeffreys' prior); with
#: the 5 that 99 % allows it is 0.82.
CHOICE_CONFIDENCE = 0.99


@dataclass(frozen=True, slots=True)
class ChosenThreshold:
    """A threshold, and what it gave on the lesions it was chosen on."""

    threshold: float
    positives: int
    misses: int
    sensitivity: float
    lower_bound: float
    negatives: int
    specificity: float


def lower_bound(successes: int, trials: int, confidence: float = 0.95) -> float:
    """One-sided Clopper-Pearson lower bound of a proportion (Clopper and Pearson, Biometrika 1934).

    The p for which `successes` or more of `trials` has probability 1 - confidence.
    """
    return float(beta.ppf(1.0 - confidence, successes, trials - successes + 1)) if successes else 0.0


def misses_allowed(positives: int, sensitivity: float = 0.95, confidence: float = 0.95) -> int:
    """Most misses with which the bound still holds; -1 when even none is too many."""
    fail = (m for m in range(positives) if lower_bound(positives - m, positives, confidence) < sensitivity)
    return next(fail, positives) - 1


def lesion_scores(
    probabilities: Floats, labels: Labels, lesions: Sequence[str], diagnoses: Sequence[Diagnosis]
) -> tuple[Floats, NDArray[np.bool_]]:
    """One score a lesion, and whether it is one of `diagnoses`, whose calibrated probabilities (N×8) the score sums.

    The less favourable image counts: a positive's lowest, a negative's highest.
    """
    indices = [TRAINED.index(d) for d in diagnoses]
    scores, positive = probabilities[:, indices].sum(1), np.isin(labels, indices)
    worst: dict[tuple[str, bool], float] = {}
    for score, is_positive, lesion in zip(scores.tolist(), positive.tolist(), lesions, strict=True):
        key = (lesion, is_positive)
        pick = min if is_positive else max
        worst[key] = pick(worst.get(key, score), score)
    return np.array(list(worst.values())), np.array([key[1] for key in worst])


def choose_threshold(
    scores: Floats,
    positive: NDArray[np.bool_],
    sensitivity: float = 0.95,
    confidence: float = CHOICE_CONFIDENCE,
    least: float = 0.0,
) -> ChosenThreshold:
    """The largest threshold whose sensitivity is at least `least`, and has its lower bound at `sensitivity` or above.

    The bound in the answer is the one at 95 %. Raises ValueError with too few positives: 90 are
    needed for 0.95 at 99 % confidence.
    """
    found = np.sort(scores[positive])
    misses = min(misses_allowed(len(found), sensitivity, confidence), math.floor((1.0 - least) * len(found)))
    if misses < 0:
        raise ValueError(f"{len(found)} positives cannot prove a sensitivity of {sensitivity}.")
    threshold = float(np.floor(found[misses] * 1e6) / 1e6)
    return measure_threshold(scores, positive, threshold)


def measure_threshold(
    scores: Floats, positive: NDArray[np.bool_], threshold: float, confidence: float = 0.95
) -> ChosenThreshold:
    """What `score >= threshold` gives on these lesions."""
    flagged = scores >= threshold
    positives, negatives = int(positive.sum()), int((~positive).sum())
    hits = int((flagged & positive).sum())
    return ChosenThreshold(
        threshold=threshold,
        positives=positives,
        misses=positives - hits,
        sensitivity=hits / positives,
        lower_bound=lower_bound(hits, positives, confidence),
        negatives=negatives,
        specificity=float((~flagged & ~positive).sum() / max(1, negatives)),
    )


def count_below(
    scores: Floats, positive: NDArray[np.bool_], threshold: float, fractions: Sequence[float]
) -> dict[str, dict[str, int]]:
    """How many missed lesions, and at the cost of how many others, each fraction of a threshold still raises."""
    below = scores < threshold
    return {
        str(fraction): {
            "missed_lesions_raised": int(
                (raised := below & (scores >= fraction * threshold))[positive].sum()
            ),
            "other_lesions_raised": int(raised[~positive].sum()),
        }
        for fraction in fractions
    }


def choose_points(
    probabilities: Floats, labels: Labels, lesions: Sequence[str], least: float = 0.0
) -> dict[str, ChosenThreshold]:
    """All operating points, chosen by lesion; see `choose_threshold`."""
    return {
        name: choose_threshold(*lesion_scores(probabilities, labels, lesions, diagnoses), least=least)
        for name, diagnoses in POINTS.items()
    }


#: A class of fewer calibration images than this is rare: 19 images of 16 lesions cannot place a 5 % quantile.
RARE_IMAGES = 150


def conformal_threshold(scores: NDArray[np.floating], coverage: float) -> float:
    """The threshold t for which a new p(y) >= t with probability at least `coverage`.

    `scores` are the calibrated p(y) of the images of class y. t is the k-th smallest of n with
    k = floor((1 - coverage) * (n + 1)): under exchangeability the new score falls below it
    with probability at most k / (n + 1). With k = 0 (fewer than 1 / (1 - coverage) - 1
    images) no finite threshold keeps the promise, and t = 0: the class is in every set.
    """
    k = math.floor((1.0 - coverage) * (len(scores) + 1) + 1e-9)
    return 0.0 if k == 0 else float(np.sort(scores)[k - 1])


def conformal_thresholds(
    probabilities: Floats, labels: Labels, coverage: float, *, together: bool = False
) -> Floats:
    """One threshold a class from N×C calibrated probabilities.

    The quantile of a rare class hangs on one image. Its threshold is no higher than that of the rare classes together
    (Ding et al., NeurIPS 2023, cluster such classes); `together`: it is theirs, also where its own would be lower, and
    holds for the cluster alone: one odd AK in 36 put AK into 57 % of all sets.
    """
    own_class = probabilities[np.arange(len(labels)), labels]
    counts = np.bincount(labels, minlength=probabilities.shape[1])
    thresholds = np.array(
        [conformal_threshold(own_class[labels == c], coverage) for c in range(probabilities.shape[1])]
    )
    rare = counts < RARE_IMAGES
    if rare[labels].any():
        pooled = conformal_threshold(own_class[rare[labels]], coverage)
        thresholds[rare] = pooled if together else np.minimum(thresholds[rare], pooled)
    return thresholds
