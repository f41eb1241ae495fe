"""Does a copy answer as the server does? Figures on the same images, and the gate.

The calibration fold chooses between settings, the test fold confirms the chosen one; the images that p(UNK) must find
(photographs, text, noise) are those that nothing was fitted on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from data_jobs.training.dataset import LabelledImage, labels_of
from data_jobs.training.embedding_spaces import ShippedReferences, nearest, precision_at
from data_jobs.training.evaluation.predictions import MELANOMA, known_eight, served
from data_jobs.training.operating_points import lesion_scores, measure_threshold
from data_jobs.training.probabilities import Floats, Labels, area_under_curve, calibration_error, rounded
from data_jobs.training.scan import Pixels
from deployments.classifier.calibration import Calibrator
from model_store.manifest import OperatingPoint
from model_store.registry import StoredModel
from model_store.session import Outputs

NEIGHBOURS = 10


@dataclass(frozen=True, slots=True)
class FoldImages:
    """Labelled images of one fold; `name` is the fold's, `pixels` uint8 N×side×side×3."""

    name: str
    rows: list[LabelledImage]
    pixels: Pixels

    @property
    def labels(self) -> Labels:
        """Index in TRAINED of every image's diagnosis."""
        return labels_of(self.rows)

    @property
    def lesions(self) -> list[str]:
        """The lesion of every image."""
        return [row.lesion for row in self.rows]


def compare_search(
    shipped: ShippedReferences, images: FoldImages, server: NDArray[np.float32], copy: NDArray[np.float32]
) -> dict[str, float | dict[str, float]]:
    """Neighbours found with the copy's bottlenecks (N×512) against those found with the server's."""
    queries = [shipped.space.embed(bottlenecks) for bottlenecks in (server, copy)]
    found_server, found = (
        nearest(vectors, images.lesions, shipped.vectors, shipped.lesions, NEIGHBOURS) for vectors in queries
    )
    shared = [len(np.intersect1d(a, b)) for a, b in zip(found_server, found, strict=True)]
    return {
        "cosine": cosines(*queries),
        "shared_of_ten": rounded(np.mean(shared), 3),
        "same_first": rounded((found_server[:, 0] == found[:, 0]).mean()),
        "precision_at_10_server": rounded(precision_at(found_server, images.labels, shipped.labels)),
        "precision_at_10": rounded(precision_at(found, images.labels, shipped.labels)),
    }


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> dict[str, float]:
    """Least, first percentile and median of the cosine between rows."""
    products = (a.astype(np.float64) * b).sum(1)
    values = products / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return {
        "min": rounded(values.min(), 5),
        "quantile_01": rounded(np.quantile(values, 0.01), 5),
        "median": rounded(np.median(values), 5),
    }


#: Sensitivity at an operating point that a copy may lose against the server, by lesion.
LOSS_ALLOWED = 0.005
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Judge:
    """What turns logits and bottlenecks into what is told: the manifest's, for server and copy alike."""

    calibrator: Calibrator
    references: ShippedReferences
    points: Mapping[str, OperatingPoint]

    @classmethod
    def from_model(cls, model: StoredModel) -> Self:
        """The calibration, references and operating points of a verified model."""
        points = model.manifest.operating_points
        return cls(Calibrator.from_model(model), ShippedReferences.from_model(model), points)


