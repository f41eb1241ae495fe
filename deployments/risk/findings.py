"""What the risk stage is given."""

from __future__ import annotations

from dataclasses import dataclass

from deployments.preprocess.quality import QualityMeasures
from serve_app.domain.assessment import Change, Classification, Neighbours
from serve_app.domain.patient import ClinicalContext


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything the other stages found; width and height of the upright original in pixels."""

    quality: QualityMeasures
    width: int
    height: int
    classification: Classification
    neighbours: Neighbours
    context: ClinicalContext
    change: Change | None
