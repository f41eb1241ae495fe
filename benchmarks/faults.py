"""Faults under load: nothing acknowledged is lost or doubled, and the service is whole again in time.

`python -m benchmarks.faults --rounds 100` runs every kind; `--only query,disk,keys,vault` those that need
no Ray. Prints JSON, and ends with exit status 1 when the verdict is not kept.
"""

from __future__ import annotations

import argparse
import asyncio
from datetime import UTC, datetime
import json
from pathlib import Path
import sys
from typing import Any

from benchmarks.faults_disk import NoSmallDisk
from benchmarks.faults_kinds import Outcome, run_kind

KINDS = ("classifier", "ingress", "postgres", "query", "disk", "keys", "vault")
#: Whole again within so many seconds of the fault, or of its end where it does not end by itself.
WHOLE_S = 30.0


def report_kind(outcome: Outcome) -> dict[str, Any]:
    """The counts of one kind."""
    account, slowest = outcome.account, max(outcome.recoveries_s, default=0.0)
    return {
        "rounds": outcome.rounds,
        "acknowledged": account.acknowledged,
        "lost": len(account.lost),
        "doubled": len(account.doubled),
        "untyped": len(account.untyped),
        "slowest_recovery_s": round(slowest, 2),
        "answers": dict(account.answers.most_common()),
        "untyped_answers": account.untyped[:5],
        **outcome.notes,
        "kept": not (account.lost or account.doubled or account.untyped) and slowest <= WHOLE_S,
    }


async def run(kinds: list[str], rounds: int, concurrency: int) -> dict[str, Any]:
    """Run the kinds one after another."""
    found: dict[str, Any] = {}
    for kind in kinds:
        print(f"{kind}: {rounds} rounds", file=sys.stderr, flush=True)
        try:
            found[kind] = report_kind(await run_kind(kind, rounds, concurrency))
        except NoSmallDisk as error:
            found[kind] = {"rounds": 0, "kept": False, "not_run": str(error)}
        except TimeoutError as error:
            found[kind] = {"kept": False, "not_whole": str(error)}
    return {
        "benchmark": "faults",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "concurrency": concurrency,
        "kinds": found,
        "lost": sum(one.get("lost", 0) for one in found.values()),
        "doubled": sum(one.get("doubled", 0) for one in found.values()),
        "verdict": "kept" if all(one["kept"] for one in found.values()) else "not kept",
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100, help="of each kind")
    parser.add_argument("--only", default=",".join(KINDS), help="kinds, at commas")
    parser.add_argument("--concurrency", type=int, default=4, help="uploads at once")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parsed = parser.parse_args()
    kinds = parsed.only.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    report = asyncio.run(run(kinds, parsed.rounds, parsed.concurrency))
    text = json.dumps(report, indent=2)
    if parsed.output:
        parsed.output.write_text(text + "\n")
    print(text)
    sys.exit(0 if report["verdict"] == "kept" else 1)


if __name__ == "__main__":
    main()
