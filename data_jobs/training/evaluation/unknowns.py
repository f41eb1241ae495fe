"""p(UNK) on what is no lesion, and on lesions spoilt until they are none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_jobs.training.calibrate import outlier_figures
from data_jobs.training.evaluation.predictions import UNKNOWN, Predictions, served
from data_jobs.training.outliers import Outlier, make_outliers, skin_like
from data_jobs.training.scan import Outputs, Pixels, scan_pixels
from deployments.classifier.calibration import Calibrator
from deployments.preprocess.resize import InputGeometry

#: How many lesions of the fold are inverted, blurred away and painted over.
SPOILT = 100


def unknown_figures(
    run: Callable[[Pixels], Outputs],
    calibrator: Calibrator,
    predictions: Predictions,
    lesions: NDArray[np.uint8],
    geometry: InputGeometry,
    seed: int,
) -> dict[str, Any]:
    """AUROC against the fold's images and p(UNK) of every kind.

    `lesions` are prepared images of this fold, uint8 N×side×side×3. Photographs and drawings are
    of the part never fitted on; `skin_like` are made of `lesions`, none of which was fitted on.
    """

    def figures(outliers: list[Outlier]) -> dict[str, Any]:
        _, scores = served(calibrator, scan_pixels(run, np.stack([o.pixels for o in outliers])))
        return outlier_figures(predictions.scores, outliers, scores, calibrator.slope, calibrator.intercept)

    drawn = [outlier for outlier in make_outliers(geometry, seed) if outlier.part == "test"]
    spoilt = [replace(outlier, part="test") for outlier in skin_like(lesions, seed)]
    nine = predictions.nine
    return {
        "unk_share": round(float((nine.argmax(1) == UNKNOWN).mean()), 4),
        "median_p_unk": round(float(np.median(nine[:, UNKNOWN])), 6),
        "outliers": figures(drawn),
        "skin_like": figures(spoilt),
    }
