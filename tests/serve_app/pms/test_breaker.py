"""The circuit breaker, on a clock of the test's own."""

from __future__ import annotations

import pytest

from serve_app.pms.client import CircuitBreaker, State
from tests.serve_app.conftest import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker(failures=3, rest_s=10, clock=clock)


def open_it(breaker: CircuitBreaker) -> None:
    for _ in range(3):
        assert breaker.enter()
        breaker.fail()


def test_it_opens_after_failures_in_a_row_only(breaker) -> None:
    for _ in range(5):
        breaker.fail()
        breaker.fail()
        breaker.succeed()
    assert breaker.state is State.CLOSED
    open_it(breaker)
    assert breaker.state is State.OPEN
    assert not breaker.enter()


@pytest.mark.parametrize("ends", [CircuitBreaker.succeed, CircuitBreaker.fail, None])
def test_one_trial_after_the_rest_decides(breaker, clock, ends) -> None:
    """One that never reports gives way after another rest, as one that fails does."""
    open_it(breaker)
    clock.now += 9.9
    assert not breaker.enter()
    clock.now += 0.1
    assert breaker.state is State.HALF_OPEN
    assert [breaker.enter() for _ in range(3)] == [True, False, False]
    if ends is not None:
        ends(breaker)
    clock.now += 9
    closed = ends is CircuitBreaker.succeed
    assert [breaker.enter() for _ in range(3)] == [closed] * 3
    clock.now += 1
    assert breaker.enter()
