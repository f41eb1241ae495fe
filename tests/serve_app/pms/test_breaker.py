"""The circuit breaker, on a clock of the test's own."""

from __future__ import annotations

import pytest

from serve_app.pms.client import CircuitBreaker, State


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


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


def test_one_trial_goes_through_after_the_rest(breaker, clock) -> None:
    open_it(breaker)
    clock.now += 9.9
    assert not breaker.enter()
    clock.now += 0.1
    assert breaker.state is State.HALF_OPEN
    assert [breaker.enter() for _ in range(3)] == [True, False, False]


def test_a_trial_that_succeeds_closes_it(breaker, clock) -> None:
    open_it(breaker)
    clock.now += 10
    assert breaker.enter()
    breaker.succeed()
    assert [breaker.enter() for _ in range(3)] == [True] * 3


def test_a_trial_that_fails_opens_it_for_another_rest(breaker, clock) -> None:
    open_it(breaker)
    clock.now += 10
    assert breaker.enter()
    breaker.fail()
    clock.now += 9
    assert not breaker.enter()
    clock.now += 1
    assert breaker.enter()


def test_a_trial_that_never_reports_gives_way(breaker, clock) -> None:
    open_it(breaker)
    clock.now += 10
    assert breaker.enter()
    clock.now += 10
    assert breaker.enter()
