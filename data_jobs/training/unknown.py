"""UNK: how far a bottleneck lies from every class trained on, and how that becomes p(UNK)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn import covariance
from sklearn.linear_model import LogisticRegression

from data_jobs.training.probabilities import Floats, Labels

#: Shares of a covariance replaced by a multiple of the identity: within classes, and to find the direction.
WITHIN_SHRINKAGE = 0.001
DIRECTION_SHRINKAGE = 0.01
#: Where the anchor of the direction lies: so many standard deviations on the far side of the known images.
ANCHOR = 6.0
#: Weight of the class distance beside the direction.
CLASS_WEIGHT = 0.25
#: How often an upload is taken to be no dermoscopic image of a trained class, before it is seen.
PRIOR_UNKNOWN = 0.05


@dataclass(frozen=True, slots=True)
class ClassStatistics:
    """Anchored class means C×512 and the shared precision 512×512, float32."""

    means: NDArray[np.float32]
    precision: NDArray[np.float32]


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


def distance_score(features: NDArray[np.floating], statistics: ClassStatistics) -> Floats:
    """Least squared Mahalanobis distance to a class, divided by the width (Lee et al., NeurIPS 2018)."""
    precision = statistics.precision.astype(np.float64)
    distances = []
    for mean in statistics.means.astype(np.float64):
        residuals = np.asarray(features, np.float64) - mean
        distances.append(np.einsum("nd,nd->n", residuals @ precision, residuals))
    return np.asarray(np.min(distances, axis=0) / features.shape[1])


def fit_logistic(known: Floats, unknown: Floats, prior: float = PRIOR_UNKNOWN) -> tuple[float, float]:
    """(slope, intercept) of p(UNK) = sigmoid(slope * score + intercept).

    Weighted maximum likelihood: the outliers weigh `prior` together, the known images the rest, so that p(UNK) is a
    probability for a stream with that prior and not for a set of outliers we happened to draw. A small ridge keeps the
    slope finite when the two do not overlap.
    """
    scores = np.concatenate([known, unknown])
    target = np.concatenate([np.zeros(len(known)), np.ones(len(unknown))])
    weights = np.where(target > 0, prior / len(unknown), (1.0 - prior) / len(known)) * len(scores)
    centre, scale = float(known.mean()), float(known.std())
    fitted = LogisticRegression(C=10.0, solver="newton-cholesky", tol=1e-10, max_iter=200)
    fitted.fit(((scores - centre) / scale)[:, None], target, weights)
    slope = float(fitted.coef_[0, 0]) / scale
    return slope, float(fitted.intercept_[0]) - slope * centre


def unknown_probability(score: Floats, slope: float, intercept: float) -> Floats:
    """p(UNK) of a score."""
    return np.asarray(expit(np.clip(slope * score + intercept, -50.0, 50.0)))
