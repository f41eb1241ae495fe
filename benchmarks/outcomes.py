"""Every image of the test fold through the running service: outcomes, reasons, risk, accuracy.

`python -m benchmarks.outcomes --json`: the images in their own size (minimum side 128), with
the age, sex and site that the archive states. What the service answers is held against the
labels, so that serving is seen to keep what the model card says.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
import csv
import json
from pathlib import Path
import sys
import tempfile
from typing import Any

import aiohttp

from benchmarks.load import default_archive, images_in, make_upload
from benchmarks.records import prepare_records
from benchmarks.systems import running_graph
from cluster.postgres import EmbeddedPostgres
from serve_app.domain.diagnosis import MALIGNANT, Diagnosis

_PATIENT = "outcomes-patient"
_CONTEXT = ("age_approx", "sex", "anatom_site_general")
TEST_FOLD = "0"


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--port", type=int, default=8290)
    parser.add_argument("--limit", type=int, help="only this many images")
    parser.add_argument("--isic", type=Path, default=default_archive())
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parsed = parser.parse_args()
    images_in(parsed.isic / "images")
    with (parsed.isic / "train.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["fold"] == TEST_FOLD][: parsed.limit]
    with tempfile.TemporaryDirectory(prefix="derm-outcomes-") as folder:
        home = Path(folder)
        home.chmod(0o711)
        postgres = EmbeddedPostgres(home)
        try:
            token = prepare_records(home, postgres, clinician="dr-outcomes", patient=_PATIENT)
            with running_graph(home, port=parsed.port, settings={"DERM_MIN_SIDE": "128"}) as system:
                report = asyncio.run(_assess_all(system.url, token, rows, parsed.isic / "images"))
        finally:
            postgres.stop()
    text = json.dumps(report, indent=2)
    if parsed.output:
        parsed.output.write_text(text + "\n")
    print(text if parsed.json else "\n".join(f"{name:32} {value}" for name, value in report.items()))


async def _assess_all(
    url: str, token: str, rows: list[dict[str, str]], images: Path, *, concurrency: int = 4
) -> dict[str, Any]:
    answers: list[tuple[Diagnosis, int, dict[str, Any]]] = []
    waiting = iter(rows)
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as session:

        async def client() -> None:
            for row in waiting:
                image = (images / f"{row['isic_id']}.jpg").read_bytes()
                fields = {name: row[name] for name in _CONTEXT if row[name]}
                upload = make_upload(image, fields | {"patient_id": _PATIENT})
                headers = {"Content-Type": upload.content_type}
                async with session.post(url, data=upload.body, headers=headers) as response:
                    answer = await response.json(content_type=None)
                    answers.append((Diagnosis(row["diagnosis"]), response.status, answer))
                if len(answers) % 500 == 0:
                    print(f"{len(answers)} of {len(rows)}", file=sys.stderr, flush=True)

        await asyncio.gather(*(client() for _ in range(concurrency)))
    return _report(answers)


def _report(answers: list[tuple[Diagnosis, int, dict[str, Any]]]) -> dict[str, Any]:
    assessed = [(truth, answer) for truth, status, answer in answers if status == 201]
    total = len(assessed)
    outcomes = Counter(answer["outcome"] for _, answer in assessed)
    reasons = Counter(reason["code"] for _, answer in assessed for reason in answer["reasons"])
    answered = [(truth, answer) for truth, answer in assessed if answer["classification"]]
    top3 = [(truth, [d["diagnosis"] for d in a["classification"]["top3"]]) for truth, a in answered]
    levels: dict[str, Counter[str]] = {"malignant": Counter(), "benign": Counter(), "MEL": Counter()}
    for truth, answer in answered:
        level = answer["risk"]["level"]
        levels["malignant" if truth in MALIGNANT else "benign"][level] += 1
        if truth is Diagnosis.MEL:
            levels["MEL"][level] += 1
    return {
        "images": len(answers),
        "statuses": dict(Counter(status for _, status, _ in answers)),
        "outcomes": dict(outcomes),
        "refused_share": round(outcomes["refused"] / total, 4),
        "review_share": round(outcomes["review"] / total, 4),
        "reasons": dict(reasons.most_common()),
        "top1": round(sum(truth == best[0] for truth, best in top3) / len(top3), 4),
        "top3": round(sum(truth in best for truth, best in top3) / len(top3), 4),
        "risk_levels": {kind: dict(counted) for kind, counted in levels.items()},
        "melanoma_not_low": round(1 - levels["MEL"]["low"] / levels["MEL"].total(), 4),
    }


if __name__ == "__main__":
    main()
