from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import numpy as np
import pytest

from data_jobs.training.dataset import LabelledImage
from data_jobs.training.evaluation.outcomes import Answers
from data_jobs.training.evaluation.predictions import Predictions
from deployments.risk.rules import URGENCIES
from model_store.session import Outputs
from serve_app.domain.assessment import (
    Classification,
    Conclusion,
    Outcome,
    Quality,
    Reason,
    Risk,
    RiskLevel,
)
from serve_app.domain.diagnosis import TRAINED, Diagnosis

#: They import what the train extra has, as the modules that they are about do.
_TRAINING = [
    "test_device_views.py",
    "test_gpu_run.py",
    "test_machine.py",
    "test_network.py",
    "test_train.py",
    "edge/test_onnx_copies.py",
    "segmenter/test_segmenter_training.py",
]
collect_ignore = [] if find_spec("torch") and find_spec("onnx") else _TRAINING


@pytest.fixture(scope="session")
def make_row() -> Callable[..., LabelledImage]:
    """A made-up row of the archive, by a number and the index of its diagnosis."""
    return _row


@pytest.fixture(scope="session")
def predictions() -> Predictions:
    """1,600 seeded answers to made-up lesions, right more often than not, some of them UNK."""
    rng = np.random.default_rng(1)
    labels = np.repeat(rng.integers(0, len(TRAINED), 800), 2)
    logits = rng.normal(size=(1600, len(Diagnosis))) + 2.0 * np.eye(len(Diagnosis))[labels]
    logits[:, -1] -= 1.0
    nine = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return Predictions([_row(i, int(label)) for i, label in enumerate(labels)], nine, logits[:, -1])


@pytest.fixture(scope="session")
def make_answers() -> Callable[..., Answers]:
    """Made-up answers of an outcome and a level each; those that are not decided have these reasons."""
    return _answers


def _answers(*told: tuple[str, str | None], reasons: Sequence[str] = ()) -> Answers:
    quality = Quality(*(0.5,) * 5, 224, 224, acceptable=True, colour=9.0, two_levels=0.0, damaged=0.0)
    doubts = tuple(Reason(code, "", "") for code in reasons)
    concluded = [
        Conclusion(
            Outcome(outcome),
            () if outcome == "decided" else doubts,
            quality,
            Risk(RiskLevel(level), URGENCIES[0], 0.5, (), "p") if level else None,
            "p",
        )
        for outcome, level in told
    ]
    one = Classification(dict.fromkeys(Diagnosis, 1 / 9), (Diagnosis.NV, Diagnosis.MEL), 0.95, 0.0)
    scan = Outputs(np.zeros((len(told), 8), np.float32), np.zeros((len(told), 512), np.float32))
    return Answers(scan, [one] * len(told), concluded)


def _row(index: int, label: int = 0) -> LabelledImage:
    return LabelledImage(
        isic_id=f"ISIC_{index:07d}",
        diagnosis=TRAINED[label],
        fold=0,
        # Two images a lesion, half of them from HAM10000.
        lesion_id=f"{'HAM' if index % 4 < 2 else 'IL'}_{index // 2:07d}" if index % 10 else None,
        patient_id=None,
        age_approx=None if index % 7 == 0 else 10 + index % 80,
        sex=(None, "female", "male")[index % 3],
        anatom_site_general=None,
        diagnosis_confirm_type=None,
        copyright_license="CC-BY-NC",
        attribution="",
        width=224,
        height=224,
        aspect="squashed",
    )
