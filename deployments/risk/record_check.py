"""What the patient's record in the PMS adds: what it could not say, and where it says otherwise.

The context holds the more cautious of what was sent and what is recorded (serve_app/pms/reconcile.py),
and is weighed as such; nothing here raises or lowers the risk.
"""

from __future__ import annotations

from collections.abc import Iterator

from deployments.risk.evidence import Effect, Evidence
from serve_app.domain.assessment import Reason
from serve_app.domain.patient import Discrepancy, Lookup, RecordCheck

#: What a clinician calls the fields that tell one patient from another.
_IDENTITY = {"age_approx": "age", "sex": "sex"}


def state_record(check: RecordCheck | None) -> Iterator[Evidence]:
    """Each thing that the record could not add, and each discrepancy, as a neutral factor."""
    if check is None:
        return
    if check.patient is Lookup.NOT_AVAILABLE:
        yield Evidence(
            "record_not_available",
            Effect.NOT_AVAILABLE,
            "The patient's record in the PMS did not answer in time: history that was not sent with the image "
            "was not available. It could not be weighed.",
        )
    elif check.patient is Lookup.UNKNOWN:
        yield Evidence(
            "record_not_found",
            Effect.NOT_AVAILABLE,
            "The PMS has no record of this patient: history that was not sent with the image could not be weighed.",
        )
    if check.encounter is Lookup.NOT_AVAILABLE:
        yield Evidence(
            "encounter_not_verified",
            Effect.NOT_AVAILABLE,
            "The PMS did not answer in time whether the encounter is this patient's.",
        )
    for found in check.discrepancies:
        name = _IDENTITY.get(found.field, "history")
        yield Evidence(f"{name}_discrepancy", Effect.NONE, f"{_words(found)} {_weighed(found)}")


def doubt_identity(check: RecordCheck | None) -> Iterator[Reason]:
    """A doubt when age or sex are not the record's: the image may be another patient's."""
    found = [each for each in check.discrepancies if each.field in _IDENTITY] if check else []
    if found:
        yield Reason(
            "identity_discrepancy",
            " ".join(_words(each) for each in found),
            "Make sure that image and form are this patient's before the answer is used; correct the one that is wrong.",
        )


def _words(found: Discrepancy) -> str:
    name = _IDENTITY.get(found.field) or f"history of {found.field.replace('_', ' ')}"
    return f"{name[0].upper()}{name[1:]}: {found.sent} was sent, the patient's record says {found.recorded}."


def _weighed(found: Discrepancy) -> str:
    if found.field == "sex":
        return "It is not weighed."
    return "The higher was weighed." if found.field == "age_approx" else "Yes was weighed."
