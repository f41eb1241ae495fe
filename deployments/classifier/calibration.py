"""From logits to what may be told: calibrated probabilities, prediction sets, p(UNK)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from model_store.registry import StoredModel
from serve_app.domain.assessment import Classification
from serve_app.domain.diagnosis import TRAINED, Diagnosis
from serve_app.domain.errors import StageFailed

FloatArray = NDArray[np.float64]


def softmax(logits: FloatArray, temperature: float) -> FloatArray:
    """softmax(logits / T) over the last axis (Guo et al., ICML 2017)."""
    scaled = logits / temperature
    exponents = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=-1, keepdims=True))


def ood_score(bottleneck: FloatArray, means: FloatArray, precision: FloatArray) -> FloatArray:
    """Least squared Mahalanobis distance to a class mean, divided by the width; N×D to N.

    Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples",
    NeurIPS 2018: one covariance shared by all classes.
    """
    differences = bottleneck[:, None, :] - means[None, :, :]
    distances = ((differences @ precision) * differences).sum(axis=2)
    return np.asarray(distances.min(axis=1) / bottleneck.shape[1])


def unknown_probability(score: FloatArray, slope: float, intercept: float) -> FloatArray:
    """p(UNK) of out-of-distribution scores: the logistic of a line."""
    return np.asarray(1.0 / (1.0 + np.exp(np.clip(-(slope * score + intercept), -60.0, 60.0))))


@dataclass(frozen=True, slots=True)
class Calibrator:
    """One model's calibration, as its manifest states it."""

    temperature: float
    thresholds: FloatArray
    coverage: float
    means: FloatArray
    precision: FloatArray
    slope: float
    intercept: float

    @classmethod
    def from_model(cls, model: StoredModel) -> Self:
        """Read thresholds and out-of-distribution statistics of a verified model."""
        manifest = model.manifest
        with np.load(model.path(manifest.ood.statistics), allow_pickle=False) as statistics:
            means, precision = statistics["means"], statistics["precision"]
        return cls(
            temperature=manifest.calibration.temperature,
            thresholds=np.array([manifest.conformal.thresholds[d] for d in TRAINED]),
            coverage=manifest.conformal.coverage,
            means=means.astype(np.float64),
            precision=precision.astype(np.float64),
            slope=manifest.ood.slope,
            intercept=manifest.ood.intercept,
        )

    def classify(self, logits: NDArray[np.float32], bottleneck: NDArray[np.float32]) -> list[Classification]:
        """Logits N×8 and bottleneck N×512 to N classifications whose nine probabilities sum to 1.

        Raises StageFailed when the model's output is not finite.
        """
        if not (np.isfinite(logits).all() and np.isfinite(bottleneck).all()):
            raise StageFailed("The model's output is not finite.")
        softmaxed = softmax(logits.astype(np.float64), self.temperature)
        scores = ood_score(bottleneck.astype(np.float64), self.means, self.precision)
        unknown = unknown_probability(scores, self.slope, self.intercept)
        return [
            self._classification(p, float(u), float(score))
            for p, u, score in zip(softmaxed, unknown, scores, strict=True)
        ]

    def _classification(self, known: FloatArray, unknown: float, score: float) -> Classification:
        probabilities = {d: float(p) * (1.0 - unknown) for d, p in zip(TRAINED, known, strict=True)}
        probabilities[Diagnosis.UNK] = unknown
        return Classification(
            probabilities=probabilities,
            prediction_set=tuple(
                d for d, p, t in zip(TRAINED, known, self.thresholds, strict=True) if p >= t
            ),
            coverage=self.coverage,
            ood_score=score,
        )
