"""Looks for drift now and then, and says what was found: for /readyz, the metrics, the report and `derm-cds drift`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict
import logging
from typing import Annotated, Any, Literal

import numpy as np

from serve_app.domain.assessment import Time, one_of
from serve_app.domain.diagnosis import Diagnosis
from serve_app.records.answers import Document
from serve_app.records.drift import Cause, CurrentStream, DriftLook, DriftStore
from serve_app.records.pool import Pool
from serve_app.reports.drift import (
    BASELINE,
    STEP,
    SUBJECTS,
    WINDOW,
    Baseline,
    Images,
    Measure,
    Stream,
    distance,
    learn,
    measures_of,
)

#: How often it is seen whether STEP images have come.
LOOK_EVERY_S = 60.0

_log = logging.getLogger("derm.drift")
State = Literal["collecting", "quiet", "alarm", "acknowledged"]


def read_images(rows: Sequence[Mapping[str, Any]]) -> Images:
    """Make arrays of rows of `answered_images`, in their order."""
    nothing: dict[str, float] = {}
    names = {name for row in rows for name in row["quality"]}
    return Images(
        quality={
            name: np.array([_number(row["quality"].get(name)) for row in rows], np.float64) for name in names
        },
        nine=np.array(
            [[_number((row["probabilities"] or nothing).get(d)) for d in Diagnosis] for row in rows]
        ),
        embedding=np.array(
            [
                np.full(512, np.nan) if row["embedding"] is None else row["embedding"].to_numpy()
                for row in rows
            ]
        ),
        levels=[row["level"] or "" for row in rows],
        outcomes=[row["outcome"] for row in rows],
        patients=np.unique([row["patient_id"] for row in rows], return_inverse=True)[1],
    )


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


def learn_all(stream: Stream, images: Images) -> dict[str, Any]:
    """The baseline of every measure of a stream, JSON-able."""
    return {measure.name: asdict(learn(measure, images)) for measure in measures_of(stream)}


def compare_all(stream: Stream, baseline: Mapping[str, Any], images: Images) -> dict[str, Any]:
    """How far every measure of a stream is from its baseline, and what it is now; a measure without one is left out."""
    found: dict[str, Any] = {}
    for measure in measures_of(stream):
        if measure.name in baseline:
            values = measure.values(images)
            first = Baseline(**baseline[measure.name])
            apart = float(distance(measure, first, values.mean(0), len(values)))
            found[measure.name] = {"distance": round(apart, 2), "shown": measure.show(images)}
    return found


class DriftMeasureDocument(Document):
    """One measure. `distance` beyond `limit` raises an alarm, which stands until an operator acknowledges it.

    `baseline` and `newest` are means over the first 500 and the newest 300 images; shares are rounded to 0.05. `meaning`
    and `action` are there while an alarm stands.
    """

    measure: str
    state: State
    limit: float
    distance: float | None
    baseline: dict[str, float] | None
    newest: dict[str, float] | None
    raised_at: Time | None
    acknowledged_at: Time | None
    reason: Annotated[Cause, one_of(Cause, "Reason")] | None
    meaning: str | None
    action: str | None


class DriftStreamDocument(Document):
    """Measures of the same images; `subject` is what made their answers, and another one begins another baseline.

    `collected` counts in steps of 25, up to `needed`; until then the state of all is `collecting`.
    """

    stream: Annotated[Stream, one_of(Stream, "Stream")]
    subject: dict[str, str]
    collected: int
    needed: int
    baseline_until: Time | None
    looked_at: Time
    measures: list[DriftMeasureDocument]


class DriftDocument(Document):
    """This site's newest images against its first; empty before the first answer."""

    baseline_images: int
    newest_images: int
    streams: list[DriftStreamDocument]


def drift_document(streams: Sequence[CurrentStream]) -> DriftDocument:
    """What is published: nothing of a patient, no count under 5, no vector."""
    return DriftDocument(
        baseline_images=BASELINE,
        newest_images=WINDOW,
        streams=[
            DriftStreamDocument(
                stream=Stream(each.stream),
                subject=dict(each.subject),
                collected=each.collected // STEP * STEP,
                needed=BASELINE + WINDOW,
                baseline_until=each.baseline_until,
                looked_at=each.looked_at,
                measures=[_measure_document(measure, each) for measure in measures_of(Stream(each.stream))],
            )
            for each in streams
        ],
    )


