"""The lesion's report goes to the encounter whenever something of it changed, where DERM_PMS_FHIR asks for it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError
import pytest

from serve_app.fhir.codes import MEDIA_TYPE
from serve_app.pms import delivery
from serve_app.settings import Settings
from tests.serve_app.conftest import until
from tests.serve_app.erasure.erasing import erase
from tests.serve_app.pms.server import TOKEN, PmsServer, running_pms


@pytest.fixture(scope="module")
def pms() -> Iterator[PmsServer]:
    with running_pms() as server:
        yield server


@pytest.fixture(scope="module")
def told(pms: PmsServer, tmp_path_factory) -> dict[str, object]:
    """The settings of a service that tells reports."""
    token: Path = tmp_path_factory.mktemp("token") / "pms.token"
    token.touch(mode=0o600)
    token.write_text(TOKEN)
    return {"pms_url": pms.url, "pms_token_file": token, "pms_deliver": True, "pms_fhir": True}


@pytest.fixture(scope="module")
async def tied(start_service, told) -> AsyncIterator[Any]:
    """The service over all five real stages, with a PMS that takes reports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delivery, "PERIOD_S", 0.05)
        async with start_service(**told) as service:
            yield service


def status(bundle: dict[str, Any]) -> str:
    return str(bundle["entry"][0]["resource"]["status"])


async def test_a_report_follows_each_change_and_is_what_the_route_answers(tied, pms) -> None:
    patient = await tied.care()
    encounter = f"e-{patient}"
    pms.register(patient, encounter)
    answer = (await tied.upload(patient, encounter_id=encounter)).json()
    at = f"/api/encounters/{encounter}/reports"

    async def told(count: int) -> list[dict[str, Any]]:
        await until(lambda: len(pms.others.get(at, [])) >= count, within_s=30)
        assert len(pms.others[at]) == count
        return [body for _, body in pms.others[at]]

    async def shown() -> dict[str, Any]:
        found: dict[str, Any] = (await tied.get(f"/api/lesions/{answer['lesion_id']}/report")).json()
        return found

    assert (await told(1))[-1] == await shown()
    steps = [path for path, _ in pms.order if encounter in path]
    assert steps == [f"/api/encounters/{encounter}/assessments", at]
    assert dict(pms.order)[at] == MEDIA_TYPE
    review = {"assessment_id": answer["assessment_id"], "decision": "override", "reason": "known_lesion"}
    said = {"reviews": review | {"diagnosis": "NV", "level": "low", "urgency": "routine"}}
    said["outcomes"] = {
        "kind": "histology",
        "diagnosis": "MEL",
        "observed_on": answer["created_at"][:10],
        "source": "pathology_report",
    }
    for count, (name, body) in enumerate(said.items(), start=2):
        url = f"/api/lesions/{answer['lesion_id']}/{name}"
        response = await tied.client.post(url, json=body, headers=tied.token("dr"))
        assert response.status_code == 201, response.text
        assert (await told(count))[-1] == await shown()
        assert status(await shown()) == "amended"
    assert (await erase(tied, answer)).status_code == 200
    assert (await told(4))[-1] == await shown()
    assert status(await shown()) == "entered-in-error"
    keys = [key for key, _ in pms.others[at]]
    assert len(set(keys)) == 4
    # One lesion, one report: it is the same Bundle each time, further on.
    assert len({bundle["id"] for _, bundle in pms.others[at]}) == 1
    disclosed = "SELECT detail FROM audit_events WHERE action = 'disclose' AND lesion_id = $1::text::uuid"

    async def on_record() -> bool:
        kinds = [row["detail"].get("kind") for row in await tied.owner.fetch(disclosed, answer["lesion_id"])]
        return kinds.count("fhir") == 4

    await until(on_record, within_s=10)
    assert answer["patient_id"] not in json.dumps(
        [path for path, _ in pms.order if path != at and encounter not in path]
    )


async def test_an_erasure_is_reported_wherever_a_report_had_the_image(tied, pms) -> None:
    """A report tells of images of other encounters, and of none: no encounter keeps their findings."""
    patient = await tied.care()
    first, second = (f"e-{n}-{patient}" for n in (1, 2))
    pms.register(patient, first, second)
    lesion_id = None
    answers = []
    for encounter in (first, None, second):
        named = {"encounter_id": encounter, "lesion_id": lesion_id}
        response = await tied.upload(patient, **{name: value for name, value in named.items() if value})
        assert response.status_code == 201, response.text
        answers.append(response.json())
        lesion_id = answers[0]["lesion_id"]

    def reports(encounter: str) -> list[dict[str, Any]]:
        return [body for _, body in pms.others.get(f"/api/encounters/{encounter}/reports", [])]

    await until(lambda: reports(first) and reports(second), within_s=30)
    for answer, counts in ((answers[0], (2, 2)), (answers[1], (3, 3))):
        assert (await erase(tied, answer)).status_code == 200
        await until(lambda: (len(reports(first)), len(reports(second))) == counts, within_s=30)  # noqa: B023
        shown = (await tied.get(f"/api/lesions/{lesion_id}/report")).json()
        assert reports(second)[-1] == shown
        assert reports(first)[-1] == shown


async def test_linked_lesions_are_told_anew_as_one_and_again_apart(tied, pms) -> None:
    """And what is erased of one is reported wherever a report of the other had it, even after they are apart."""
    patient = await tied.care()
    encounters = [f"e-{n}-{patient}" for n in (3, 4)]
    pms.register(patient, *encounters)
    answers = [(await tied.upload(patient, encounter_id=encounter)).json() for encounter in encounters]

    async def told(count: int) -> list[dict[str, Any]]:
        at = [f"/api/encounters/{encounter}/reports" for encounter in encounters]
        await until(lambda: [len(pms.others.get(each, [])) for each in at] == [count, count], within_s=30)
        newest = [pms.others[each][-1][1] for each in at]
        for bundle, answer in zip(newest, answers, strict=True):
            assert bundle == (await tied.get(f"/api/lesions/{answer['lesion_id']}/report")).json()
        return newest

    def images(bundle: dict[str, Any]) -> int:
        return sum(each["resource"]["resourceType"] == "Media" for each in bundle["entry"])

    async def say(what: str, **body: str) -> None:
        url = f"/api/lesions/{answers[1]['lesion_id']}/{what}"
        said = await tied.client.post(url, json={"reason": "other", **body}, headers=tied.token("dr"))
        assert said.status_code in {200, 201}, said.text

    assert [images(each) for each in await told(1)] == [1, 1]
    await say("link", earlier_lesion_id=answers[0]["lesion_id"])
    assert [images(each) for each in await told(2)] == [2, 2]
    await say("unlink")
    assert [images(each) for each in await told(3)] == [1, 1]
    assert (await erase(tied, answers[0])).status_code == 200
    assert [status(each) for each in await told(4)] == ["entered-in-error", "preliminary"]


async def test_without_an_encounter_no_report_is_told(tied) -> None:
    answer = (await tied.upload(await tied.care())).json()
    query = "SELECT count(*) FROM outbox WHERE assessment_id = $1::text::uuid"
    assert await tied.owner.fetchval(query, answer["assessment_id"]) == 0


def test_reports_go_the_way_of_assessments() -> None:
    values = {"database_url": "postgresql:///x", "token_secret": "s" * 40, "pms_fhir": True}
    with pytest.raises(ValidationError, match="DERM_PMS_FHIR needs DERM_PMS_DELIVER"):
        Settings(**values)
