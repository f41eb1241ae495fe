"""UNK: how unlike dermoscopy an image is, how that becomes p(UNK), and what it is held against (`outliers`).

A network of ours is scored by a logistic regression on what its block groups measure, and how far that strays from
dermoscopy (`UnknownHead`): texture, colour and
shape tell a photograph from dermoscopy before the last layers forget all but the lesion (Sastry and Oore, "Detecting
Out-of-Distribution Examples with Gram Matrices", ICML 2020; Pacheco et al., CVPRW 2020, on skin). A model that came in
as ONNX gives its bottleneck only: its score is the distance to every class trained on (`ClassStatistics`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn import covariance
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from data_jobs.training.evaluation.predictions import UNKNOWN, Predictions, served
from data_jobs.training.outliers import CLINICAL, Outlier, make_outliers, skin_like
from data_jobs.training.probabilities import Floats, Labels, area_under_curve, rounded
from data_jobs.training.scan import Run, scan_pixels
from deployments.classifier.calibration import Calibrator, ood_score, unknown_probability
from deployments.preprocess.pixels import InputGeometry

#: Shares of a covariance replaced by a multiple of the identity: within classes, and to find the direction.
WITHIN_SHRINKAGE = 0.001
DIRECTION_SHRINKAGE = 0.01
#: Where the anchor of the direction lies: so many standard deviations on the far side of the known images.
ANCHOR = 6.0
#: Weight of the class distance beside the direction.
CLASS_WEIGHT = 0.25
#: How often an upload is taken to be no dermoscopic image of a trained class, before it is seen.
PRIOR_UNKNOWN = 0.05
#: The same for a head, which keeps more of the known images below any limit.
HEAD_PRIOR = 0.08
#: How many lesions of a fold are inverted, blurred away and painted over.
SPOILT = 100
#: What clinical photographs weigh among the outliers, since they come most; the other kinds share the rest evenly.
CLINICAL_WEIGHT = 0.6
#: Inverse strength of the ridge of `fit_head`, and where its standardised measures are cut off.
HEAD_C = 0.03
CLIP = 8.0
#: Components of the known images' covariance that are kept; the share of the known images that stray no further than
#: `reach`; and what an e-fold of the squared distance beyond it adds to the log odds.
AXES = 96
REACH = 0.95
STRAY = 10.0
#: Rounding may leave less than nothing of a difference of squares; its logarithm must stay a number.
LEAST_DISTANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Examples:
    """Measures N×F of N images, what each is (an outlier's kind, a known image's hospital) and whose (no group is split)."""

    measures: NDArray[np.floating]
    kinds: NDArray[np.str_]
    groups: NDArray[np.str_]

    def __getitem__(self, picked: NDArray[Any]) -> Examples:
        return Examples(self.measures[picked], self.kinds[picked], self.groups[picked])

    @property
    def weights(self) -> Floats:
        """One weight an image: 1 in all, the same for every kind, but CLINICAL_WEIGHT for clinical photographs."""
        kinds, index, counts = np.unique(self.kinds, return_inverse=True, return_counts=True)
        clinical = kinds == CLINICAL
        share = np.where(clinical, CLINICAL_WEIGHT, (1.0 - CLINICAL_WEIGHT) / max(1, int((~clinical).sum())))
        each = share / counts / share.sum()
        return np.asarray(each[index])


@dataclass(frozen=True, slots=True)
class UnknownHead:
    """What makes a score of measures x; arrays are float32, F long, `axes` F×K.

    With z = clip((x - mean) / scale): weight · z + bias + STRAY · max(0, log d - reach). d = rest |z|² - |z axes|² is the
    squared distance to the known images under their covariance, of which K components are kept apart and the others
    equal (Tipping and Bishop, "Probabilistic principal component analysis", 1999), over F: what is like no outlier
    that was fitted on is still unlike the known.
    """

    mean: NDArray[np.float32]
    scale: NDArray[np.float32]
    weight: NDArray[np.float32]
    axes: NDArray[np.float32]
    bias: float
    rest: float
    reach: float = math.inf

    def standard(self, measures: NDArray[np.floating]) -> Floats:
        """Z of measures N×F."""
        return np.clip((np.asarray(measures, np.float64) - self.mean) / self.scale, -CLIP, CLIP)

    def log_distance(self, measures: NDArray[np.floating]) -> Floats:
        """Log d of measures N×F."""
        z = self.standard(measures)
        distance = self.rest * (z**2).sum(1) - ((z @ self.axes) ** 2).sum(1)
        return np.asarray(np.log(np.maximum(distance, LEAST_DISTANCE)))

    def score(self, measures: NDArray[np.floating]) -> Floats:
        """Out-of-distribution scores N of measures N×F."""
        beyond = np.maximum(self.log_distance(measures) - self.reach, 0.0)
        return np.asarray(self.standard(measures) @ self.weight + self.bias + STRAY * beyond)


def fit_head(known: Examples, outliers: Examples) -> UnknownHead:
    """Regularised logistic regression of outliers against images that the network did not train on, and their spread.

    Both sides should have been `captured` alike; else it learns file formats.
    """
    mean = np.average(known.measures, axis=0, weights=known.weights)
    scale = np.sqrt(np.average((known.measures - mean) ** 2, axis=0, weights=known.weights)) + 1e-6
    standard = np.clip((np.concatenate([known.measures, outliers.measures]) - mean) / scale, -CLIP, CLIP)
    target = np.arange(len(standard)) >= len(known.measures)
    weights = np.concatenate([known.weights, outliers.weights]) * len(standard) / 2.0
    fitted = LogisticRegression(C=HEAD_C, max_iter=200, tol=1e-3).fit(standard, target, weights)
    spread, axes = np.linalg.eigh(np.cov(standard[~target].T, aweights=known.weights))
    kept = min(AXES, len(spread) // 2)
    width, rest = len(spread), 1.0 / float(spread[:-kept].mean())
    axes = axes[:, -kept:] * np.sqrt(np.maximum(rest - 1.0 / spread[-kept:], 0.0) / width)
    centre, spans, weight, kept_axes = (
        np.asarray(part, np.float32) for part in (mean, scale, fitted.coef_[0], axes)
    )
    head = UnknownHead(centre, spans, weight, kept_axes, float(fitted.intercept_[0]), rest / width)
    return replace(head, reach=float(np.quantile(head.log_distance(known.measures), REACH)))


def cross_fitted(known: Examples, outliers: Examples, splits: int = 5) -> tuple[Floats, Floats]:
    """Scores of both by heads that saw no image of the same group: what `fit_logistic` takes."""
    scores = np.empty(len(known.kinds)), np.empty(len(outliers.kinds))
    halves = [GroupKFold(splits).split(side.kinds, groups=side.groups) for side in (known, outliers)]
    for (known_fit, known_held), (other_fit, other_held) in zip(*halves, strict=True):
        head = fit_head(known[known_fit], outliers[other_fit])
        scores[0][known_held] = head.score(known.measures[known_held])
        scores[1][other_held] = head.score(outliers.measures[other_held])
    return scores


@dataclass(frozen=True, slots=True)
class ClassStatistics:
    """Anchored class means C×512 and the shared precision 512×512, float32."""

    means: NDArray[np.float32]
    precision: NDArray[np.float32]

    def score(self, features: NDArray[np.floating]) -> Floats:
        """Out-of-distribution score of N×512 bottlenecks, by the served code."""
        return ood_score(*(np.asarray(part, np.float64) for part in (features, self.means, self.precision)))


def shrunk_covariance(residuals: NDArray[np.floating], shrinkage: float) -> Floats:
    """(1 - a) * S + a * mean(diag S) * I, of N×D residuals (Ledoit and Wolf 2004's target)."""
    residuals = np.asarray(residuals, np.float64)
    return np.asarray(covariance.shrunk_covariance(residuals.T @ residuals / len(residuals), shrinkage))


def class_means(features: NDArray[np.floating], labels: Labels) -> Floats:
    """C×D means; every class must have an image."""
    classes = range(int(labels.max()) + 1)
    return np.stack([np.asarray(features[labels == c], np.float64).mean(0) for c in classes])


def outlier_direction(
    features: NDArray[np.floating], labels: Labels, outliers: NDArray[np.floating]
) -> Floats:
    """Fisher's discriminant between known images and outliers, scaled to unit deviation over the known.

    The network was never told of anything but lesions, so that plain colours and text land
    *inside* its classes; one direction of the same bottleneck tells them apart. Every class weighs the
    same: by images the direction is that between naevi and all else, and takes vascular lesions for outliers.
    """
    known, other = np.asarray(features, np.float64), np.asarray(outliers, np.float64)
    counts = np.bincount(labels)
    weights = 1.0 / counts[labels] / len(counts)
    known_mean, other_mean = weights @ known, other.mean(0)
    residuals = (known - known_mean) * np.sqrt(weights * len(known))[:, None]
    within = (
        shrunk_covariance(residuals, DIRECTION_SHRINKAGE)
        + shrunk_covariance(other - other_mean, DIRECTION_SHRINKAGE)
    ) / 2.0
    direction = np.linalg.solve(within, other_mean - known_mean)
    return np.asarray(direction / (known @ direction).std())


def fit_statistics(
    features: NDArray[np.floating], labels: Labels, outliers: NDArray[np.floating]
) -> ClassStatistics:
    """Means and precision from the training folds' bottlenecks, N×512, and outliers', M×512.

    The squared distance is the sum of two: to the class means under the shared covariance, and
    along `outlier_direction` from an anchor ANCHOR deviations on the far side of the known
    images, so that it grows towards the outliers over the whole range.
    """
    known = np.asarray(features, np.float64)
    means = class_means(features, labels)
    within = shrunk_covariance(known - means[labels], WITHIN_SHRINKAGE)
    direction = outlier_direction(features, labels, outliers)
    # The shift of the means that moves them along the direction and nothing else, as the data vary.
    total = shrunk_covariance(known - known.mean(0), WITHIN_SHRINKAGE)
    shift = total @ direction / (direction @ total @ direction)
    anchor = float((known @ direction).mean()) - ANCHOR
    anchored = means + np.outer(anchor - means @ direction, shift)
    width = known.shape[1]
    precision = CLASS_WEIGHT * np.linalg.inv(within) + np.outer(direction, direction) * width / ANCHOR**2
    return ClassStatistics(anchored.astype(np.float32), precision.astype(np.float32))


def fit_logistic(
    known: Floats, unknown: Floats, prior: float = PRIOR_UNKNOWN, weights: Floats | None = None
) -> tuple[float, float]:
    """(slope, intercept) of p(UNK) = sigmoid(slope * score + intercept).

    Weighted maximum likelihood: the outliers weigh `prior` together (each the same, or its share of `weights`), the
    known images the rest, so that p(UNK) is a
    probability for a stream with that prior and not for a set of outliers we happened to draw. A small ridge keeps the
    slope finite when the two do not overlap.
    """
    scores = np.concatenate([known, unknown])
    target = np.concatenate([np.zeros(len(known)), np.ones(len(unknown))])
    share = np.full(len(unknown), 1.0 / len(unknown)) if weights is None else weights / weights.sum()
    weighed = np.concatenate([np.full(len(known), (1.0 - prior) / len(known)), prior * share]) * len(scores)
    centre, scale = float(known.mean()), float(known.std())
    fitted = LogisticRegression(C=10.0, solver="newton-cholesky", tol=1e-10, max_iter=200)
    fitted.fit(((scores - centre) / scale)[:, None], target, weighed)
    slope = float(fitted.coef_[0, 0]) / scale
    return slope, float(fitted.intercept_[0]) - slope * centre


def outlier_figures(
    known: Floats, outliers: list[Outlier], scores: Floats, slope: float, intercept: float
) -> dict[str, Any]:
    """AUROC against the calibration fold, and p(UNK), of every kind of outlier in the test part."""
    figures = {}
    kinds = {outlier.kind for outlier in outliers if outlier.part == "test"}
    for kind in [*sorted(kinds), "all"]:
        picked = np.array([o.part == "test" and kind in {o.kind, "all"} for o in outliers])
        both = np.concatenate([known, scores[picked]])
        positive = np.arange(len(both)) >= len(known)
        p = unknown_probability(scores[picked], slope, intercept)
        figures[kind] = {
            "images": int(picked.sum()),
            "auroc": rounded(area_under_curve(both, positive)),
            "median_score": rounded(np.median(scores[picked])),
            "median_p_unk": rounded(np.median(p)),
            "share_p_unk_over_half": rounded((p > 0.5).mean()),
        }
    return figures


def unknown_figures(
    run: Run,
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
        "unk_share": rounded((nine.argmax(1) == UNKNOWN).mean()),
        "median_p_unk": rounded(np.median(nine[:, UNKNOWN]), 6),
        "outliers": figures(drawn),
        "skin_like": figures(spoilt),
    }
