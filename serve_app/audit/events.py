"""What the audit log says of one action, and who the actor is where a command runs without a token.

An event is only a value here; the record store writes it in the transaction of what it
records, so that neither can exist without the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
import os
import pwd
from typing import Any, Literal
from uuid import UUID, uuid4

AuditOutcome = Literal["success", "denied", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEvent:
    """Who (`actor`: the token's subject) did what (`action`), to which records, and how it ended.

    `detail` is JSON-able and holds codes and ids only: never a name, a date of birth, an
    image, a token or a key; of a change of the model also who approved it and why. `purpose` is added where the event
    is written (`purpose_of` in access/rules.py). The time is the database's, set when the event is written.
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


def event_about(
    record: object, action: str, outcome: AuditOutcome = "success", detail: Mapping[str, object] | None = None
) -> AuditEvent:
    """Say what was done with a record: its fields of the event's names (`actor` and `request_id` at least) are it."""
    ids: dict[str, Any] = {name: getattr(record, name, None) for name in AuditEvent.__dataclass_fields__}
    return AuditEvent(**ids | {"action": action, "outcome": outcome, "detail": detail or {}})


@cache
def os_account() -> str:
    """Name the account that runs this process, or did before it stepped down: `os:` and its login name.

    Its number where it has no name. By the real user id, which the kernel keeps: LOGNAME, USER and SUDO_UID are
    whatever the caller says they are. The prefix tells it from the subject of a token.
    """
    uid = os.getuid()
    try:
        return f"os:{pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"os:{uid}"


def account_event(
    action: str,
    detail: Mapping[str, object] | None = None,
    *,
    outcome: AuditOutcome = "success",
    actor: str | None = None,
    **about: Any,  # noqa: ANN401
) -> AuditEvent:
    """Say what a command did in the name of `actor` (None: this account); `detail` and the ids as in AuditEvent."""
    by: dict[str, Any] = {"actor": os_account() if actor is None else actor, "request_id": str(uuid4())}
    return AuditEvent(action=action, outcome=outcome, detail=detail or {}, **by, **about)
