"""The shape of a replay, as the OpenAPI document publishes it."""

from __future__ import annotations

from typing import Literal

from serve_app.api.openapi import Document, ProvenanceDocument


class ReplayCauseDocument(Document):
    """Why an assessment could not be replayed; `code` is stable, `message` is for people."""

    code: Literal[
        "assessment_pending",
        "assessment_failed",
        "image_erased",
        "model_gone",
        "model_changed",
        "image_rejected",
        "preprocess_changed",
        "compared_image_gone",
        "policy_changed",
    ]
    message: str


class ReplayToleranceDocument(Document):
    """How far two numbers may be apart and still count as the same, absolutely; the score is rounded."""

    probability: float
    score: float


class DifferenceDocument(Document):
    """One field that did not come out as recorded; null where one side has no such field."""

    field: str
    recorded: str | float | list[str] | None
    recomputed: str | float | list[str] | None


class ReplayNoteDocument(Document):
    """Something that is other than then without being a difference of the answer."""

    field: Literal["similar"]
    code: Literal["references_changed"]
    message: str


class ReplayProvenanceDocument(Document):
    """What made the recorded answer, and the one made again; null where there is none."""

    recorded: ProvenanceDocument | None
    current: ProvenanceDocument | None


class ReplayDocument(Document):
    """A past answer, made again: `cannot` has a cause, `within_tolerance` and `differs` have differences."""

    assessment_id: str
    verdict: Literal["identical", "within_tolerance", "differs", "cannot"]
    cause: ReplayCauseDocument | None
    tolerance: ReplayToleranceDocument
    differences: list[DifferenceDocument]
    notes: list[ReplayNoteDocument]
    provenance: ReplayProvenanceDocument
