"""Asking the directory of patients while the image is being prepared, for so long and no longer."""

from __future__ import annotations

import asyncio
from dataclasses import replace
import logging

from serve_app.domain.errors import DirectoryUnavailable, WrongEncounter
from serve_app.domain.patient import ClinicalContext, Lookup, PatientRecord, RecordCheck
from serve_app.pms.directory import PatientDirectory
from serve_app.pms.reconcile import reconcile

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
