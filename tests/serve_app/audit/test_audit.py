"""The audit event is a plain value."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
import pickle
from uuid import UUID

import pytest

from serve_app.audit.events import AuditEvent


def test_an_event_is_a_frozen_value() -> None:
    event = AuditEvent(
        action="upload", actor="dr", outcome="denied", request_id="r", detail={"reason": "role"}
    )
    assert (event.patient_id, event.lesion_id, event.image_id, event.assessment_id) == (None,) * 4
    with pytest.raises(FrozenInstanceError):
        event.outcome = "success"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(event)) == event  # noqa: S301


def test_events_share_no_detail() -> None:
    first = AuditEvent(action="read", actor="dr", outcome="success", request_id="r", lesion_id=UUID(int=1))
    second = AuditEvent(action="read", actor="dr", outcome="success", request_id="r", lesion_id=UUID(int=1))
    assert first == second
    assert first.detail is not second.detail
