"""Who runs a command on this machine: the audit log's actor for what no token was needed for."""

from __future__ import annotations

from collections.abc import Mapping
import os
import pwd
from uuid import uuid4

from serve_app.security.audit import AuditEvent, AuditOutcome


def os_account() -> str:
    """Name the account that runs this process: `os:` and its login name, or its number where it has no name.

    By the real user id, which the kernel keeps: LOGNAME, USER and SUDO_UID are whatever the caller says they are.
    The prefix tells it from the subject of a token.
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
    patient_id: str | None = None,
) -> AuditEvent:
    """Say that this account did something; `detail` as in AuditEvent."""
    return AuditEvent(
        action=action,
        actor=os_account(),
        outcome=outcome,
        patient_id=patient_id,
        request_id=str(uuid4()),
        detail=detail or {},
    )
