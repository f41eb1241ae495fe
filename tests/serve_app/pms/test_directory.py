"""The PMS as the directory: what is found, what is not, and every way of not answering."""

from __future__ import annotations

from datetime import UTC, date, datetime
import logging
import time

import httpx
import pytest

from serve_app.domain.errors import DirectoryUnavailable, WrongEncounter
from serve_app.domain.patient import ClinicalContext, History, Lookup, PatientRecord, Sex
from serve_app.pms.client import CircuitBreaker, PmsClient
from serve_app.pms.client import _read as read_answer
from serve_app.pms.directory import BriefCache, PmsDirectory, RecordConsultation, read_patient
from serve_app.records.patients import PatientEntry, PatientTable
from serve_app.records.pool import open_pool


def born(age: int) -> str:
    return date(datetime.now(UTC).year - age, 1, 1).isoformat()


@pytest.fixture
def directory(client) -> PmsDirectory:
    breaker = CircuitBreaker(failures=4, rest_s=60)
    return PmsDirectory(client, timeout_s=0.3, max_age_s=60, breaker=breaker)


async def test_what_the_pms_knows_is_found_and_kept_for_a_while(pms, directory) -> None:
    pms.register("p-1", "e-1", birth_date=born(61), sex="female", history={"personal_melanoma": True})
    found = PatientRecord(61, Sex.FEMALE, History(personal_melanoma=True))
    for _ in range(3):
        assert await directory.patient("p-1") == found
        assert await directory.patient_of("e-1") == "p-1"
    assert sorted(pms.asked) == ["/api/encounters/e-1", "/api/patients/p-1"]


async def test_what_the_pms_does_not_know_is_asked_again(pms, directory) -> None:
    assert await directory.patient("p-1") is None
    assert await directory.patient_of("e-1") is None
    pms.register("p-1", "e-1")
    assert await directory.patient("p-1") == PatientRecord()
    assert await directory.patient_of("e-1") == "p-1"


@pytest.mark.parametrize("fault", ["slow", "500", "404", "page", "wrong", "drop"])
async def test_a_fault_is_no_answer_within_the_time_limit(pms, directory, fault: str) -> None:
    pms.register("p-1", "e-1")
    pms.fault = lambda _: fault
    since = time.monotonic()
    for asked in (directory.patient("p-1"), directory.patient_of("e-1")):
        with pytest.raises(DirectoryUnavailable):
            await asked
    assert time.monotonic() - since < 2 * 0.3 + 0.3


async def test_one_dropped_connection_is_made_up_for(pms, directory) -> None:
    pms.register("p-1")
    faults = iter(["drop"])
    pms.fault = lambda _: next(faults, None)
    assert await directory.patient("p-1") == PatientRecord()


async def test_a_pms_that_is_down_is_not_asked_for_a_while(pms, directory) -> None:
    pms.stop()
    codes = []
    for _ in range(4):
        with pytest.raises(DirectoryUnavailable) as failed:
            await directory.patient("p-1")
        codes.append(str(failed.value))
    assert codes[0] == "connection_ConnectError"
    assert codes[2:] == ["circuit_open"] * 2


async def test_a_token_that_others_may_read_is_not_sent(pms, token_file) -> None:
    token_file.chmod(0o644)
    client = PmsClient(pms.url, token_file=token_file)
    with pytest.raises(DirectoryUnavailable, match="token_file_not_private"):
        await PmsDirectory(client, timeout_s=1, max_age_s=0).patient("p-1")
    assert pms.asked == []
    await client.close()


async def test_no_log_names_the_patient_or_the_token(pms, directory, caplog) -> None:
    caplog.set_level(logging.INFO)
    pms.register("p-marked", "e-marked", birth_date="1961-04-02")
    consultation = RecordConsultation(directory)
    await consultation.consult(ClinicalContext(), patient_id="p-marked", encounter_id="e-marked")
    pms.fault = lambda _: "wrong"
    await consultation.consult(ClinicalContext(), patient_id="p-other-marked", encounter_id="e-other-marked")
    # The PMS of the tests runs in this process, too, and logs what it likes.
    ours = (record for record in caplog.records if not record.name.startswith("uvicorn"))
    said = "\n".join(record.getMessage() for record in ours)
    assert "not looked up" in said
    for secret in ("marked", "1961", "the PMS's token"):
        assert secret not in said


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"patient_id": "p-2"},
        {"patient_id": "p-1", "history": []},
        {"patient_id": "p-1", "history": {"personal_melanoma": "yes"}},
        {"patient_id": "p-1", "birth_date": 1961},
        {"patient_id": "p-1", "birth_date": "2.4.1961"},
        {"patient_id": "p-1", "birth_date": "1761-04-02"},
        {"patient_id": "p-1", "birth_date": "2099-01-01"},
        {"patient_id": "p-1", "sex": "f"},
        {"patient_id": "p-1", "sex": ["female"]},
    ],
)
def test_a_record_that_is_none_is_refused_without_being_quoted(body) -> None:
    with pytest.raises(ValueError, match=r"not|living") as refused:
        read_patient("p-1", body, today=date(2026, 11, 24))
    assert "1961" not in str(refused.value)


def test_the_age_counts_whole_years() -> None:
    body = {"patient_id": "p-1", "birth_date": "1961-11-25"}
    assert read_patient("p-1", body, today=date(2026, 11, 24)).age == 64
    assert read_patient("p-1", body, today=date(2026, 11, 25)).age == 65


def test_the_cache_is_bounded_in_age_and_number_and_shows_nothing() -> None:
    now = iter([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 10.0, 10.0])
    cache: BriefCache[str] = BriefCache(max_age_s=10, entries=2, clock=lambda: next(now))
    for key in "abc":
        cache.put(key, f"born 196{key}")
    assert [cache.get(key) for key in "abc"] == [None, "born 196b", "born 196c"]
    assert "born" not in repr(cache)
    assert cache.get("b") is None
    cache.put("d", "d")
    assert len(cache) == 1
    none: BriefCache[str] = BriefCache(max_age_s=0)
    none.put("a", "1")
    assert len(none) == 0
    assert none.get("a") is None


async def test_the_local_table_is_a_directory_too(database, owner_pool) -> None:
    app = await open_pool(database.app, minimum=0)
    history = History(family_melanoma=True)
    entry = PatientEntry("p-1", date.fromisoformat(born(50)), Sex.MALE, history, ["e-1"])
    for _ in range(2):
        await PatientTable(owner_pool).load([entry])
    table = PatientTable(app)
    assert await table.patient("p-1") == PatientRecord(50, Sex.MALE, history)
    assert await table.patient("p-2") is None
    assert await table.patient_of("e-1") == "p-1"
    consultation = RecordConsultation(table)
    context = await consultation.consult(ClinicalContext(), patient_id="p-1", encounter_id="e-1")
    assert context.age_approx == 50
    assert context.record.encounter is Lookup.FOUND
    with pytest.raises(WrongEncounter):
        await consultation.consult(ClinicalContext(), patient_id="p-1", encounter_id="e-2")
    await app.close()
    with pytest.raises(DirectoryUnavailable):
        await table.patient("p-1")


async def test_an_answer_with_a_key_twice_is_none() -> None:
    """A history of which the last word counts could lose a risk factor."""
    content = b'{"patient_id": "p", "history": {"personal_melanoma": true, "personal_melanoma": false}}'
    assert await read_answer(httpx.Response(200, content=content)) is None
    assert await read_answer(httpx.Response(200, content=b'{"a": [{"b": 1}, {"b": 1}]}')) is not None
