"""Values of every kind the record takes, with something in each field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
import os
from uuid import uuid4

import numpy as np
import pytest

from serve_app.audit.events import AuditEvent, event_about
from serve_app.domain.assessment import (
    Assessment,
    Change,
    Classification,
    Factor,
    Neighbours,
    Outcome,
    Provenance,
    Quality,
    Reason,
    ReferenceFilter,
    Risk,
    RiskLevel,
    SimilarCase,
    Urgency,
)
from serve_app.domain.diagnosis import TRAINED, Diagnosis
from serve_app.domain.patient import AnatomSite, Checklist, ClinicalContext, History, Sex
from serve_app.keys.envelope import DataKey, ImageBinding, seal
from serve_app.records.lesion_rows import Admission
from serve_app.records.references import ReferenceImage
from serve_app.records.serving import LiveModel, publish

SPACE = "lite0.1"


def reference_image(number: int, **overrides: object) -> ReferenceImage:
    """Make a reference by its number."""
    values = {
        "isic_id": f"ISIC_{number:07d}",
        "lesion_id": f"IL_{number}",
        "diagnosis": TRAINED[number % 8],
        "diagnosis_confirm_type": "histopathology",
        "age_approx": 50,
        "sex": "female",
        "anatom_site_general": "torso",
        "copyright_license": "CC-0",
        "attribution": "Anonymous",
    }
    return ReferenceImage(**{**values, **overrides})


@pytest.fixture(scope="session")
def unit_vectors() -> Callable[..., np.ndarray]:
    """Make n random unit vectors of the embedding's width."""

    def make(n: int, seed: int = 0) -> np.ndarray:
        vectors = np.random.default_rng(seed).normal(size=(n, 512))
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    return make


@pytest.fixture(scope="session")
def event() -> Callable[..., AuditEvent]:
    """Make an audit event."""

    def make(action: str = "upload", **overrides: object) -> AuditEvent:
        values = {"actor": "dr", "outcome": "success", "request_id": "request", "detail": {"code": "x"}}
        return AuditEvent(action=action, **{**values, **overrides})

    return make


@pytest.fixture(scope="session")
def admission() -> Callable[..., Admission]:
    """Make an admission of a sealed image of a new lesion."""

    def make(**overrides: object) -> Admission:
        image_id, patient_id = uuid4(), str(overrides.get("patient_id", "patient"))
        key = DataKey(uuid4(), os.urandom(32), spent=False)
        values: dict[str, object] = {
            "assessment_id": uuid4(),
            "lesion_id": uuid4(),
            "image_id": image_id,
            "patient_id": patient_id,
            "encounter_id": "encounter",
            "new_lesion": True,
            "created_at": datetime.now(UTC),
            "sealed": seal(b"image", data_key=key, binding=ImageBinding(image_id, patient_id, "image/png")),
            "content_type": "image/png",
            "width": 600,
            "height": 450,
            "context": ClinicalContext(
                AnatomSite.PALMS_SOLES, 60, Sex.FEMALE, History(family_melanoma=True), Checklist(oozing=True)
            ),
            "top_k": 10,
            "reference_filter": ReferenceFilter(licences=("CC-0",), confirmed_only=True),
            "actor": "dr",
            "request_id": "request",
            "idempotency_key": None,
            "request_sha256": None,
            **overrides,
        }
        return Admission(**values)

    return make


@pytest.fixture(scope="session")
def request_digest() -> bytes:
    """A SHA-256 of some request."""
    return sha256(b"request").digest()


@pytest.fixture(scope="session")
def assessment(unit_vectors) -> Callable[..., Assessment]:
    """Make a finished assessment with everything in it."""

    def make(**overrides: object) -> Assessment:
        case = SimilarCase(
            "ISIC_1", None, Diagnosis.MEL, None, 0.9, None, None, "torso", "CC-BY", "Anonymous"
        )
        other = SimilarCase(
            "ISIC_2", "IL_2", Diagnosis.NV, "histopathology", 0.8, 45, "male", None, "CC-0", "Anonymous"
        )
        probabilities = dict.fromkeys(Diagnosis, 0.0) | {Diagnosis.MEL: 0.7, Diagnosis.NV: 0.3}
        values: dict[str, object] = {
            "outcome": Outcome.REVIEW,
            "reasons": (Reason("low_margin", "Two are close.", "Look."),),
            "quality": Quality(
                0.5, 1.0, 0.25, 0.0, 0.125, 600, 450, acceptable=True, colour=6.0, two_levels=0.0, damaged=0.0
            ),
            "classification": Classification(probabilities, (Diagnosis.MEL, Diagnosis.NV), 0.95, 3.0),
            "risk": Risk(RiskLevel.HIGH, Urgency.URGENT, 1.0, (Factor("mel", "raises", "Why"),), "policy-1"),
            "neighbours": Neighbours((case, other), 0.5, other, case),
            "similar": (other,),
            "change": Change("2026-01-01T00:00:00Z", str(uuid4()), None, 0.1),
            "provenance": Provenance("lite0.a", "digest", SPACE, "1", "policy-1", "0.1.0"),
            "embedding": unit_vectors(1)[0],
            "timings_ms": {"classifier": 12.0, "total": 33.25},
            **overrides,
        }
        return Assessment(**values)

    return make


@pytest.fixture(scope="module")
async def space(owner_pool) -> str:
    """An embedding space with a live model."""
    await publish(owner_pool, LiveModel("lite0.a", "digest", SPACE))
    return SPACE


@pytest.fixture
async def answered(lesions, admission, assessment, event, space):
    """Make an image on record with its answer, of a level and an urgency: `(level, urgency, **admission)`."""

    async def make(level: str = "high", urgency: str = "urgent", **named: object) -> Admission:
        case = admission(**named)
        await lesions.admit(case)
        risk = replace(assessment().risk, level=RiskLevel(level), urgency=Urgency(urgency))
        done = {"embedding_space": space, "event": event_about(case, "classify")}
        assert await lesions.complete(case.assessment_id, assessment(risk=risk), **done)
        return case

    return make
