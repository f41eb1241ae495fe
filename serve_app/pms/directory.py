"""The directory of patients: what is asked of it, the PMS's JSON read with little trust, and a brief cache."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import fields
from datetime import UTC, date, datetime
import random
from time import monotonic
from typing import Any, Generic, Protocol, TypeVar

from serve_app.domain.errors import DirectoryUnavailable, PmsUnavailable
from serve_app.domain.patient import History, PatientRecord, Sex
from serve_app.pms.client import CircuitBreaker, PmsAnswer, PmsClient


class PatientDirectory(Protocol):
    """Who a patient is and whose an encounter is.

    Two homes: the PMS itself (`PmsDirectory`), and a table of our own (`records.patients`).
    Every method answers within the directory's own time limit, or raises DirectoryUnavailable.
    """

    async def patient(self, patient_id: str) -> PatientRecord | None:
        """Find a patient; None when the directory knows none by that id."""

    async def patient_of(self, encounter_id: str) -> str | None:
        """Say whose an encounter is; None when the directory knows none by that id."""


_Value = TypeVar("_Value")


class BriefCache(Generic[_Value]):
    """Values by id, at most `entries`, none older than `max_age_s`; 0 keeps nothing.

    The one not used for longest goes first. `clock` gives seconds that never go back.
    """

    def __init__(
        self, *, max_age_s: float, entries: int = 2_000, clock: Callable[[], float] = monotonic
    ) -> None:
        self._max_age_s = max_age_s
        self._limit = entries
        self._clock = clock
        self._kept: OrderedDict[str, tuple[float, _Value]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str) -> _Value | None:
        """Find a value that is young enough."""
        found = self._kept.get(key)
        if found is None:
            return None
        kept_at, value = found
        if self._clock() - kept_at >= self._max_age_s:
            del self._kept[key]
            return None
        self._kept.move_to_end(key)
        return value

    def put(self, key: str, value: _Value) -> None:
        """Keep a value; whatever is too old, or too much, is forgotten."""
        now = self._clock()
        self._kept.pop(key, None)
        for old in [name for name, (at, _) in self._kept.items() if now - at >= self._max_age_s]:
            del self._kept[old]
        if self._max_age_s > 0:
            self._kept[key] = now, value
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)


#: Years; an age beyond is a wrong date.
MAX_AGE = 120


def read_patient(patient_id: str, body: Mapping[str, Any], *, today: date) -> PatientRecord:
    """Read `{"patient_id", "birth_date", "sex", "history"}`; of the date of birth only the age is kept.

    Raises ValueError, without quoting the body, for another patient's record or one that is none.
    """
    if body.get("patient_id") != patient_id:
        raise ValueError("not this patient's record")
    history = {} if body.get("history") is None else body["history"]
    if not isinstance(history, dict):
        raise ValueError("history is not an object")  # noqa: TRY004
    answers = {item.name: history.get(item.name) for item in fields(History)}
    if not all(answer is None or isinstance(answer, bool) for answer in answers.values()):
        raise ValueError("an answer of the history is not yes, no or null")
    return PatientRecord(_age(body.get("birth_date"), today), _sex(body.get("sex")), History(**answers))


def read_encounter(encounter_id: str, body: Mapping[str, Any]) -> str:
    """Read whose an encounter is from `{"encounter_id", "patient_id"}`; ValueError as above."""
    patient_id = body.get("patient_id")
    if body.get("encounter_id") != encounter_id or not isinstance(patient_id, str) or not patient_id:
        raise ValueError("not this encounter")
    return patient_id


def _age(birth_date: object, today: date) -> int | None:
    if birth_date is None:
        return None
    if not isinstance(birth_date, str):
        raise ValueError("birth_date is not a date")  # noqa: TRY004
    try:
        born = date.fromisoformat(birth_date)
    except ValueError:
        raise ValueError("birth_date is not a date") from None
    age = today.year - born.year - ((today.month, today.day) < (born.month, born.day))
    if not 0 <= age <= MAX_AGE:
        raise ValueError("birth_date is not a living person's")
    return age


def _sex(sex: object) -> Sex | None:
    if sex is None:
        return None
    if not isinstance(sex, str) or sex not in set(Sex):
        raise ValueError("sex is not one of FHIR's")
    return Sex(sex)


#: Tries of one question, the first included. A second one helps after a dropped connection; a slow
#: PMS is not asked twice, since the time is up by then.
ATTEMPTS = 2
#: Seconds between them, at most: spread, so that many uploads do not ask again in step.
PAUSE_S = 0.05


class PmsDirectory:
    """A PatientDirectory that asks the PMS: `GET /api/patients/{id}`, `GET /api/encounters/{id}`.

    `timeout_s` is for the whole of one question, retries included. What was found is kept for
    `max_age_s`; what was not is asked again at the next upload: a patient may be registered by then.
    """

    def __init__(
        self,
        client: PmsClient,
        *,
        timeout_s: float,
        max_age_s: float,
        breaker: CircuitBreaker | None = None,
    ) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._breaker = breaker or CircuitBreaker()
        self._patients: BriefCache[PatientRecord] = BriefCache(max_age_s=max_age_s)
        self._encounters: BriefCache[str] = BriefCache(max_age_s=max_age_s)

    async def patient(self, patient_id: str) -> PatientRecord | None:
        """Find a patient."""
        if (kept := self._patients.get(patient_id)) is not None:
            return kept
        answer = await self._ask("patients", patient_id)
        if answer.body is None:
            return None
        try:
            record = read_patient(patient_id, answer.body, today=datetime.now(UTC).date())
        except ValueError as error:
            raise DirectoryUnavailable(f"bad_record: {error}") from None
        self._patients.put(patient_id, record)
        return record

    async def patient_of(self, encounter_id: str) -> str | None:
        """Say whose an encounter is."""
        if (kept := self._encounters.get(encounter_id)) is not None:
            return kept
        answer = await self._ask("encounters", encounter_id)
        if answer.body is None:
            return None
        try:
            patient_id = read_encounter(encounter_id, answer.body)
        except ValueError as error:
            raise DirectoryUnavailable(f"bad_record: {error}") from None
        self._encounters.put(encounter_id, patient_id)
        return patient_id

    async def _ask(self, kind: str, identifier: str) -> PmsAnswer:
        """Ask, in time; an answer without a body is "none such"."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._ask_again(kind, identifier)
        except TimeoutError:
            self._breaker.fail()
            raise DirectoryUnavailable("timeout") from None

    async def _ask_again(self, kind: str, identifier: str) -> PmsAnswer:
        attempt = 0
        while True:
            attempt += 1
            if not self._breaker.enter():
                raise DirectoryUnavailable("circuit_open")
            try:
                answer = await self._try(kind, identifier)
            except PmsUnavailable as fault:
                self._breaker.fail()
                if attempt == ATTEMPTS:
                    raise DirectoryUnavailable(str(fault)) from None
            else:
                self._breaker.succeed()
                return answer
            await asyncio.sleep(PAUSE_S * random.uniform(0.2, 1.0))  # noqa: S311 - no secret

    async def _try(self, kind: str, identifier: str) -> PmsAnswer:
        answer = await self._client.get("api", kind, identifier, timeout_s=self._timeout_s)
        if answer.body is None:
            raise PmsUnavailable(f"http_{answer.status}_without_json")
        if answer.status == 404:
            # A gateway's 404 for a PMS that is away must not read as "no such patient": the PMS
            # itself names what it was asked for.
            if identifier not in {answer.body.get("patient_id"), answer.body.get("encounter_id")}:
                raise PmsUnavailable("http_404_of_another")
            return PmsAnswer(404, None)
        if answer.status != 200:
            raise PmsUnavailable(f"http_{answer.status}")
        return answer
