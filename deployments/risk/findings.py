"""What the risk stage is given."""

from __future__ import annotations

from dataclasses import dataclass

from deployments.preprocess.quality import QualityMeasures
from serve_app.domain.assessment import Change, Classification, Neighbours, RiskLevel
from serve_app.domain.patient import ClinicalContext


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything the other stages found; width and height of the upright original in pixels.

    `compared_level` is the risk level of the image that `change` is since.
    """

    quality: QualityMeasures
    width: int
    height: int
    classification: Classification
    neighbours: Neighbours
    context: ClinicalContext
    change: Change | None
    compared_level: RiskLevel | None = None
