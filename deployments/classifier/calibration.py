"""From logits to what may be told: calibrated probabilities, prediction sets, p(UNK)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from model_store.registry import StoredModel
from model_store.session import Outputs
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
    """One model's calibration, as its manifest states it. `statistics` are means and precision of `ood_score`."""

    temperature: float
    member_temperature: float
    coverage: float
    thresholds: FloatArray
    statistics: tuple[FloatArray, FloatArray] | None
    slope: float
    intercept: float

    @classmethod
    def from_model(cls, model: StoredModel) -> Self:
        """Read the sets and out-of-distribution statistics of a verified model."""
        manifest = model.manifest
        calibration, conformal, ood = manifest.calibration, manifest.conformal, manifest.ood
        statistics = None
        if ood.statistics is not None:
            with np.load(model.path(ood.statistics), allow_pickle=False) as arrays:
                statistics = (arrays["means"].astype(np.float64), arrays["precision"].astype(np.float64))
        return cls(
            temperature=calibration.temperature,
            member_temperature=calibration.member_temperature or calibration.temperature,
            coverage=conformal.coverage,
            thresholds=np.array([conformal.thresholds[d] for d in TRAINED]),
            statistics=statistics,
            slope=ood.slope,
            intercept=ood.intercept,
        )

    def classify(self, outputs: Outputs) -> list[Classification]:
        """What a pass gave for N images to N classifications whose nine probabilities sum to 1.

        Raises StageFailed when the model's output is not finite.
        """
        if not outputs.finite:
            raise StageFailed("The model's output is not finite.")
        known = softmax(outputs.logits.astype(np.float64), self.temperature)
        disagreement: list[float] | list[None] = [None] * len(known)
        if outputs.members is not None:
            members = softmax(outputs.members.astype(np.float64), self.member_temperature)
            disagreement = member_disagreement(members).tolist()
        scores = self.score(outputs)
        unknown = unknown_probability(scores, self.slope, self.intercept)
        return [
            Classification(
                probabilities={d: float(p) * (1.0 - u) for d, p in zip(TRAINED, eight, strict=True)}
                | {Diagnosis.UNK: u},
                prediction_set=tuple(d for d, inside in zip(TRAINED, kept, strict=True) if inside),
                coverage=self.coverage,
                ood_score=score,
                disagreement=apart,
            )
            for eight, u, kept, score, apart in zip(
                known, unknown.tolist(), known >= self.thresholds, scores.tolist(), disagreement, strict=True
            )
        ]

    def score(self, outputs: Outputs) -> FloatArray:
        """Out-of-distribution scores N."""
        if self.statistics is None:
            if outputs.unknown is None:
                raise StageFailed("The model gives no out-of-distribution score.")
            return outputs.unknown.astype(np.float64)
        return ood_score(outputs.bottleneck.astype(np.float64), *self.statistics)


def member_disagreement(members: FloatArray) -> FloatArray:
    """How far M members' probabilities N×M×8 are apart, N, 0 to 1: their mean total variation distance to their mean."""
    return np.asarray(np.abs(members - members.mean(1, keepdims=True)).sum(2).mean(1) / 2.0)
