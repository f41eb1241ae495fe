"""One request's attempt at an action: who asks, for what, and whether the audit log has it.

Kept for the request that is under way, so that every event written for it says on which emergency
access it rests, and so that what fails is recorded exactly once, whichever route it fails in.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from uuid import UUID

from serve_app.security.audit import AuditEvent, AuditOutcome
from serve_app.security.tokens import Principal


@dataclass(slots=True)
class Attempt:
    """What is known of it so far; the ids fill in on the way.

    `emergency`: the emergency access that the permission rests on. `recorded`: an event was written.
    """

    principal: Principal
    action: str
    request_id: str
    patient_id: str | None = None
    lesion_id: UUID | None = None
    image_id: UUID | None = None
    assessment_id: UUID | None = None
    emergency: UUID | None = None
    recorded: bool = False

    def event(self, outcome: AuditOutcome, /, **detail: object) -> AuditEvent:
        """Say how it ended; `detail` holds codes and ids only."""
        return AuditEvent(
            action=self.action,
            actor=self.principal.subject,
            outcome=outcome,
            patient_id=self.patient_id,
            lesion_id=self.lesion_id,
            image_id=self.image_id,
            assessment_id=self.assessment_id,
            request_id=self.request_id,
            detail=detail,
        )


_current: ContextVar[Attempt | None] = ContextVar("attempt", default=None)


def begin(attempt: Attempt | None) -> None:
    """From here on, this request is this attempt; None where nobody is known yet."""
    _current.set(attempt)


def attempt_of(request_id: str) -> Attempt | None:
    """Find the attempt that is under way here; None for events of anything but this request."""
    attempt = _current.get()
    return attempt if attempt is not None and attempt.request_id == request_id else None
