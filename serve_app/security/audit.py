"""What the audit log says of one action.

An event is only a value here; the record store writes it in the transaction of what it
records, so that neither can exist without the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal
from uuid import UUID

AuditOutcome = Literal["success", "denied", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEvent:
    """Who (`actor`: the token's subject) did what (`action`), to which records, and how it ended.

    `detail` is JSON-able and holds codes and ids only: never a name, a date of birth, an
    image, a token or a key; of a change of the model also who approved it and why. `purpose` is added where the event
    is written (purpose.py). The time is the database's, set when the event is written.
    """

    action: str
    actor: str
    outcome: AuditOutcome
    request_id: str
    patient_id: str | None = None
    lesion_id: UUID | None = None
    image_id: UUID | None = None
    assessment_id: UUID | None = None
    detail: Mapping[str, object] = field(default_factory=dict)
