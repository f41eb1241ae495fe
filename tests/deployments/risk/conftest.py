"""A plain, benign, well-taken case, and ways to change one thing of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from deployments.risk.policy import RiskPolicy, read_policy, with_overrides
from deployments.risk.risk import conclude
from deployments.risk.rules import Findings
from serve_app.domain.assessment import Classification, Conclusion, Neighbours, QualityMeasures, SimilarCase
from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.patient import Checklist, ClinicalContext, History

GOOD = QualityMeasures(
    sharpness=60.0, exposure=0.6, contrast=0.1, dark=0.0, bright=0.0, colour=6.0, two_levels=0.1, damaged=0.0
)
POINTS = {"melanoma": 0.08, "malignant": 0.15}
NOTHING_OF_NOTE = ClinicalContext(
    anatom_site_general=None,
    age_approx=40,
    history=History(
        personal_melanoma=False, personal_skin_cancer=False, family_melanoma=False, immunosuppression=False
    ),
    checklist=Checklist(),
)


@pytest.fixture(scope="session")
def policy() -> RiskPolicy:
    return read_policy()


@pytest.fixture(scope="session")
def classification() -> Callable[..., Classification]:
    """`classification(MEL=0.3, members="MEL NV")`: NV takes what is left to 1."""

    def build(*, members: str = "NV", **probabilities: float) -> Classification:
        named = {Diagnosis(name): p for name, p in probabilities.items()}
        rest = 1.0 - sum(named.values())
        full = dict.fromkeys(Diagnosis, 0.0) | named
        full[Diagnosis.NV] += rest
        return Classification(full, tuple(Diagnosis(m) for m in members.split()), 0.95, 1.0)

    return build


@pytest.fixture(scope="session")
def neighbours() -> Callable[..., Neighbours]:
    """`neighbours(0.3)`: that share of ten is malignant; the nearest similarities by name."""

    def case(diagnosis: Diagnosis, similarity: float) -> SimilarCase:
        return SimilarCase(
            "ISIC_0000000", None, diagnosis, "histopathology", similarity, 50, "female", None, "CC-0", "ISIC"
        )

    def build(
        share: float | None, *, benign: float | None = 0.8, malignant: float | None = 0.7
    ) -> Neighbours:
        near = case(Diagnosis.NV, 0.8)
        return Neighbours(
            similar=(near,) * 10 if share is not None else (),
            malignant_share=share,
            nearest_benign=None if benign is None else case(Diagnosis.NV, benign),
            nearest_malignant=None if malignant is None else case(Diagnosis.MEL, malignant),
        )

    return build


@pytest.fixture(scope="session")
def context() -> Callable[..., ClinicalContext]:
    """`context(age_approx=70, immunosuppression=True, checklist=None)`."""

    def build(**changes: Any) -> ClinicalContext:
        history = {name: changes.pop(name) for name in History.__dataclass_fields__ if name in changes}
        return replace(NOTHING_OF_NOTE, history=replace(NOTHING_OF_NOTE.history, **history), **changes)

    return build


@pytest.fixture(scope="session")
def assess(policy, classification, neighbours) -> Callable[..., Conclusion]:
    """`assess(classification=..., overrides={...})`: conclude, with everything else plain."""

    def run(*, overrides: Mapping[str, Any] | None = None, **changes: Any) -> Conclusion:
        given: dict[str, Any] = {
            "quality": GOOD,
            "width": 1200,
            "height": 900,
            "classification": classification(MEL=0.01),
            "neighbours": neighbours(0.0, malignant=None),
            "context": NOTHING_OF_NOTE,
            "change": None,
        }
        points = changes.pop("operating_points", POINTS)
        in_force = with_overrides(policy, overrides) if overrides else policy
        return conclude(Findings(**{**given, **changes}), in_force, points)

    return run
