"""Too many requests: 429 with Retry-After, and an audit log that nobody can flood."""

from __future__ import annotations

from functools import partial
from uuid import uuid4

import pytest

from serve_app.access import rate_limit
from serve_app.access.rate_limit import AuditBudget, TokenBuckets, sender_address
from tests.serve_app.conftest import Clock


def test_a_bucket_gives_its_burst_and_then_its_rate() -> None:
    clock = Clock()
    buckets = TokenBuckets(rate_per_s=2, burst=3, clock=clock)
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, 0.5]
    assert buckets.take("b") == 0
    clock.now += 0.25
    assert buckets.take("a") == 0.25
    clock.now += 0.25
    assert [buckets.take("a"), buckets.take("a")] == [0, 0.5]
    clock.now += 3600
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, 0.5]


def test_buckets_take_bounded_memory_and_a_clock_that_stands_still_gives_nothing_more(monkeypatch) -> None:
    monkeypatch.setattr(rate_limit, "MAX_KEYS", 10)
    buckets = TokenBuckets(rate_per_s=1000, burst=1, clock=Clock())
    for n in range(1000):
        assert buckets.take(str(n)) == 0
        assert buckets.take(str(n)) > 0
    assert len(buckets._buckets) == 10


def test_a_budget_is_each_keys_and_all_keys_together() -> None:
    clock = Clock()
    budget = AuditBudget(per_key=2, total=3, clock=clock)
    assert [budget.spend("a") for _ in range(4)] == [True, True, False, False]
    assert [budget.spend(key) for key in ("b", "c", "d")] == [True, False, False]
    assert len(budget._written) == 2
    clock.now += 60
    assert budget.spend("a")
    assert budget.drain() == 4
    assert budget.drain() == 0


@pytest.fixture
def limited(start_service, local_stages):
    return partial(start_service, local_stages())


async def refusals(service, client: str) -> int:
    query = "SELECT count(*) FROM audit_events WHERE detail ->> 'client' = $1"
    return await service.owner.fetchval(query, client)


async def test_a_principal_that_asks_too_often_waits(limited) -> None:
    async with limited(rate_limit_per_s=0.01, rate_limit_burst=4) as service:
        subject = f"dr-{uuid4().hex[:8]}"
        answers = [
            await service.client.get("/api/references/x/image", headers=service.token(subject))
            for _ in range(10)
        ]
        assert [answer.status_code for answer in answers] == [404] * 4 + [429] * 6
        for answer in answers[4:]:
            service.hold_to_problem(answer, 429, "rate_limited")
            assert 60 < int(answer.headers["retry-after"]) <= 100
        rows = await service.owner.fetch(
            "SELECT action, outcome, detail FROM audit_events WHERE actor = $1 AND detail ->> 'reason' IS NOT NULL",
            subject,
        )
        assert len(rows) in {1, 2}  # a window may have ended meanwhile
        assert tuple(rows[0])[:2] == ("view_reference", "denied")
        other = await service.client.get("/api/references/x/image", headers=service.token("another"))
        assert other.status_code == 404


async def test_strangers_cannot_flood_the_log_and_keep_nobody_out(limited) -> None:
    async with limited(unauthenticated_per_minute=5) as service:
        before = await refusals(service, "127.0.0.1")
        answers = [await service.client.get("/api/lesions") for _ in range(40)]
        codes = [answer.status_code for answer in answers]
        assert codes[:5] == [401] * 5
        assert codes.count(429) >= 30
        after = await refusals(service, "127.0.0.1")
        assert after - before == codes.count(401)
        # Whoever has a token does not wait behind who has none.
        answer = await service.get("/api/references/x/image")
        assert answer.status_code == 404
        await service.app.state.services.authenticator.summarise()
        (summary,) = await service.owner.fetch(
            "SELECT * FROM audit_events WHERE actor = 'unauthenticated' AND detail ? 'not_listed'"
            " ORDER BY event_id DESC LIMIT 1"
        )
        assert summary["detail"] == {"code": "unauthenticated", "not_listed": codes.count(429)}
        await service.app.state.services.authenticator.summarise()
        assert await service.owner.fetchval("SELECT max(event_id) FROM audit_events") == summary["event_id"]


async def test_many_addresses_do_not_make_many_events(limited) -> None:
    async with limited(
        unauthenticated_per_minute=2, refusal_events_per_minute=6, trusted_proxies="127.0.0.1"
    ) as service:
        before = await service.counts()
        for n in range(30):
            headers = {"X-Forwarded-For": f"10.1.2.{n}"}
            answer = await service.client.get("/api/lesions", headers=headers)
            service.hold_to_problem(answer, 401, "unauthenticated")
        after = await service.counts()
        assert after["audit_events"] - before["audit_events"] in {6, 12}  # a window may have ended meanwhile
        assert await refusals(service, "10.1.2.0") == 1


@pytest.mark.parametrize(
    ("trusted", "forwarded", "seen"),
    [
        ([], "10.9.9.9", "127.0.0.1"),
        (["127.0.0.1"], "10.9.9.9", "10.9.9.9"),
        (["127.0.0.1"], "1.2.3.4, 10.9.9.8", "10.9.9.8"),
        (["127.0.0.1", "10.9.9.7"], "1.2.3.4, 10.9.9.6, 10.9.9.7", "10.9.9.6"),
        (["127.0.0.1"], "2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        (["127.0.0.1"], "::ffff:10.9.9.5", "10.9.9.5"),
        (["127.0.0.1"], "10.9.9.4, nonsense", "127.0.0.1"),
    ],
)
def test_an_address_is_believed_as_far_as_its_proxy(trusted: list[str], forwarded: str, seen: str) -> None:
    assert sender_address("127.0.0.1", [forwarded], trusted) == seen
    assert sender_address("a socket", [forwarded], trusted) == "unknown"


async def test_bad_parameters_are_counted_past_their_bound(limited) -> None:
    async with limited(unauthenticated_per_minute=3) as service:
        subject = f"dr-{uuid4().hex[:8]}"
        for _ in range(12):
            answer = await service.client.get("/api/lesions", headers=service.token(subject))
            service.hold_to_problem(answer, 422, "invalid_field")
        written = await service.owner.fetchval("SELECT count(*) FROM audit_events WHERE actor = $1", subject)
        assert written in {3, 6}  # a window may have ended meanwhile
        assert service.app.state.services.authenticator._budgets["invalid_field"].drain() == 12 - written
