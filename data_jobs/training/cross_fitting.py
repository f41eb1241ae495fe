"""Cross-fitting: honest figures of thresholds that were found on the very fold they are told of.

Where a recipe's test fold is its calibration fold as well, its lesions fall into PARTS parts. What
is fitted after training (prior shift, temperature, p(UNK), set thresholds, operating points) is
fitted anew without each part, and that part is judged by the fit that never saw it (Stone, JRSS B
1974; Chernozhukov et al. 2018 for the name). The network saw none of them. What ships is fitted on
the whole fold, with a quarter more images than each of these fits: the figures err on the low side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
import hashlib
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_jobs.training.conformal import conformal_thresholds
from data_jobs.training.dataset import LabelledImage
from data_jobs.training.evaluation.predictions import Predictions, served
from data_jobs.training.operating_points import choose_points
from data_jobs.training.probabilities import Floats, Labels, fit_prior_shift, prior_shifts, softmax
from data_jobs.training.scan import Scan
from data_jobs.training.unknown import fit_logistic
from deployments.classifier.calibration import Calibrator
from model_store.manifest import Manifest

CROSS_FITTING_NAME = "cross_fitting.json"
PARTS = 5


@dataclass(frozen=True, slots=True)
class PartFit:
    """What is fitted without one part of the fold.

    `moved` is the prior shift of this fit less the one in the served graph; `thresholds` are
    those of the prediction sets, in the order of TRAINED; `points` the operating points by name.
    """

    images: int
    moved: float
    temperature: float
    slope: float
    intercept: float
    thresholds: tuple[float, ...]
    points: dict[str, float]


@dataclass(frozen=True, slots=True)
class CrossFit:
    """One fit a part, and the prior (C class shares, as trained on) that a shift multiplies."""

    prior: tuple[float, ...]
    fits: tuple[PartFit, ...]

    def logits(self, part: int, logits: NDArray[np.floating]) -> NDArray[np.float32]:
        """Served logits N×C under the part's own prior shift."""
        return np.asarray(logits + self.fits[part].moved * np.log(np.array(self.prior)), np.float32)

    def calibrator(self, part: int, served: Calibrator) -> Calibrator:
        """The served calibrator with the part's temperature, thresholds and p(UNK)."""
        fit = self.fits[part]
        return replace(
            served,
            temperature=fit.temperature,
            thresholds=np.array(fit.thresholds),
            slope=fit.slope,
            intercept=fit.intercept,
        )


def part_of(lesion: str) -> int:
    """The part of a lesion: by the digest of its id, so that it never depends on order or on the rest."""
    return int(hashlib.sha256(lesion.encode()).hexdigest()[:8], 16) % PARTS


def cross_fit(
    logits: NDArray[np.floating],
    scores: Floats,
    labels: Labels,
    lesions: Sequence[str],
    *,
    shift: float,
    prior: Floats,
    outlier_scores: Floats,
    coverage: float,
) -> CrossFit:
    """Fit without each part.

    `logits` N×C are the served graph's, which holds `shift`; `scores` N the out-of-distribution
    scores; `outlier_scores` those of the outliers that p(UNK) is fitted to.
    """
    parts = np.array([part_of(lesion) for lesion in lesions])
    raw = np.asarray(logits, np.float64) - shift * np.log(prior)
    fits = []
    for part in range(PARTS):
        rest = parts != part
        own, temperature = fit_prior_shift(raw[rest], labels[rest], prior, prior_shifts())
        p = softmax(raw[rest] + own * np.log(prior), temperature)
        slope, intercept = fit_logistic(scores[rest], outlier_scores)
        points = choose_points(p, labels[rest], [lesions[i] for i in np.flatnonzero(rest).tolist()])
        fits.append(
            PartFit(
                images=int(rest.sum()),
                moved=own - shift,
                temperature=temperature,
                slope=slope,
                intercept=intercept,
                thresholds=tuple(conformal_thresholds(p, labels[rest], coverage).tolist()),
                points={name: point.threshold for name, point in points.items()},
            )
        )
    return CrossFit(tuple(prior.tolist()), tuple(fits))


def write_cross_fit(folder: Path, fit: CrossFit) -> None:
    """Write `cross_fitting.json` into a model folder."""
    (folder / CROSS_FITTING_NAME).write_text(json.dumps(asdict(fit), indent=1) + "\n", encoding="utf-8")


def read_cross_fit(folder: Path) -> CrossFit | None:
    """Read it; None where a model's test fold is not its calibration fold."""
    path = folder / CROSS_FITTING_NAME
    if not path.exists():
        return None
    raw = json.loads(path.read_text(encoding="utf-8"))
    fits = tuple(PartFit(**fit | {"thresholds": tuple(fit["thresholds"])}) for fit in raw["fits"])
    return CrossFit(tuple(raw["prior"]), fits)


@dataclass(frozen=True, slots=True)
class Judged:
    """Predictions of N images; `thresholds` N×8 of their prediction sets; `points` N thresholds by name."""

    predictions: Predictions
    thresholds: Floats
    points: dict[str, Floats]


def judge(
    rows: list[LabelledImage], scan: Scan, calibrator: Calibrator, manifest: Manifest, cross: CrossFit | None
) -> Judged:
    """Answer with the served calibrator, or every part of a cross-fit with the fit that never saw it."""
    names = list(manifest.operating_points)
    if cross is None:
        fixed = [manifest.operating_points[name].threshold for name in names]
        return Judged(
            Predictions(rows, *served(calibrator, scan)),
            np.tile(calibrator.thresholds, (len(rows), 1)),
            {name: np.full(len(rows), value) for name, value in zip(names, fixed, strict=True)},
        )
    parts = np.array([part_of(row.lesion) for row in rows])
    nine, scores = np.empty((len(rows), len(calibrator.thresholds) + 1)), np.empty(len(rows))
    thresholds = np.empty((len(rows), len(calibrator.thresholds)))
    points = {name: np.empty(len(rows)) for name in names}
    for part, fit in enumerate(cross.fits):
        mine = parts == part
        own = cross.calibrator(part, calibrator)
        nine[mine], scores[mine] = served(
            own, Scan(cross.logits(part, scan.logits[mine]), scan.bottleneck[mine])
        )
        thresholds[mine] = own.thresholds
        for name in names:
            points[name][mine] = fit.points[name]
    return Judged(Predictions(rows, nine, scores), thresholds, points)
