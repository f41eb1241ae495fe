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
import re
from typing import Any, Literal
import unicodedata
from uuid import UUID, uuid4

AuditOutcome = Literal["success", "denied", "failed"]

#: Who acts where no token does: the delivery to the PMS, retention that is due, and whoever is not known.
OUTBOX, RETENTION, NOBODY = "derm-cds:outbox", "retention", "unauthenticated"
#: An EHR that asks or tells by CDS Hooks without a clinician who is known here: with its name behind.
EHR = "derm-cds:hooks:"
_ACCOUNT = "os:"


def is_own_actor(name: str) -> bool:
    """Whether an event's actor is the service itself or an account of the machine, and no caller."""
    return name in {OUTBOX, RETENTION} or name.startswith(_ACCOUNT)


def _look_alike(name: str) -> str:
    """Match what reads like a name: a letter or a sign of another script may stand for any; 0 and 1 for o and i."""
    digits, letter, sign = {"o": "0", "i": "1l|"}, r"[^\W\x00-\x7f]", r"[^\w\x00-\x7f]|\u02d0"
    return "".join(
        f"(?:[{each}{digits.get(each, '')}]|{letter if each.isalpha() else sign})" for each in name
    )


_OWN = re.compile(
    f"(?=.*[a-z0-9])(?:{_look_alike(_ACCOUNT)}|{_look_alike('derm-cds:')}"
    f"|(?:{_look_alike('derm-cds')}|{_look_alike(RETENTION)}|{_look_alike(NOBODY)})$)"
)


def reads_like_own_actor(name: str) -> bool:
    """Whether a subject could be taken for one of these in the log: in any case, compatibility form or look-alike letters.

    A name without any Latin letter or digit cannot.
    """
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", name).casefold())
    shown = "".join(each for each in folded if unicodedata.category(each)[0] not in "CMZ")
    return _OWN.match(shown) is not None


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
    whatever the caller says they are. The prefix tells it from the subject of a token: none may have one like it
    (access/tokens.py).
    """
    uid = os.getuid()
    try:
        return f"{_ACCOUNT}{pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"{_ACCOUNT}{uid}"


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
