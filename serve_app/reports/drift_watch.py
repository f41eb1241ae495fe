"""Looks for drift now and then, and says what was found: for /readyz, the metrics, the report and `derm-cds drift`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict
import logging
from typing import Any, Literal

import asyncpg
import numpy as np

from serve_app.domain.assessment import Time
from serve_app.domain.diagnosis import Diagnosis
from serve_app.records.answers import Document
from serve_app.records.drift import Cause, CurrentStream, DriftLook, DriftStore
from serve_app.records.pool import Pool
from serve_app.reports.drift import (
    BASELINE,
    MEASURES,
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
    names = sorted({name for measure in rows for name in measure["quality"]})
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
        patients=[row["patient_id"] for row in rows],
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
            apart = distance(measure, first, values.mean(0), len(values))
            found[measure.name] = {"distance": round(apart, 2), "shown": measure.show(images)}
    return found


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

    def findings(self) -> list[str]:
        """Say which measures have an alarm that nobody has acknowledged."""
        return describe(self._standing)

    def counts(self) -> dict[str, float | None]:
        """For the metrics."""
        return {"alarms": float(len(self._standing))}


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
    if not measures:
        return []
    return [
        f"drift: the newest images differ from this site's first in {', '.join(measures)}: `derm-cds drift show`"
    ]


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
