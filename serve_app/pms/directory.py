"""The directory of patients: the PMS's JSON read with little trust, and joined with what the caller sent.

It is asked while the image is prepared. Of the caller's word and the record's neither wins as such: what is weighed
is the more cautious of the two, so that asking the directory can raise a risk and never lower it, and every difference
is stated. A different sex or age is how an image filed under the wrong patient shows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, fields, replace
from datetime import UTC, date, datetime
from functools import partial
import logging
import random
from time import monotonic
from typing import Any, Generic, Protocol, TypeVar

from serve_app.domain.errors import DirectoryUnavailable, PmsUnavailable, WrongEncounter
from serve_app.domain.patient import (
    ClinicalContext,
    Discrepancy,
    History,
    Lookup,
    PatientRecord,
    RecordCheck,
    Sex,
)
from serve_app.pms.client import CircuitBreaker, PmsAnswer, PmsClient

_log = logging.getLogger("derm.pms")


class PatientDirectory(Protocol):
    """Who a patient is and whose an encounter is.

    Two homes: the PMS itself (`PmsDirectory`), and a table of our own (`records.patients`).
    Every method answers within the directory's own time limit, or raises DirectoryUnavailable.
    """

    async def patient(self, patient_id: str) -> PatientRecord | None:
        """Find a patient; None when the directory knows none by that id."""

    async def patient_of(self, encounter_id: str) -> str | None:
        """Say whose an encounter is; None when the directory knows none by that id."""


_Value = TypeVar("_Value", PatientRecord, str)


class BriefCache(Generic[_Value]):
    """Values by id, at most `entries`, none older than `max_age_s` (0 keeps nothing); the oldest goes first.

    `clock` gives seconds that never go back.
    """

    def __init__(
        self, *, max_age_s: float, entries: int = 2_000, clock: Callable[[], float] = monotonic
    ) -> None:
        self._max_age_s, self._limit, self._clock = max_age_s, entries, clock
        self._kept: dict[str, tuple[float, _Value]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str) -> _Value | None:
        """Find a value that is young enough."""
        kept_at, value = self._kept.get(key, (0.0, None))
        return None if self._clock() - kept_at >= self._max_age_s else value

    def put(self, key: str, value: _Value) -> None:
        """Keep a value; whatever is too old, or too much, is forgotten."""
        self._kept.pop(key, None)
        self._kept[key] = (now := self._clock()), value
        # In the order in which they were kept.
        for old, (kept_at, _) in list(self._kept.items()):
            if now - kept_at < self._max_age_s and len(self._kept) <= self._limit:
                break
            del self._kept[old]


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


def _age(birth_date: Any, today: date) -> int | None:  # noqa: ANN401
    if birth_date is None:
        return None
    try:
        born = date.fromisoformat(birth_date)
    except (TypeError, ValueError):
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
        self, client: PmsClient, *, timeout_s: float, max_age_s: float, breaker: CircuitBreaker | None = None
    ) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._breaker = breaker or CircuitBreaker()
        self._patients: BriefCache[PatientRecord] = BriefCache(max_age_s=max_age_s)
        self._encounters: BriefCache[str] = BriefCache(max_age_s=max_age_s)

    async def patient(self, patient_id: str) -> PatientRecord | None:
        """Find a patient."""
        read = partial(read_patient, today=datetime.now(UTC).date())
        return await self._find(self._patients, "patients", patient_id, read)

    async def patient_of(self, encounter_id: str) -> str | None:
        """Say whose an encounter is."""
        return await self._find(self._encounters, "encounters", encounter_id, read_encounter)

    async def _find(
        self,
        cache: BriefCache[_Value],
        kind: str,
        identifier: str,
        read: Callable[[str, Mapping[str, Any]], _Value],
    ) -> _Value | None:
        if (kept := cache.get(identifier)) is not None:
            return kept
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._ask(kind, identifier)
        except TimeoutError:
            self._breaker.fail()
            raise DirectoryUnavailable("timeout") from None
        if answer.body is None:  # none such
            return None
        try:
            value = read(identifier, answer.body)
        except ValueError as error:
            raise DirectoryUnavailable(f"bad_record: {error}") from None
        cache.put(identifier, value)
        return value

    async def _ask(self, kind: str, identifier: str) -> PmsAnswer:
        code = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(PAUSE_S * random.uniform(0.2, 1.0))  # noqa: S311 - no secret
            if not self._breaker.enter():
                raise DirectoryUnavailable(code or "circuit_open")
            try:
                answer = await self._try(kind, identifier)
            except PmsUnavailable as fault:
                self._breaker.fail()
                code = str(fault)
            else:
                self._breaker.succeed()
                return answer
        raise DirectoryUnavailable(code)

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


#: Years by which two ages may differ and still be the same: `age_approx` is rounded to 5 years in
#: ISIC's data, which is 2.5 either way, and a birthday may lie between.
SAME_AGE_WITHIN = 3


def reconcile(
    context: ClinicalContext, record: PatientRecord | None, *, encounter: Lookup | None = None
) -> ClinicalContext:
    """Add a patient's record to what was sent; None is a patient that the directory does not know."""
    if record is None:
        return replace(context, record=RecordCheck(Lookup.UNKNOWN, encounter))
    return replace(
        context,
        # The higher: the policy's risk rises with it.
        age_approx=max((age for age in (context.age_approx, record.age) if age is not None), default=None),
        sex=record.sex if context.sex in {None, Sex.UNKNOWN} and record.sex else context.sex,
        history=_join(context.history, record.history),
        record=RecordCheck(Lookup.FOUND, encounter, _discrepancies(context, record)),
    )


