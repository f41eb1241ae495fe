"""Answers to labelled images, each beside the thresholds that it is to be judged by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_jobs.training.cross_fitting import CrossFit, part_of
from data_jobs.training.dataset import LabelledImage
from data_jobs.training.evaluation.predictions import Predictions, served
from data_jobs.training.probabilities import Floats
from data_jobs.training.scan import Scan
from deployments.classifier.calibration import Calibrator
from model_store.manifest import Manifest


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
