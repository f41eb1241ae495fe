"""The PMS as the directory of patients."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
import random

from serve_app.domain.errors import DirectoryUnavailable, PmsUnavailable
from serve_app.domain.patient import PatientRecord
from serve_app.pms.breaker import CircuitBreaker
from serve_app.pms.cache import BriefCache
from serve_app.pms.client import PmsAnswer, PmsClient
from serve_app.pms.patient_json import read_encounter, read_patient

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
