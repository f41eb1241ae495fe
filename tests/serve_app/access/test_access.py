"""The whole matrix of the decision: roles, actions, circumstances; and what an action is for."""

from __future__ import annotations

from itertools import chain, combinations, product
from uuid import uuid4

import pytest

from serve_app.access.rules import (
    GRANTS,
    PURPOSE,
    Action,
    Principal,
    Purpose,
    Reach,
    Role,
    may,
    purpose_of,
    recorded_purpose,
)
from serve_app.audit.events import AuditEvent, account_event, os_account
from serve_app.keys.receipts import ErasureReason

# Written out by hand, and not derived from GRANTS: what a role may do, and for whom.
# "care": for patients assigned to it, or in an emergency. "assigned": for patients assigned to it.
OPEN = dict.fromkeys(("view_reference", "view_models", "describe"), "any")
EXPECTED = {
    "clinician": {
        **OPEN,
        **dict.fromkeys(("upload", "read", "download", "list", "replay", "confirm", "read_receipt"), "care"),
        **dict.fromkeys(("review", "record_outcome", "link", "unlink", "read_report"), "care"),
        **dict.fromkeys(("break_glass", "view_worklist"), "any"),
    },
    "supervisor": {
        **OPEN,
        **dict.fromkeys(("read", "download", "list", "replay", "read_report"), "care"),
        **dict.fromkeys(("break_glass", "erase", "read_receipt", "hold", "review_access"), "any"),
        **dict.fromkeys(("view_worklist", "view_statistics"), "any"),
    },
    "auditor": {
        **OPEN,
        **dict.fromkeys(("read_receipt", "review_access", "read_audit", "export", "view_statistics"), "any"),
    },
    "operator": {**OPEN, "observe": "any", "view_statistics": "any"},
    "pms_service": {
        **OPEN,
        **dict.fromkeys(
            ("upload", "read", "list", "replay", "read_report", "erase", "read_receipt"), "assigned"
        ),
    },
    # Names that are none of ours: nothing
    **{name: {} for name in ("admin", "Clinician", "clinician ", "")},
}
EMERGENCY = uuid4()
BOTH = {"assigned": True, "emergency": EMERGENCY}
CIRCUMSTANCES = {
    "nothing": {},
    "assigned": {"assigned": True},
    "emergency": {"emergency": EMERGENCY},
    "both": BOTH,
    "own": {**BOTH, "own": True},
}
#: What each reach is allowed by.
ALLOWED_BY = {
    "any": {"nothing", "assigned", "emergency", "both"},
    "care": {"assigned", "emergency", "both"},
    "assigned": {"assigned", "both"},
}


def allows(role: str, action: str, circumstance: str) -> bool:
    reach = EXPECTED[role].get(action)
    return reach is not None and circumstance in ALLOWED_BY[reach]


def test_every_set_of_roles_may_what_any_of_them_may_and_says_why() -> None:
    assert set(Role) <= set(EXPECTED)
    assert set(Action) == set().union(*EXPECTED.values())
    several = chain.from_iterable(combinations(EXPECTED, size) for size in range(len(EXPECTED) + 1))
    cases = [*product(several, Action, CIRCUMSTANCES)]
    assert len(cases) == 2 ** len(EXPECTED) * len(Action) * len(CIRCUMSTANCES)
    for roles, action, circumstance in cases:
        decision = may(Principal("p", frozenset(roles)), action, **CIRCUMSTANCES[circumstance])
        said = (roles, action, circumstance, decision)
        granting = {role for role in roles if allows(role, action, circumstance)}
        assert bool(decision) is decision.allowed is bool(granting), said
        # An assignment goes first: only what needs the emergency is put down to it.
        without = {"emergency": "nothing", "both": "assigned"}.get(circumstance, circumstance)
        needs_it = decision.allowed and not any(allows(role, action, without) for role in roles)
        assert decision.emergency == (EMERGENCY if needs_it else None), said
        if granting:
            assert decision.reason in granting, said
        elif not any(action in EXPECTED[role] for role in roles):
            assert decision.reason == "role", said
        else:
            assert decision.reason == ("own" if circumstance == "own" else "assignment"), said


def made(action: str, *, actor: str = "dr", **detail: object) -> AuditEvent:
    return AuditEvent(action=action, actor=actor, outcome="success", request_id="r", detail=detail)


@pytest.mark.parametrize(
    ("roles", "purpose"),
    [
        ({"clinician"}, "TREAT"),
        ({"pms_service"}, "TREAT"),
        ({"supervisor"}, "HOPERAT"),
        ({"auditor"}, "HCOMPL"),
        ({"operator"}, "HSYSADMIN"),
        ({"supervisor", "clinician"}, "TREAT"),
        ({"gardener"}, None),
        (set(), None),
    ],
)
def test_a_read_is_for_what_its_reader_is_there_for(roles: set[str], purpose: str | None) -> None:
    assert purpose_of(made("read"), frozenset(roles)) == purpose
    assert purpose_of(made("read_receipt"), frozenset(roles)) == purpose


def test_some_actions_have_one_purpose_whoever_does_them() -> None:
    actions = {
        "break_glass": "ETREAT",
        "classify": "TREAT",
        **dict.fromkeys(("hold_set", "hold_release"), "HLEGAL"),
        **dict.fromkeys(("review_access", "export", "read_audit"), "HCOMPL"),
        **dict.fromkeys(("disclose", "record_close", "record_reopen"), "HOPERAT"),
    }
    for action, purpose in actions.items():
        for roles in (None, frozenset({"supervisor"}), frozenset({"clinician"})):
            assert purpose_of(made(action, actor="os:root"), roles) == purpose, action


@pytest.mark.parametrize("action", ["erase", "erased"])
@pytest.mark.parametrize("reason", ErasureReason)
def test_an_erasure_is_for_its_reason_and_never_treatment(action: str, reason: ErasureReason) -> None:
    asked = reason in {ErasureReason.PATIENT_REQUEST, ErasureReason.CONSENT_WITHDRAWN}
    for roles in (None, frozenset({"supervisor"}), frozenset({"pms_service"})):
        assert purpose_of(made(action, reason=reason), roles) == ("PATRQT" if asked else "HOPERAT")


def test_what_rests_on_an_emergency_is_emergency_treatment() -> None:
    assert purpose_of(made("read", emergency_access="e"), frozenset({"supervisor"})) == "ETREAT"


def test_what_a_command_does_is_administration_and_what_nobody_does_has_no_purpose() -> None:
    assert account_event("model_promote").actor == os_account()
    for action in ("model_promote", "patient_load", "assign", "revoke", "key_rotate", "backup"):
        assert purpose_of(account_event(action)) == "HSYSADMIN"
    assert purpose_of(made("authenticate", actor="unauthenticated")) is None


def test_every_action_that_a_role_is_granted_has_a_purpose_and_treatment_is_of_patients_in_care() -> None:
    of_nobody = {Action.VIEW_REFERENCE, Action.VIEW_MODELS, Action.DESCRIBE, Action.VIEW_WORKLIST}
    for role in Role:
        for action, reach in GRANTS[role].items():
            purpose = purpose_of(made(action), frozenset({role}))
            assert purpose is not None
            assert purpose is not Purpose.TREATMENT or reach is not Reach.ANY or action in of_nobody


def test_an_event_from_before_there_was_a_purpose_has_none() -> None:
    assert recorded_purpose(made("read")) is None
    assert recorded_purpose(made("read", **{PURPOSE: "PATRQT"})) is Purpose.PATIENT_REQUEST
    assert recorded_purpose(made("read", **{PURPOSE: "a code of tomorrow"})) is None
