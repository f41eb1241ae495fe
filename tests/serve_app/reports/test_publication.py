"""A report is made once, asked for by those who may, and told to the PMS once."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
import json
from uuid import uuid4

import pytest

from serve_app.domain.errors import InvalidField, NotFound
from serve_app.pms.client import PmsClient
from serve_app.pms.messages import pms_resources
from serve_app.records.reconciliation import reconcile
from serve_app.records.reports import ReportKind, ReportStore
from serve_app.reports.publication import Reports


@pytest.fixture
async def reports(queue) -> Reports:
    """In a database of its own, a while from now: this month is over."""
    return Reports(store=ReportStore(queue.lesions._pool), now=lambda: datetime.now(UTC) + timedelta(days=40))


async def test_a_report_is_made_once_and_never_again(queue, reports) -> None:
    for _ in range(6):
        await queue.finish(None)
    month = f"{datetime.now(UTC):%Y-%m}"
    found = await asyncio.gather(*(reports.report(ReportKind.SUMMARY, month) for _ in range(4)))
    assert len({each.report_id for each in found}) == 1
    tables = found[0].document["tables"]
    assert tables["assessments"] == {
        "decided": 0,
        "review": 6,
        "refused": 0,
        "failed": 0,
        "cancelled": 0,
        "total": 6,
    }
    assert tables["diagnoses"]["MEL"] == 6
    assert tables["adoption"]["told_by_pms"] is False
    await queue.finish(None)
    assert await reports.report(ReportKind.SUMMARY, month) == found[0]
    # The model's lesions, none with an outcome: unknown, not benign.
    (model,) = (await reports.report(ReportKind.PERFORMANCE)).document["tables"]["models"]
    assert (model["all"]["lesions"], model["all"]["with_outcome"], model["all"]["benign"]["n"]) == (7, 0, 0)
    assert model["all"]["melanoma"]["sensitivity"] is None


async def test_a_month_that_is_not_over_has_no_report_and_an_old_one_no_performance(reports) -> None:
    with pytest.raises(InvalidField, match="not over"):
        await reports.report(ReportKind.SUMMARY, "2199-01")
    with pytest.raises(InvalidField, match="month"):
        await reports.report(ReportKind.SUMMARY, "2026-13")
    assert (await reports.report(ReportKind.SUMMARY, "2020-05")).document["tables"]["assessments"][
        "total"
    ] == 0
    with pytest.raises(NotFound):
        await reports.report(ReportKind.PERFORMANCE, "2020-05")


async def test_what_changed_by_few_since_the_last_performance_is_hidden(queue, reports) -> None:
    for _ in range(9):
        await queue.finish(None)
    first = await reports.report(ReportKind.PERFORMANCE)
    assert first.document["tables"]["models"][0]["all"]["lesions"] == 9
    for _ in range(2):
        await queue.finish(None)
    later = Reports(store=reports.store, now=lambda: reports.now() + timedelta(days=31))
    second = await later.report(ReportKind.PERFORMANCE)
    assert second.period > first.period
    assert second.document["tables"]["models"][0]["all"]["lesions"] is None
    for _ in range(3):
        await queue.finish(None)
    third = Reports(store=reports.store, now=lambda: reports.now() + timedelta(days=62))
    assert (await third.report(ReportKind.PERFORMANCE)).document["tables"]["models"][0]["all"][
        "lesions"
    ] == 14


async def test_the_pms_is_told_each_report_once_however_many_replicas_push(queue, pms, reports) -> None:
    for _ in range(8):
        await queue.finish("e-1")
    telling = Reports(store=reports.store, tells_pms=True, now=reports.now)
    made = await asyncio.gather(*(telling.publish_due() for _ in range(4)))
    resources = pms_resources(queue.lesions._pool, pms_url=pms.url)
    delivery = queue.delivery(resources=resources)
    while await delivery.deliver_due():
        pass
    told = pms.others["/api/reports"]
    assert [body["kind"] for _, body in told] == ["summary", "performance"]
    assert [body["report_id"] for _, body in told] == [str(each.report_id) for each in made[0]]
    # What was told is what is on record; no patient and no id of one is in it.
    assert told[0][1] == json.loads(json.dumps(made[0][0].answer()))
    assert "shown" not in told[1][1]
    rows = await queue.owner.fetch("SELECT patient_id, lesion_id, image_id, encounter_id FROM lesion_images")
    assert not [
        value
        for row in rows
        for value in row.values()
        if value != "patient" and str(value) in json.dumps(told)
    ]
    events = await queue.owner.fetch(
        "SELECT detail FROM audit_events WHERE action = 'disclose' AND detail ->> 'kind' = 'report'"
    )
    assert {row["detail"]["told_id"] for row in events} == {body["report_id"] for _, body in told}
    assert len(events) == 2
    await telling.publish_due()
    assert await delivery.deliver_due() == 0
    assert not (await reconcile(queue.owner)).differences


@pytest.mark.parametrize(
    ("told", "share"),
    [
        ({"skin_complaint_encounters": 20}, 0.5),
        ({}, None),
        ({"skin_complaint_encounters": "20"}, None),
        (None, None),
    ],
)
async def test_adoption_is_what_the_pms_can_tell(queue, reports, told, share) -> None:
    """Ten encounters of twenty; and null, said so, where the PMS does not tell or says nonsense."""
    for n in range(10):
        await queue.finish(f"e-{n}")
    asked = []

    class Told(PmsClient):
        def __init__(self) -> None:
            pass

        async def get(self, *path: str, timeout_s: float):  # noqa: ARG002
            asked.append(path)
            status, period = (404, {}) if told is None else (200, {"period": path[-1]})
            return type("Answer", (), {"status": status, "body": {**period, **(told or {})}})()

    month = f"{datetime.now(UTC):%Y-%m}"
    telling = Reports(store=reports.store, client=Told(), now=reports.now)
    adoption = (await telling.report(ReportKind.SUMMARY, month)).document["tables"]["adoption"]
    assert asked == [("api", "statistics", month)]
    assert (adoption["share"] or {}).get("value") == share
    assert adoption["told_by_pms"] is (share is not None)


async def test_routes_answer_by_role_with_one_event_each_and_the_published_shape(service) -> None:
    for role in ("supervisor", "auditor", "operator"):
        for kind in ("summary", "performance"):
            answer = await service.client.get(
                f"/api/reports/{kind}", headers=service.token(f"x-{uuid4().hex[:6]}", (role,))
            )
            assert answer.status_code == 200, answer.text
            service.hold_to(f"{kind.capitalize()}ReportDocument", answer.json())
            body = answer.json()
            said = {"report": kind, "period": body["period"], "report_id": body["report_id"]}
            await service.hold_to_event(answer, "view_statistics", "success", **said)
    headers = service.token("x-pms", ("pms_service",))
    service.hold_to_problem(
        await service.client.get("/api/reports/summary", headers=headers), 403, "forbidden"
    )
    headers = service.token("x-op", ("operator",))
    for params in ({"period": "2099-12"}, {"period": "yesterday"}, {"site": "torso"}):
        answer = await service.client.get("/api/reports/summary", params=params, headers=headers)
        service.hold_to_problem(answer, 422, "invalid_field")
