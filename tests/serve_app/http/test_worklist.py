"""The worklist as its caller sees it: their own patients, what each image needs, and who was shown to whom on record."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import uuid4

from pydantic import SecretStr, ValidationError
import pytest

from serve_app.settings import Settings
from tests.serve_app.erasure.erasing import followed, uploaded

URL = "/api/worklist"


async def listed(service, subject: str, roles=("clinician",), **params):
    response = await service.client.get(URL, params=params, headers=service.token(subject, roles))
    assert response.status_code == 200, response.text
    assert response.headers["cache-control"] == "no-store"
    service.hold_to("WorklistDocument", response.json())
    return response


@pytest.fixture
async def clinician(service) -> str:
    return f"dr-{uuid4().hex[:8]}"


async def upload(service, subject: str, patient: str | None = None, **fields):
    patient = await service.care(subject, patient)
    response = await service.upload(patient, subject=subject, **fields)
    assert response.status_code == 201, response.text
    return response.json()


async def test_an_upload_waits_with_what_it_demands(service, clinician) -> None:
    answer = await upload(service, clinician)
    (item,) = (await listed(service, clinician)).json()["items"]
    demand = answer["open_demand"]
    assert {name: item[name] for name in demand} == demand
    assert (item["kind"], item["patient_id"], item["lesion_id"]) == (
        "demand",
        answer["patient_id"],
        answer["lesion_id"],
    )
    assert (item["emergency_access"], item["overdue"], item["outcome"]) == (False, False, answer["outcome"])
    assert item["due"] > datetime.now(UTC).date().isoformat()
    assert item["action"].keys() == {"code", "message"}
    # Nobody else's, and not a supervisor's either who has none in care.
    for roles in (("clinician",), ("supervisor",)):
        response = await listed(service, f"dr-{uuid4().hex}", roles)
        assert response.json() == {"items": [], "next": None}
        await service.hold_to_event(response, "view_worklist", "success", shown={})


async def test_everyone_shown_is_on_record_page_by_page(service, clinician) -> None:
    patient = await service.care(clinician)
    answers = [await upload(service, clinician, patient) for _ in range(2)]
    answers.append(await upload(service, clinician))
    seen, cursor, pages = [], None, []
    while cursor or not pages:
        params = {"limit": 2} | ({"cursor": cursor} if cursor else {})
        response = await listed(service, clinician, **params)
        page, cursor = response.json(), response.json()["next"]
        shown: dict[str, list[str]] = {}
        for item in page["items"]:
            shown.setdefault(item["patient_id"], []).append(item["lesion_id"])
        shown = {patient: sorted(lesions) for patient, lesions in shown.items()}
        await service.hold_to_event(response, "view_worklist", "success", shown=shown)
        seen += page["items"]
        pages.append(len(page["items"]))
    assert pages == [2, 1]
    assert {item["lesion_id"] for item in seen} == {answer["lesion_id"] for answer in answers}


async def test_who_is_reached_in_an_emergency_is_flagged_and_recorded_under_it(service, clinician) -> None:
    """The reviewer of the access sees that the worklist showed the patient; what rests on no emergency is not put down to it."""
    mine, other = await upload(service, clinician), await uploaded(service)
    body = {"patient_id": other["patient_id"], "reason": "unconscious in casualty"}
    headers = service.token(clinician)
    opened = (await service.client.post("/api/emergency-access", json=body, headers=headers)).json()
    response = await listed(service, clinician)
    flagged = {item["lesion_id"]: item["emergency_access"] for item in response.json()["items"]}
    assert flagged == {mine["lesion_id"]: False, other["lesion_id"]: True}
    in_care, emergency = await service.events(response)
    assert in_care["detail"] == {"shown": {mine["patient_id"]: [mine["lesion_id"]]}}
    assert (in_care["patient_id"], in_care["purpose"]) == (None, "TREAT")
    assert emergency["detail"] == {
        "shown": {other["patient_id"]: [other["lesion_id"]]},
        "emergency_access": opened["emergency_id"],
    }
    assert (emergency["patient_id"], emergency["purpose"]) == (other["patient_id"], "ETREAT")
    queue = await service.client.get(
        "/api/emergency-access", params={"limit": 200}, headers=service.token("chief", ("supervisor",))
    )
    (entry,) = [e for e in queue.json()["emergency_accesses"] if e["emergency_id"] == opened["emergency_id"]]
    assert entry["accesses"] == {"view_worklist": 1}


async def test_a_decision_ends_a_demand_and_its_follow_up_waits_until_an_image_comes(
    service, clinician
) -> None:
    answer = await upload(service, clinician)
    await service.care("dr", answer["patient_id"])
    today = datetime.now(UTC).date()
    review = {"assessment_id": answer["assessment_id"], "decision": "accept"}
    said = review | {"follow_up_by": today.isoformat()}
    url, headers = f"/api/lesions/{answer['lesion_id']}/reviews", service.token(clinician)
    response = await service.client.post(url, json=said, headers=headers)
    assert response.status_code == 201, response.text
    (item,) = (await listed(service, clinician)).json()["items"]
    assert (item["kind"], item["assessment_id"]) == ("follow_up", answer["assessment_id"])
    assert (item["due"], item["overdue"], item["action"]["code"]) == (today.isoformat(), False, "follow_up")
    assert (await listed(service, clinician, kind=["demand", "review"])).json()["items"] == []
    await followed(service, answer)
    assert [item["kind"] for item in (await listed(service, clinician)).json()["items"]] == ["demand"]


@pytest.mark.parametrize("days", [(15, 28, 126), (0, 28, 126), (14, 13, 126), (14, 28, 27)])
def test_urgent_is_never_later_than_the_guideline_nor_than_what_is_less_urgent(days) -> None:
    values = dict(zip(("due_days_urgent", "due_days_expedited", "due_days_routine"), days, strict=True))
    with pytest.raises(ValidationError):
        Settings(database_url=SecretStr("postgresql://x"), token_secret=SecretStr("x" * 40), **values)


@pytest.mark.parametrize(
    "query",
    ["kind=lesion", "kind=", "limit=0", "limit=201", "cursor=!", "cursor=MjAyNi0wMS0wMXww", "patient_id=p"],
)
async def test_what_is_no_question_of_this_route_is_refused(service, query: str) -> None:
    response = await service.get(f"{URL}?{query}")
    await service.hold_to_failure(response, 422, "invalid_field", "view_worklist")