def _measure_document(measure: Measure, stream: CurrentStream) -> DriftMeasureDocument:
    alarm = stream.alarms.get(measure.name)
    first, newest = ((found or {}).get(measure.name) for found in (stream.baseline, stream.newest))
    state: State = "collecting" if newest is None else "quiet"
    if alarm is not None:
        state = "alarm" if alarm.acknowledged_at is None else "acknowledged"
    return DriftMeasureDocument(
        measure=measure.name,
        state=state,
        limit=measure.limit,
        distance=newest and round(newest["distance"], 1),
        baseline=(first and first["shown"]) or None,
        newest=(newest and newest["shown"]) or None,
        raised_at=alarm.raised_at if alarm else None,
        acknowledged_at=alarm.acknowledged_at if alarm else None,
        reason=alarm.reason if alarm else None,
        meaning=measure.advice.meaning if alarm else None,
        action=measure.advice.action if alarm else None,
    )


class DriftWatch:
    """Looks every STEP images. One replica at a time looks; all know what was found."""

    def __init__(self, pool: Pool) -> None:
        self._store = DriftStore(pool)
        self._standing: list[str] = []

    async def look(self) -> None:
        """Look, if enough images have come and nobody else does."""
        async with self._store.look() as look:
            if look is not None and (provenance := await look.provenance()) is not None:
                for stream in Stream:
                    await _look(look, stream, {name: provenance[name] for name in SUBJECTS[stream]})
        self._standing = unacknowledged(await self._store.current())

    async def document(self) -> DriftDocument:
        """What is published of it now."""
        return drift_document(await self._store.current())

    def findings(self) -> list[str]:
        """Say which measures have an alarm that nobody has acknowledged."""
        return describe(self._standing)

    def counts(self) -> dict[str, float | None]:
        """For the metrics: alarms that nobody has acknowledged."""
        return {"alarms": len(self._standing)}


def unacknowledged(streams: Sequence[CurrentStream]) -> list[str]:
    """The measures whose alarm nobody has acknowledged."""
    return [
        measure
        for stream in streams
        for measure, alarm in sorted(stream.alarms.items())
        if alarm.acknowledged_at is None
    ]


def describe(measures: Sequence[str]) -> list[str]:
    """Say it in one line, if there is anything to say."""
    differ = f"drift: the newest images differ from this site's first in {', '.join(measures)}"
    return [f"{differ}: `derm-cds drift show`"] if measures else []


async def _look(look: DriftLook, stream: Stream, subject: Mapping[str, str]) -> None:
    state = await look.stream(stream, subject)
    if state.seen_until is not None and await look.answered_since(state.seen_until, STEP) < STEP:
        return
    baseline, until = state.baseline, state.baseline_until
    learnt: dict[str, Any] = {}
    if baseline is None or until is None:
        rows = await look.images(stream, subject, state.since, BASELINE, newest=False)
        if len(rows) < BASELINE:
            await look.note(state.drift_id, len(rows))
            return
        until = rows[-1]["completed_at"]
        baseline = await asyncio.to_thread(lambda: learn_all(stream, read_images(rows)))
        learnt = {"baseline": baseline, "baseline_until": until}
    newest = await look.images(stream, subject, until, WINDOW, newest=True)
    if len(newest) < WINDOW:
        await look.note(state.drift_id, BASELINE + len(newest), **learnt)
        return
    found = await asyncio.to_thread(lambda: compare_all(stream, baseline, read_images(newest)))
    await look.note(state.drift_id, BASELINE + WINDOW, **learnt, newest=found)
    limits = {measure.name: measure.limit for measure in measures_of(stream)}
    over = {name: each["distance"] for name, each in found.items() if each["distance"] > limits[name]}
    for measure in await look.judge(state.drift_id, over, [name for name in found if name not in over]):
        _log.warning(
            "drift: %s is %.1f from this site's first images (limit %.1f)",
            measure,
            over[measure],
            limits[measure],
        )
