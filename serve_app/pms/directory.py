"""What is asked of a directory of patients, wherever it is."""

from __future__ import annotations

from typing import Protocol

from serve_app.domain.patient import PatientRecord


class PatientDirectory(Protocol):
    """Who a patient is and whose an encounter is.

    Two homes: the PMS itself (`PmsDirectory`), and a table of our own (`records.patients`).
    Every method answers within the directory's own time limit, or raises DirectoryUnavailable.
    """

    async def patient(self, patient_id: str) -> PatientRecord | None:
        """Find a patient; None when the directory knows none by that id."""

    async def patient_of(self, encounter_id: str) -> str | None:
        """Say whose an encounter is; None when the directory knows none by that id."""
