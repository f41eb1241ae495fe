"""What the caller sent and what the patient's record says, made one context.

Neither side wins as such: what is weighed is the more cautious of the two, so that asking the
directory can raise a risk and never lower it, and every difference is stated. A different sex
or age is how an image filed under the wrong patient shows.
"""

from __future__ import annotations

from dataclasses import fields, replace

from serve_app.domain.patient import (
    ClinicalContext,
    Discrepancy,
    History,
    Lookup,
    PatientRecord,
    RecordCheck,
    Sex,
)

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
