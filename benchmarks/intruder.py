"""What an intruder tries, from outside and from within, against a node of its own; and what happened each time.

`python -m benchmarks.intruder --json` starts a node as an operator does, and comes as a stranger on the network, as a
clinician who has the patient not in care, as the application's role in the database, as the database's superuser, as
whoever can write to the backup store, and as another user of the machine. Every attempt ends in one of

    refused       it was not let
    found         it was done, and the operator is told: by `audit verify`, `status` or a refused start
    not promised  it was done, and docs/security.md says that it can be
    succeeded     it was done, and nobody knows: the exit status is 1
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
import json
import sys
from typing import Any

from benchmarks import intruder_inside, intruder_outside  # noqa: F401 - they fill ATTACKS
from benchmarks.intruder_node import ACTORS, ATTACKS, Refused, Verdict, running_node


@dataclass(frozen=True, slots=True)
class Attempt:
    """One thing that was tried, and what came of it."""

    actor: str
    tried: str
    verdict: Verdict
    happened: str


def run(only: str | None = None) -> dict[str, Any]:
    """Try everything, one after another, on one node."""
    attempts = []
    with running_node() as victim:
        for actor, tried, attack in sorted(ATTACKS, key=lambda each: ACTORS.index(each[0])):
            if only and only not in f"{actor}: {tried} {attack.__name__}":
                continue
            print(f"{actor}: {tried}", file=sys.stderr, flush=True)
            try:
                verdict, happened = attack(victim)
            except Refused as refusal:
                verdict, happened = "refused", str(refusal)
            except Exception as error:  # noqa: BLE001 - what could not be tried is not refused
                verdict, happened = "succeeded", f"could not be tried: {error!r}"
            attempts.append(Attempt(actor, tried, verdict, happened))
    counts = Counter(one.verdict for one in attempts)
    return {
        "benchmark": "intruder",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "attempts": [asdict(one) for one in attempts],
        **{
            verdict.replace(" ", "_"): counts[verdict]
            for verdict in ("refused", "found", "not promised", "succeeded")
        },
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--only", help="attempts whose actor, text or function name has this in it")
    parsed = parser.parse_args()
    report = run(parsed.only)
    if parsed.json:
        print(json.dumps(report, indent=1, ensure_ascii=False))
    else:
        for one in report["attempts"]:
            print(f"{one['verdict']:<13}{one['actor']:<29}{one['tried']}\n{'':13}{one['happened']}")
    sys.exit(1 if report["succeeded"] else 0)


if __name__ == "__main__":
    main()
