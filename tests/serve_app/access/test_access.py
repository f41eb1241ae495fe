"""The whole matrix of the decision: roles, actions, circumstances."""

from __future__ import annotations

from itertools import chain, combinations, product
from uuid import uuid4

import pytest

from serve_app.access.rules import Action, Circumstances, Decision, Role, may
from serve_app.access.tokens import Principal

# Written out by hand, and not derived from GRANTS: what a role may do, and for whom.
# "care": for patients assigned to it, or in an emergency. "assigned": for patients assigned to it.
OPEN = {"view_reference": "any", "view_models": "any", "describe": "any"}
EXPECTED = {
    "clinician": {
        **OPEN,
        **dict.fromkeys(("upload", "read", "download", "list", "replay", "confirm", "read_receipt"), "care"),
        "break_glass": "any",
    },
    "supervisor": {
        **OPEN,
        **dict.fromkeys(("read", "download", "list", "replay"), "care"),
        **dict.fromkeys(("break_glass", "erase", "read_receipt", "hold", "review_access"), "any"),
    },
    "auditor": {**OPEN, **dict.fromkeys(("read_receipt", "review_access", "read_audit", "export"), "any")},
    "operator": OPEN,
    "pms_service": {
        **OPEN,
        **dict.fromkeys(("upload", "read", "list", "replay", "erase", "read_receipt"), "assigned"),
    },
    # Names that are none of ours: nothing
    "admin": {},
    "Clinician": {},
    "clinician ": {},
    "": {},
}
EMERGENCY = uuid4()
CIRCUMSTANCES = {
    "nothing": Circumstances(),
    "assigned": Circumstances(assigned=True),
    "emergency": Circumstances(emergency=EMERGENCY),
    "both": Circumstances(assigned=True, emergency=EMERGENCY),
    "own": Circumstances(assigned=True, emergency=EMERGENCY, own=True),
}
#: What each reach is allowed by.
ALLOWED_BY = {
    "any": {"nothing", "assigned", "emergency", "both"},
    "care": {"assigned", "emergency", "both"},
    "assigned": {"assigned", "both"},
}


def expected(role: str, action: str, circumstance: str) -> bool:
    reach = EXPECTED[role].get(action)
    return reach is not None and circumstance in ALLOWED_BY[reach]


def test_every_role_and_action_is_in_the_matrix() -> None:
    assert set(Role) <= set(EXPECTED)
    assert set(Action) == set().union(*EXPECTED.values())


@pytest.mark.parametrize("circumstance", CIRCUMSTANCES)
@pytest.mark.parametrize(("role", "action"), list(product(EXPECTED, Action)))
def test_one_role(role: str, action: Action, circumstance: str) -> None:
    decision = may(Principal("p", frozenset({role})), action, CIRCUMSTANCES[circumstance])
    assert decision.allowed is expected(role, action, circumstance)
    if action not in EXPECTED[role]:
        assert decision.reason == "role"
    elif decision:
        assert decision.reason == role
    else:
        assert decision.reason == ("own" if circumstance == "own" else "assignment")


@pytest.mark.parametrize("circumstance", CIRCUMSTANCES)
@pytest.mark.parametrize("action", list(Action))
def test_several_roles_may_what_any_of_them_may(action: Action, circumstance: str) -> None:
    subsets = chain.from_iterable(combinations(EXPECTED, size) for size in range(len(EXPECTED) + 1))
    for roles in subsets:
        decision = may(Principal("p", frozenset(roles)), action, CIRCUMSTANCES[circumstance])
        assert decision.allowed is any(expected(role, action, circumstance) for role in roles), roles


def test_only_what_needs_the_emergency_is_put_down_to_it() -> None:
    clinician = Principal("p", frozenset({"clinician"}))
    assert may(clinician, Action.READ, CIRCUMSTANCES["emergency"]).emergency == EMERGENCY
    assert may(clinician, Action.READ, CIRCUMSTANCES["both"]).emergency is None
    supervisor = Principal("p", frozenset({"clinician", "supervisor"}))
    assert may(supervisor, Action.ERASE, CIRCUMSTANCES["emergency"]).emergency is None


def test_nobody_treats_and_audits_by_one_role() -> None:
    clinical = {Action.UPLOAD, Action.READ, Action.DOWNLOAD, Action.LIST, Action.REPLAY}
    for role in ("auditor", "operator"):
        assert not clinical & {Action(action) for action in EXPECTED[role]}


def test_a_clinician_alone_erases_nothing() -> None:
    for circumstances in CIRCUMSTANCES.values():
        assert not may(Principal("p", frozenset({"clinician"})), Action.ERASE, circumstances)


def test_no_role_may_do_nothing() -> None:
    assert not any(
        may(Principal("p", frozenset()), action, Circumstances(assigned=True)).allowed for action in Action
    )


def test_a_denial_is_false() -> None:
    assert not Decision(allowed=False, reason="role")
    assert Decision(allowed=True, reason="clinician")
