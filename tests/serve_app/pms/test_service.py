"""The service with a PMS beside it: asked at the upload, told afterwards, and never waited for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from pydantic import ValidationError
import pytest

from serve_app.domain.errors import StageFailed
from serve_app.lesions.recovery import FAILED_AFTER_TRIES
from serve_app.pms import delivery
from serve_app.settings import Settings
from tests.serve_app.conftest import until
from tests.serve_app.erasure.erasing import change, damage, erase, recover
from tests.serve_app.lesions.conftest import AlteredStages, failing
from tests.serve_app.pms.server import TOKEN, PmsServer, running_pms


@pytest.fixture(scope="module")
def pms() -> Iterator[PmsServer]:
    with running_pms() as server:
        yield server


@pytest.fixture(scope="module")
def ties(pms: PmsServer, tmp_path_factory) -> dict[str, object]:
    """The settings of a service that asks and tells."""
    token: Path = tmp_path_factory.mktemp("token") / "pms.token"
    token.touch(mode=0o600)
    token.write_text(TOKEN)
    return {
        "patient_directory": "pms",
        "pms_url": pms.url,
        "pms_token_file": token,
        "pms_deliver": True,
        "pms_cache_s": 0.0,
        # A slow machine must not read as a PMS that does not answer.
        "pms_timeout_s": 10.0,
    }


@pytest.fixture(scope="module")
async def tied(start_service, ties, _at_once) -> AsyncIterator:
    """The service over all five real stages, with a PMS."""
    async with start_service(**ties) as service:
        yield service


@pytest.fixture(scope="module", autouse=True)
def _at_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delivery, "PERIOD_S", 0.05)
        yield


@pytest.fixture(autouse=True)
def _healthy(pms: PmsServer) -> None:
    pms.fault = lambda _: None


def factors(answer: dict) -> dict[str, str]:
    return {factor["code"]: factor["effect"] for factor in answer["risk"]["factors"]}


async def told(pms: PmsServer, encounter: str, count: int = 1) -> list[dict]:
    await until(lambda: len(pms.kept.get(encounter, [])) >= count, within_s=30)
    return [body for _, body in pms.kept[encounter]]


async def test_the_record_is_weighed_and_the_encounter_is_told(tied, pms) -> None:
    patient = await tied.care()
    history = {"personal_melanoma": True}
    pms.register(patient, f"e-{patient}", birth_date="1950-01-01", sex="female", history=history)
    response = await tied.upload(patient, encounter_id=f"e-{patient}")
    assert response.status_code == 201, response.text
    answer = response.json()
    tied.hold_to("AssessmentDocument", answer)
    assert factors(answer)["personal_melanoma"] == factors(answer)["age"] == "raises"
    assert answer["links"] == {"encounter": f"{pms.url}/api/encounters/e-{patient}"}
    del answer["open_demand"]  # of the lesion, in the answer to the upload alone
    assert await told(pms, f"e-{patient}") == [answer]
    query = "SELECT count(*) FROM audit_events WHERE action = 'disclose' AND assessment_id = $1::text::uuid"
    assert await until(lambda: tied.owner.fetchval(query, answer["assessment_id"]), within_s=10) == 1
    assert (await tied.client.get("/readyz")).json()["outbox"]["dead"] == 0
    seen = await tied.get(response.headers["location"])
    assert seen.json()["assessments"] == [answer]


@pytest.mark.parametrize("owner", ["another", None])
async def test_an_encounter_of_another_is_refused_and_nothing_is_stored(tied, pms, owner) -> None:
    patient = await tied.care()
    pms.register(patient)
    if owner:
        pms.register(owner, f"e-{patient}")
    before = await tied.counts()
    response = await tied.upload(patient, encounter_id=f"e-{patient}")
    problem = tied.hold_to_problem(response, 422, "wrong_encounter")
    assert "encounter_id" in problem["detail"]
    # An earlier test's delivery may be put on record meanwhile: of the audit log only this request's events count.
    assert await tied.counts() | {"audit_events": 0} == before | {"audit_events": 0}
    assert [event["detail"] for event in await tied.events(response)] == [{"code": "wrong_encounter"}]


@pytest.mark.parametrize("fault", ["slow", "drop"])
async def test_a_pms_in_trouble_does_not_hold_up_the_upload(start_service, ties, pms, fault) -> None:
    pms.fault = lambda request: fault if request.method == "GET" else None
    async with start_service(**ties | {"pms_timeout_s": 0.5}) as service:
        patient = await service.care()
        pms.register(patient, f"e-{patient}", history={"personal_melanoma": True})
        response = await service.upload(patient, encounter_id=f"e-{patient}", age_approx="70")
        assert response.status_code == 201, response.text
        found = factors(response.json())
        assert found["record_not_available"] == found["encounter_not_verified"] == "not_available"
        assert found["age"] == "raises"
        await until(lambda: held(service))
        assert f"e-{patient}" not in pms.kept
        pms.fault = lambda _: None
        assert len(await told(pms, f"e-{patient}")) == 1


async def held(service) -> bool:
    """Whether a message waits for its encounter to be confirmed."""
    return bool((await service.client.get("/readyz")).json()["outbox"]["unconfirmed"])


async def test_an_answer_filed_under_anothers_encounter_while_the_pms_was_slow_never_gets_there(
    start_service, ties, pms
) -> None:
    """The check at the upload gives way to a slow PMS; the one before the message does not."""
    pms.fault = lambda request: "slow" if request.method == "GET" else None
    async with start_service(**ties | {"pms_timeout_s": 0.3}) as service:
        patient = await service.care()
        pms.register(patient)
        pms.register("another", f"e-{patient}")
        uploaded = await service.upload(patient, encounter_id=f"e-{patient}")
        assert uploaded.status_code == 201, uploaded.text
        assert factors(uploaded.json())["encounter_not_verified"] == "not_available"
        await until(lambda: held(service))
        pms.fault = lambda _: None
        (finding,) = await until(lambda: found_by(service), within_s=30)
        assert "another patient's encounter" in finding
        assert f"e-{patient}" not in pms.kept
        seen = (await service.get(uploaded.headers["location"])).json()
        service.hold_to("TimelineDocument", seen)
        (shown,) = seen["assessments"]
        assert shown["undelivered"]["code"] == "wrong_encounter"
        assert "wrong_patient" in shown["undelivered"]["action"]
        # Erased, there is nothing to tell and nothing left to find.
        await erase(service, uploaded.json())
        await until(lambda: found_by(service, none=True), within_s=30)
        left = "SELECT last_error FROM outbox WHERE encounter_id = $1 AND delivered_at IS NOT NULL"
        assert await until(lambda: service.owner.fetchval(left, f"e-{patient}")) == "wrong_encounter"
        assert f"e-{patient}" not in pms.kept


async def found_by(service, *, none: bool = False) -> list[str] | bool:
    findings = (await service.client.get("/readyz")).json()["findings"]
    return not findings if none else findings


async def test_what_is_recovered_fails_or_is_erased_is_told_too(
    start_service, local_stages, ties, pms
) -> None:
    stages = AlteredStages(local_stages(), "classify", failing(StageFailed()), calls={1, 2})
    async with start_service(stages, **ties) as service:
        patient, other = await service.care(), await service.care()
        pms.register(patient, f"e-{patient}", history={"immunosuppression": True})
        pms.register(other, f"e-{other}")
        pending = [await service.upload(each, encounter_id=f"e-{each}") for each in (patient, other)]
        assert [response.status_code for response in pending] == [202, 202]
        lost = pending[1].json()
        await damage(service, lost)
        await change(service, lost, "assessments", "attempts = $2", FAILED_AFTER_TRIES)
        assert pms.kept.keys().isdisjoint({f"e-{patient}", f"e-{other}"})
        assert await recover(service) == 1
        (body,) = await told(pms, f"e-{patient}")
        assert factors(body)["immunosuppression"] == "raises"
        (failed,) = await told(pms, f"e-{other}")
        service.hold_to("AssessmentDocument", failed)
        assert (failed["outcome"], failed["reasons"][0]["code"]) == ("failed", "integrity")
        receipt = (await erase(service, lost, note="Mrs Marker asked")).json()
        _, erased = await told(pms, f"e-{other}", 2)
        service.hold_to("AssessmentDocument", erased)
        assert (erased["outcome"], erased["classification"], erased["risk"]) == ("erased", None, None)
        assert erased["erasure"]["receipt_id"] == receipt["receipt_id"]
        assert "Marker" not in str(erased)


async def test_without_a_pms_nothing_changes(service) -> None:
    answer = (await service.upload(await service.care(), encounter_id="e-0")).json()
    assert "links" not in answer
    assert not {code for code in factors(answer) if code.startswith("record_")}
    assert (await service.client.get("/readyz")).json()["outbox"] is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"pms_deliver": True}, "DERM_PMS_URL is missing"),
        ({"patient_directory": "pms"}, "DERM_PMS_URL is missing"),
        ({"pms_url": "ftp://pms"}, "http"),
        ({"pms_url": "https://me:secret@pms"}, "DERM_PMS_TOKEN_FILE"),
        ({"pms_url": "http://pms", "env": "production"}, "https"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changed, said) -> None:
    with pytest.raises(ValidationError, match=said):
        Settings(database_url="postgresql://x", token_secret="x" * 40, **changed)
