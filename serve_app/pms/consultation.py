"""The directory asked while the image is prepared, and what it says joined with what the caller sent.

Neither side wins as such: what is weighed is the more cautious of the two, so that asking the
directory can raise a risk and never lower it, and every difference is stated. A different sex
or age is how an image filed under the wrong patient shows.
"""

from __future__ import annotations

import asyncio
from dataclasses import fields, replace
import logging

from serve_app.domain.errors import DirectoryUnavailable, WrongEncounter
from serve_app.domain.patient import (
    ClinicalContext,
    Discrepancy,
    History,
    Lookup,
    PatientRecord,
    RecordCheck,
    Sex,
)
from serve_app.pms.directory import PatientDirectory

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
        age_approx=_older(context.age_approx, record.age),
        sex=record.sex if context.sex in {None, Sex.UNKNOWN} and record.sex else context.sex,
        history=_join(context.history, record.history),
        record=RecordCheck(Lookup.FOUND, encounter, _discrepancies(context, record)),
    )


def _older(sent: int | None, recorded: int | None) -> int | None:
    """The higher age: the policy's risk rises with it."""
    return max((age for age in (sent, recorded) if age is not None), default=None)


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


logger = logging.getLogger("derm.pms")


class RecordConsultation:
    """Asks one directory about the patient and the encounter of an upload, both at once.

    It takes the directory's own time limit at most: an upload never waits longer for the record.
    """

    def __init__(self, directory: PatientDirectory) -> None:
        self._directory = directory

    async def consult(
        self, context: ClinicalContext, *, patient_id: str, encounter_id: str | None
    ) -> ClinicalContext:
        """Reconcile what was sent with the patient's record; without an answer, say so in the context.

        Raises WrongEncounter when the directory has no such encounter of this patient.
        """
        (patient, record), encounter = await asyncio.gather(
            self._patient(patient_id), self._encounter(encounter_id, patient_id)
        )
        if encounter is Lookup.UNKNOWN:
            raise WrongEncounter
        if patient is Lookup.NOT_AVAILABLE:
            return replace(context, record=RecordCheck(Lookup.NOT_AVAILABLE, encounter))
        return reconcile(context, record, encounter=encounter)

    async def _patient(self, patient_id: str) -> tuple[Lookup, PatientRecord | None]:
        try:
            record = await self._directory.patient(patient_id)
        except DirectoryUnavailable as error:
            _report("patient", error)
            return Lookup.NOT_AVAILABLE, None
        return (Lookup.UNKNOWN if record is None else Lookup.FOUND), record

    async def _encounter(self, encounter_id: str | None, patient_id: str) -> Lookup | None:
        if encounter_id is None:
            return None
        try:
            owner = await self._directory.patient_of(encounter_id)
        except DirectoryUnavailable as error:
            _report("encounter", error)
            return Lookup.NOT_AVAILABLE
        # The same whether it is another patient's or nobody's: the caller learns nothing of others.
        return Lookup.FOUND if owner == patient_id else Lookup.UNKNOWN


def _report(what: str, error: DirectoryUnavailable) -> None:
    """Log what failed and how, never about whom."""
    logger.warning("The %s was not looked up: %s", what, error)
