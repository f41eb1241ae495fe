"""The arithmetic of the answer, against sums done by hand."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
import numpy as np
import pytest

from deployments.classifier.calibration import Calibrator, ood_score, softmax
from model_store.session import Outputs
from serve_app.domain.diagnosis import TRAINED, Diagnosis
from serve_app.domain.errors import StageFailed

LOGITS = np.array([[2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0]], np.float32)


def calibrator(**changed: object) -> Calibrator:
    """Two unknown means, one at the origin and one at all ones; precision twice the identity."""
    values: dict[str, object] = {
        "temperature": 2.0,
        "member_temperature": 3.0,
        "thresholds": np.full(8, 0.12),
        "coverage": 0.95,
        "statistics": (np.stack([np.zeros(512), np.ones(512)]), 2.0 * np.eye(512)),
        "slope": 1.5,
        "intercept": -2.0,
    }
    return Calibrator(**{**values, **changed})


def test_the_distance_uses_the_whole_covariance() -> None:
    precision = np.eye(512)
    precision[0, 1] = precision[1, 0] = 0.5
    bottleneck = np.zeros((1, 512))
    bottleneck[0, :2] = (3.0, 4.0)
    # 9 + 16 + 2 x 0.5 x 12
    assert ood_score(bottleneck, np.zeros((1, 512)), precision)[0] == pytest.approx(37 / 512)


def test_probabilities_are_the_softmax_less_the_unknown() -> None:
    bottleneck = np.full((1, 512), 0.5, np.float32)
    (found,) = calibrator().classify(Outputs(LOGITS, bottleneck))
    score = 2.0 * 0.25
    unknown = 1 / (1 + math.exp(-(1.5 * score - 2.0)))
    exponents = [math.exp(logit / 2.0) for logit in LOGITS[0].tolist()]
    assert found.ood_score == pytest.approx(score, abs=1e-12)
    assert found.probabilities[Diagnosis.UNK] == pytest.approx(unknown, abs=1e-12)
    for diagnosis, exponent in zip(TRAINED, exponents, strict=True):
        expected = (1 - unknown) * exponent / sum(exponents)
        assert found.probabilities[diagnosis] == pytest.approx(expected, abs=1e-12)
    assert sum(found.probabilities.values()) == pytest.approx(1, abs=1e-12)
    assert [one.diagnosis for one in found.top3] == [Diagnosis.UNK, Diagnosis.MEL, Diagnosis.NV]


def test_the_set_is_of_the_eight_and_does_not_know_the_unknown() -> None:
    softmaxed = softmax(LOGITS.astype(np.float64), 2.0)[0]
    thresholds = softmaxed.copy()
    thresholds[1] += 1e-9
    far = np.full((1, 512), 100.0, np.float32)
    for bottleneck in (np.zeros((1, 512), np.float32), far):
        (found,) = calibrator(thresholds=thresholds).classify(Outputs(LOGITS, bottleneck))
        assert found.prediction_set == tuple(d for d in TRAINED if d is not Diagnosis.NV)
        assert found.coverage == 0.95
    assert found.probabilities[Diagnosis.UNK] > 0.999999


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["logits", "bottleneck"])
def test_output_that_is_not_finite_is_no_answer(bad: float, where: str) -> None:
    logits, bottleneck = LOGITS.copy(), np.zeros((1, 512), np.float32)
    (logits if where == "logits" else bottleneck)[0, 3] = bad
    with pytest.raises(StageFailed):
        calibrator().classify(Outputs(logits, bottleneck))


@settings(max_examples=100, deadline=None)
@given(
    st_numpy.arrays(np.float32, (3, 8), elements=st.floats(-1000, 1000, width=32)),
    st.floats(0.05, 20),
    st.floats(-1000, 1000, width=32),
)
def test_nine_probabilities_always_sum_to_one(logits, temperature: float, level: float) -> None:
    bottleneck = np.full((3, 512), level, np.float32)
    for found in calibrator(temperature=temperature).classify(Outputs(logits, bottleneck)):
        assert abs(sum(found.probabilities.values()) - 1) < 1e-9
        assert all(0 <= p <= 1 for p in found.probabilities.values())


def test_members_are_heard_apart_and_the_graph_may_score_what_it_does_not_know() -> None:
    members = np.stack([LOGITS[0], LOGITS[0, ::-1]])[None]
    outputs = Outputs(members.mean(1), np.zeros((1, 512), np.float32), members, np.array([4.0], np.float32))
    (found,) = calibrator(statistics=None).classify(outputs)
    first, second = softmax(members[0].astype(np.float64), 3.0)
    assert found.disagreement == pytest.approx(np.abs(first - second).sum() / 4)
    assert found.ood_score == 4.0
    assert found.probabilities[Diagnosis.UNK] == pytest.approx(1 / (1 + math.exp(-(1.5 * 4.0 - 2.0))))
    assert calibrator().classify(Outputs(LOGITS, outputs.bottleneck))[0].disagreement is None
