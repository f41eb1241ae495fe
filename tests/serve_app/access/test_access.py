"""The whole matrix of the decision: roles, actions, circumstances."""

from __future__ import annotations

from itertools import chain, combinations, product
from uuid import uuid4

from serve_app.access.rules import Action, Circumstances, Role, may
from serve_app.access.tokens import Principal

# Written out by hand, and not derived from GRANTS: what a role may do, and for whom.
# "care": for patients assigned to it, or in an emergency. "assigned": for patients assigned to it.
OPEN = dict.fromkeys(("view_reference", "view_models", "describe"), "any")
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
    **{name: {} for name in ("admin", "Clinician", "clinician ", "")},
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
        decision = may(Principal("p", frozenset(roles)), action, CIRCUMSTANCES[circumstance])
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


def test_nobody_treats_and_audits_by_one_role_and_no_clinician_erases() -> None:
    clinical = {"upload", "read", "download", "list", "replay"}
    assert not clinical & {*EXPECTED["auditor"], *EXPECTED["operator"]}
    assert "erase" not in EXPECTED["clinician"]
