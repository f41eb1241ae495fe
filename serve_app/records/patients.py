"""The directory of patients where no PMS can be asked: a table of our own, loaded by the operator."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date

import asyncpg

from serve_app.audit.events import account_event
from serve_app.audit.rows import PATIENT_RECORDS, vouch
from serve_app.domain.errors import DirectoryUnavailable, RecordsUnavailable
from serve_app.domain.patient import History, PatientRecord, Sex
from serve_app.records.audit_log import record_event
from serve_app.records.pool import Pool, queries

_SQL = queries("patients")


@dataclass(frozen=True, slots=True)
class PatientEntry:
    """One patient as loaded into the table; None is not known."""

    patient_id: str
    birth_date: date | None = field(repr=False)
    sex: Sex | None
    history: History
    encounters: Sequence[str] = ()


class PatientTable:
    """A PatientDirectory over the clinical database; `timeout_s` is for one question."""

    def __init__(self, pool: Pool, *, timeout_s: float = 5.0) -> None:
        self._pool = pool
        self._timeout_s = timeout_s

    async def patient(self, patient_id: str) -> PatientRecord | None:
        """Find a patient; None when there is none. DirectoryUnavailable when the database does not answer."""
        row = await self._ask("patient", patient_id)
        if row is None:
            return None
        values = dict(row)
        age, sex = values.pop("age"), values.pop("sex")
        return PatientRecord(age, Sex(sex) if sex else None, History(**values))

    async def patient_of(self, encounter_id: str) -> str | None:
        """Say whose an encounter is; None when there is none. DirectoryUnavailable as above."""
        row = await self._ask("encounter", encounter_id)
        return None if row is None else row["patient_id"]

    async def _ask(self, query: str, identifier: str) -> asyncpg.Record | None:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._pool.fetchrow(_SQL[query], identifier)
        except (TimeoutError, RecordsUnavailable) as error:
            raise DirectoryUnavailable("database") from error

    async def load(self, entries: Sequence[PatientEntry]) -> None:
        """Write patients over what was known, and add their encounters, all or nothing; needs the owner's role.

        Each is an audit event of its patient, in the same transaction: whose record was changed, and when, is asked
        of one patient. The event counts the encounters and says nothing of what was written. A patient whose
        encounter is another's from now on has an event, too.
        """
        async with self._pool.connection() as connection, connection.transaction():
            for entry in entries:
                history = asdict(entry.history)
                await connection.execute(
                    _SQL["put_patient"], entry.patient_id, entry.birth_date, entry.sex, *history.values()
                )
                given = (entry.patient_id, list(entry.encounters))
                losing = [row["patient_id"] for row in await connection.fetch(_SQL["losing"], *given)]
                await connection.execute(_SQL["put_encounters"], *given)
                for row in await connection.fetch(_SQL["loaded"], [entry.patient_id, *losing]):
                    mine = row["patient_id"] == entry.patient_id
                    known = {"encounters": len(entry.encounters)} if mine else {"encounters_moved": True}
                    event = account_event("patient_load", known, patient_id=row["patient_id"])
                    await record_event(connection, vouch(event, PATIENT_RECORDS, [row]))
