"""The whole matrix: roles, actions, assignment."""

from __future__ import annotations

from itertools import chain, combinations, product

import pytest

from serve_app.security.access import Action, Decision, Role, may
from serve_app.security.tokens import Principal

# Written out by hand: what a role may do for a patient assigned to it. Nobody may do
# anything for another patient.
EXPECTED = {
    "clinician": {"upload", "read", "download", "list", "replay"},
    "pms_service": {"upload", "read", "list", "replay"},
    # Roles of a later wave, and names that are none: nothing
    "supervisor": set(),
    "auditor": set(),
    "operator": set(),
    "admin": set(),
    "Clinician": set(),
    "clinician ": set(),
    "": set(),
}


def test_every_role_and_action_is_in_the_matrix() -> None:
    assert set(Role) <= set(EXPECTED)
    assert set(Action) == set().union(*EXPECTED.values())


@pytest.mark.parametrize("assigned", [True, False])
@pytest.mark.parametrize(("role", "action"), list(product(EXPECTED, Action)))
def test_one_role(role: str, action: Action, *, assigned: bool) -> None:
    decision = may(Principal("p", frozenset({role})), action, assigned=assigned)
    granted = action.value in EXPECTED[role]
    assert decision.allowed is (granted and assigned)
    assert decision.reason == ("role" if not granted else role if assigned else "assignment")


@pytest.mark.parametrize("assigned", [True, False])
@pytest.mark.parametrize("action", list(Action))
def test_several_roles_may_what_any_of_them_may(action: Action, *, assigned: bool) -> None:
    subsets = chain.from_iterable(combinations(EXPECTED, size) for size in range(len(EXPECTED) + 1))
    for roles in subsets:
        granted = any(action.value in EXPECTED[role] for role in roles)
        decision = may(Principal("p", frozenset(roles)), action, assigned=assigned)
        assert decision.allowed is (granted and assigned), roles


def test_no_role_may_do_nothing() -> None:
    assert not any(may(Principal("p", frozenset()), action, assigned=True).allowed for action in Action)


def test_a_denial_is_false() -> None:
    assert not Decision(allowed=False, reason="role")
    assert Decision(allowed=True, reason="clinician")