def compare_fold(judge: Judge, images: FoldImages, server: Outputs, copy: Outputs) -> dict[str, Any]:
    """All figures of one fold; shares, probabilities and cosines are 0 to 1."""
    nine_server, nine = (served(judge.calibrator, scan)[0] for scan in (server, copy))
    eight_server, eight = known_eight(nine_server), known_eight(nine)
    inside_server, inside = (p >= judge.calibrator.thresholds for p in (eight_server, eight))
    return {
        "images": len(images.labels),
        "lesions": len(set(images.lesions)),
        "top1_agreement": rounded((nine_server.argmax(1) == nine.argmax(1)).mean()),
        "same_prediction_set": rounded((inside_server == inside).all(1).mean()),
        "server": _quality(nine_server, images.labels),
        "copy": _quality(nine, images.labels),
        "logit_difference": spread(np.abs(server.logits - copy.logits)),
        "melanoma_difference": spread(np.abs(eight_server[:, MELANOMA] - eight[:, MELANOMA])),
        "p_unk": unknown_figures(nine_server, nine),
        "bottleneck_cosine": cosines(server.bottleneck, copy.bottleneck),
        "search": compare_search(judge.references, images, server.bottleneck, copy.bottleneck),
        "operating_points": {
            name: point_figures(point, eight_server, eight, images) for name, point in judge.points.items()
        },
    }


def compare_outliers(judge: Judge, server: Outputs, copy: Outputs) -> dict[str, float]:
    """p(UNK) on images that are no dermoscopy."""
    nine_server, nine = (served(judge.calibrator, scan)[0] for scan in (server, copy))
    return {"images": len(nine), **unknown_figures(nine_server, nine)}


def point_figures(
    point: OperatingPoint, server: Floats, copy: Floats, images: FoldImages
) -> dict[str, float]:
    """One operating point by lesion from N×8 probabilities, server against copy, at the server's threshold.

    `newly_missed` lesions the server flags and the copy does not, `newly_found` the reverse.
    """
    (scores_server, is_positive), (scores, _) = (
        lesion_scores(eight, images.labels, images.lesions, point.diagnoses) for eight in (server, copy)
    )
    before, after = (measure_threshold(s, is_positive, point.threshold) for s in (scores_server, scores))
    flagged_server, flagged = scores_server >= point.threshold, scores >= point.threshold
    return {
        "threshold": point.threshold,
        "positives": before.positives,
        "sensitivity_server": rounded(before.sensitivity, 6),
        "sensitivity": rounded(after.sensitivity, 6),
        "newly_missed": int((is_positive & flagged_server & ~flagged).sum()),
        "newly_found": int((is_positive & ~flagged_server & flagged).sum()),
        "specificity_server": rounded(before.specificity),
        "specificity": rounded(after.specificity),
    }


def unknown_figures(server: Floats, copy: Floats) -> dict[str, float]:
    """p(UNK) of N×9 probabilities: shares over one half, how often both say the same, differences."""
    u_server, u = server[:, 8], copy[:, 8]
    return {
        "over_half_server": rounded((u_server > 0.5).mean()),
        "over_half": rounded((u > 0.5).mean()),
        "agreement": rounded(((u_server > 0.5) == (u > 0.5)).mean()),
        **spread(np.abs(u_server - u)),
    }


def gate_problems(fold: str, figures: Mapping[str, Any]) -> list[str]:
    """Why a copy with these figures may not be shipped; empty when it may."""
    point = figures["operating_points"]["melanoma"]
    loss = point["sensitivity_server"] - point["sensitivity"]
    if loss <= LOSS_ALLOWED + _ROUNDING:
        return []
    told = f"{point['sensitivity']:.4f} against the server's {point['sensitivity_server']:.4f}"
    return [
        f"{fold}: melanoma sensitivity {told}, {100 * loss:.2f} points less; {100 * LOSS_ALLOWED} are allowed"
    ]


def spread(differences: np.ndarray[Any, Any]) -> dict[str, float]:
    """Mean, 99.9 % quantile and greatest of absolute differences."""
    return {
        "mean": rounded(differences.mean(), 6),
        "quantile_999": rounded(np.quantile(differences, 0.999), 6),
        "max": rounded(differences.max(), 6),
    }


def _quality(nine: Floats, labels: Labels) -> dict[str, float]:
    return {
        "top1": rounded((nine.argmax(1) == labels).mean()),
        "ece": rounded(calibration_error(nine, labels)),
        "melanoma_auc": rounded(area_under_curve(nine[:, MELANOMA], labels == MELANOMA)),
    }