def _join(sent: History, recorded: History) -> History:
    """Yes if either says yes, no if one says no and the other nothing else."""
    joined = {}
    for item in fields(History):
        answers = {getattr(sent, item.name), getattr(recorded, item.name)} - {None}
        joined[item.name] = any(answers) if answers else None
    return History(**joined)


def _discrepancies(context: ClinicalContext, record: PatientRecord) -> tuple[Discrepancy, ...]:
    found = []
    age = context.age_approx
    if age is not None and record.age is not None and abs(age - record.age) > SAME_AGE_WITHIN:
        found.append(Discrepancy("age_approx", str(age), str(record.age)))
    if {context.sex, record.sex}.isdisjoint({None, Sex.UNKNOWN}) and context.sex is not record.sex:
        found.append(Discrepancy("sex", str(context.sex), str(record.sex)))
    for item in fields(History):
        sent, recorded = getattr(context.history, item.name), getattr(record.history, item.name)
        if sent is not None and recorded is not None and sent is not recorded:
            found.append(Discrepancy(item.name, _yes_or_no(sent), _yes_or_no(recorded)))
    return tuple(found)


def _yes_or_no(answer: object) -> str:
    return "yes" if answer else "no"


@dataclass(frozen=True, slots=True)
class RecordConsultation:
    """Asks one directory about the patient and the encounter of an upload, both at once.

    It takes the directory's own time limit at most: an upload never waits longer for the record.
    """

    directory: PatientDirectory | None

    async def consult(
        self, context: ClinicalContext, *, patient_id: str, encounter_id: str | None
    ) -> ClinicalContext:
        """Reconcile what was sent with the patient's record; without an answer, say so in the context.

        As it was sent where there is no directory. WrongEncounter when it has no such encounter of this patient.
        """
        if self.directory is None:
            return context
        asked = None if encounter_id is None else self.directory.patient_of(encounter_id)
        (patient, record), (encounter, owner) = await asyncio.gather(
            _look_up("patient", self.directory.patient(patient_id)), _look_up("encounter", asked)
        )
        # The same whether it is another patient's or nobody's: the caller learns nothing of others.
        if encounter in {Lookup.FOUND, Lookup.UNKNOWN} and owner != patient_id:
            raise WrongEncounter
        if patient is Lookup.NOT_AVAILABLE:
            return replace(context, record=RecordCheck(Lookup.NOT_AVAILABLE, encounter))
        return reconcile(context, record, encounter=encounter)


async def _look_up(
    what: str, question: Awaitable[_Value | None] | None
) -> tuple[Lookup | None, _Value | None]:
    if question is None:
        return None, None
    try:
        found = await question
    except DirectoryUnavailable as error:
        _log.warning("The %s was not looked up: %s", what, error)  # how it failed, never about whom
        return Lookup.NOT_AVAILABLE, None
    return (Lookup.UNKNOWN if found is None else Lookup.FOUND), found
