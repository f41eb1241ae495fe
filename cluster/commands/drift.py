"""`derm-cds drift`: whether the newest images are still like this site's first, and acknowledging that they are not."""

from __future__ import annotations

import argparse
import json

from cluster.commands import actions_of
from cluster.commands.records import ask, ask_as_owner
from serve_app.audit.events import os_account
from serve_app.records.drift import Cause, DriftStore
from serve_app.reports.drift import MEASURES
from serve_app.reports.drift_watch import DriftDocument, DriftMeasureDocument, drift_document


def define(_name: str, parser: argparse.ArgumentParser) -> None:
    """Define `drift`."""
    action = actions_of(parser)
    shown = action("show", _show, "say how each measure stands, and what its alarm may mean")
    shown.add_argument("--json", action="store_true", help="for programs")
    known = action("acknowledge", _acknowledge, "say that an alarm is known, and why it is")
    known.add_argument("measure", choices=[measure.name for measure in MEASURES])
    known.add_argument("--reason", required=True, choices=[cause.value for cause in Cause])
    known.add_argument(
        "--begin-again",
        action="store_true",
        help="have the next 500 images make a new baseline for this measure and those of the same stream",
    )


def _show(arguments: argparse.Namespace) -> None:
    document = drift_document(ask(arguments.home, lambda pool: DriftStore(pool).current()))
    if arguments.json:
        print(json.dumps(document.answer(), indent=1))
        return
    print("\n".join(_lines(document)) or "no image has been answered yet")


def _lines(document: DriftDocument) -> list[str]:
    lines = []
    for stream in document.streams:
        subject = ", ".join(stream.subject.values())
        lines.append(f"{stream.stream} ({subject}): {stream.collected} of {stream.needed} images")
        lines += [line for measure in stream.measures for line in _measure_lines(measure)]
    return lines


def _measure_lines(found: DriftMeasureDocument) -> list[str]:
    apart = "" if found.distance is None else f"  {found.distance:.1f} of {found.limit:.0f}"
    advice = (found.meaning, found.action) if found.state == "alarm" else ()
    return [f"  {found.measure:<15} {found.state:<12}{apart}".rstrip(), *(f"      {each}" for each in advice)]


def _acknowledge(arguments: argparse.Namespace) -> None:
    measure, cause, again = arguments.measure, Cause(arguments.reason), arguments.begin_again
    ask_as_owner(
        arguments.home,
        lambda pool: DriftStore(pool).acknowledge(measure, cause, actor=os_account(), begin_again=again),
    )
    print(f"{measure} is acknowledged" + (", and a new baseline begins" if again else ""))
