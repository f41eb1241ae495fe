"""The account that decides the verdict: what it takes for lost, doubled and untyped."""

from __future__ import annotations

import httpx
import pytest

from benchmarks.faults import report_kind
from benchmarks.faults_kinds import Outcome
from benchmarks.faults_load import Account

PROBLEM = {
    "type": "urn:derm-cds:problem:overloaded",
    "title": "Service Unavailable",
    "status": 503,
    "code": "overloaded",
    "detail": "Try again.",
    "request_id": "r",
}
CONTENT = {"content-type": "application/problem+json"}


def test_a_problem_document_and_a_success_are_typed() -> None:
    account = Account()
    account.note(httpx.Response(503, json=PROBLEM, headers=CONTENT))
    account.note(httpx.Response(201, json={}))
    assert account.untyped == []
    assert account.answers == {"503 overloaded": 1, "201": 1}


@pytest.mark.parametrize(
    "response",
    [
        httpx.Response(500, text="Internal Server Error"),
        httpx.Response(503, json=PROBLEM),
        httpx.Response(503, text="{", headers=CONTENT),
        httpx.Response(503, json=[], headers=CONTENT),
        httpx.Response(500, json=PROBLEM, headers=CONTENT),
        httpx.Response(502, json={"detail": "Bad Gateway"}, headers=CONTENT),
    ],
    ids=["text", "plain JSON", "no JSON", "no object", "another status", "too little"],
)
def test_anything_else_is_not(response: httpx.Response) -> None:
    account = Account()
    account.note(response)
    assert len(account.untyped) == 1


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({}, True),
        ({"lost": ["a"]}, False),
        ({"doubled": ["a"]}, False),
        ({"untyped": ["502: "]}, False),
    ],
)
def test_the_verdict(change: dict[str, list[str]], *, kept: bool) -> None:
    outcome = Outcome("query", rounds=1, account=Account(**change), recoveries_s=[2.0])
    assert report_kind(outcome)["kept"] is kept


def test_a_slow_recovery_is_no_recovery() -> None:
    assert not report_kind(Outcome("query", rounds=1, recoveries_s=[30.5]))["kept"]
