"""Reports over many assessments: how long each takes, whether it equals a recount, and what counting costs an upload.

`python -m benchmarks.reports --json`: uploads, one at a time, to a plain uvicorn worker that counts them; then so many
assessments with reviews and outcomes are written by SQL, counted, asked for, and recounted from the record's own tables.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from datetime import UTC, date, datetime, timedelta
import json
from pathlib import Path
import tempfile
from time import perf_counter
from typing import Any

from benchmarks.load import default_archive, drive, images_in, make_upload
from benchmarks.systems import CORES, prepare_records, running_baseline
from cluster.postgres import DatabaseUrls, EmbeddedPostgres
from serve_app.records.pool import Pool, open_pool
from serve_app.records.reports import ReportKind, ReportStore
from serve_app.reports.publication import Reports
from serve_app.sql import parse

#: What is asked.
REPORT_WITHIN_S, MOST_OF_AN_UPLOAD = 1.0, 0.05
_BATCH, _ENDED = 50_000, 2_000
_SQL = parse(Path(__file__).with_suffix(".sql").read_text())
_FIELDS = {
    "patient_id": "benchmark-patient",
    "age_approx": "60",
    "sex": "male",
    "anatom_site_general": "torso",
}
_TRUTHS = {"melanoma": ["melanoma"], "other_malignant": ["other_malignant"], "benign": ["benign"]} | {
    "malignant": ["melanoma", "other_malignant"]
}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--assessments", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=12.0, help="of uploads; 0 for none")
    parser.add_argument("--port", type=int, default=8191)
    parser.add_argument("--images", type=Path, default=default_archive() / "uploads")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="derm-bench-") as folder:
        home = Path(folder)
        home.chmod(0o711)
        report = run(home, parsed)
    print(json.dumps(report, indent=2) if parsed.json else summary(report))


def run(home: Path, parsed: argparse.Namespace) -> dict[str, Any]:
    """Measure all of it on one database."""
    postgres = EmbeddedPostgres(home)
    urls = postgres.ensure()
    token = prepare_records(home, urls, clinician="dr-benchmark", patient=_FIELDS["patient_id"])
    try:
        uploads: dict[str, Any] | None = None
        if parsed.seconds:
            sent = [make_upload(image.read_bytes(), _FIELDS) for image in images_in(parsed.images)]
            with running_baseline(home, port=parsed.port, workers=1) as system:
                asyncio.run(drive(system.url, token, sent, concurrency=1, seconds=3.0))
                load = asyncio.run(drive(system.url, token, sent, concurrency=1, seconds=parsed.seconds))
            uploads = {name: load.report()[name] for name in ("p50_ms", "non_2xx")}
        found = asyncio.run(_measure(urls, parsed.assessments))
    finally:
        postgres.stop()
    if uploads:
        micros = found["trigger_us"] + found["counting_us_each"]
        found["share_of_an_upload"] = round(micros / (uploads["p50_ms"] * 1e3), 6)
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return {"benchmark": "reports", "at": at, "cores": CORES, "upload": uploads, **found}


def summary(report: dict[str, Any]) -> str:
    """The figures, for people."""
    return (
        f"{report['assessments']} assessments: summary {report['summary_s']} s, performance {report['performance_s']} s "
        f"(asked: {REPORT_WITHIN_S:.0f} each); {report['compared']} shown counts compared, {report['different']} differ; "
        f"counting: {report.get('share_of_an_upload', 0):.4%} of an upload (asked: {MOST_OF_AN_UPLOAD:.0%} at most)"
    )


async def _measure(urls: DatabaseUrls, assessments: int) -> dict[str, Any]:
    owner = await open_pool(urls.owner, minimum=0, maximum=1, timeout_s=3600)
    app = await open_pool(urls.app, minimum=0, maximum=1, timeout_s=60)
    store, reports = ReportStore(app), Reports(store=ReportStore(app))
    await store.count()
    await owner.execute("ALTER TABLE lesion_images DISABLE TRIGGER USER")
    for first in range(0, assessments, _BATCH):
        last = min(first + _BATCH, assessments) - 1
        await owner.execute(_SQL["generate"], first, last, max(1, assessments * 3 // 5))
    await owner.execute("ALTER TABLE lesion_images ENABLE TRIGGER USER")
    for query in ("queue", "say", "turn_out"):
        await owner.execute(_SQL[query])
    await owner.execute("ANALYZE")
    queued = await owner.fetchval("SELECT count(*) FROM report_queue")
    counting = await _timed(store.count())
    month = (datetime.now(UTC).date().replace(day=1) - timedelta(days=1)).replace(day=1)
    made, taken = {}, {}
    for kind in (ReportKind.SUMMARY, ReportKind.PERFORMANCE):
        taken[f"{kind}_s"] = await _timed(reports.report(kind))
        made[kind] = await reports.report(kind)
        taken[f"{kind}_again_s"] = await _timed(reports.report(kind))
    began = perf_counter()
    compared, different = await _recount(
        owner, month, {kind: each.document["tables"] for kind, each in made.items()}
    )
    recount_s = perf_counter() - began
    await owner.execute(_SQL["pending"], _ENDED)
    plan = json.loads(await owner.fetchval(_SQL["end"]))[0]
    (trigger,) = [each for each in plan["Triggers"] if each["Trigger Name"] == "assessments_counted"]
    await owner.close()
    await app.close()
    return {
        "assessments": assessments,
        "queued": queued,
        "counting_s": counting,
        "counting_us_each": round(counting / queued * 1e6, 1),
        "trigger_us": round(trigger["Time"] / trigger["Calls"] * 1e3, 1),
        **taken,
        "recount_s": round(recount_s, 1),
        "compared": compared,
        "different": different,
    }


async def _timed(work: Any) -> float:  # noqa: ANN401
    began = perf_counter()
    await work
    return round(perf_counter() - began, 3)


async def _recount(owner: Pool, month: date, tables: dict[ReportKind, Any]) -> tuple[int, int]:
    """How many counts are shown, and how many of them are not what the record's own tables hold."""
    start = datetime(month.year, month.month, 1, tzinfo=UTC)
    words: Counter[tuple[str, str]] = Counter()
    for row in await owner.fetch(_SQL["recount_words"], start):
        words[row["tab"], row["word"]] = row["n"]
    found = tables[ReportKind.SUMMARY]
    pairs = [
        (n, words[table, word])
        for table, name in {
            "outcome": "assessments", "diagnosis": "diagnoses", "level": "levels", "urgency": "urgencies",
            "decision": "decisions",
        }.items()
        for word, n in found[name].items() if word != "total"
    ]  # fmt: skip
    pairs += [
        (each["total"], words["result", kind])
        for kind, each in found["lesion_outcomes"].items()
        if kind != "all"
    ]
    lesions: Counter[tuple[str, ...]] = Counter()
    for row in await owner.fetch(_SQL["recount_lesions"], start):
        for table in ("site", "age_band", "skin_type"):
            lesions[row["model_id"], table, row[table], row["action"], row["truth"]] += row["n"]
    for model in tables[ReportKind.PERFORMANCE]["models"]:
        rows = [("site", None, model["all"])]
        for table in ("site", "age_band", "skin_type"):
            rows += [(table, row["group"], row) for row in model[f"by_{table}"]]
        for table, group, row in rows:
            mine: Counter[tuple[str, str]] = Counter()
            for (model_id, of, value, action, truth), n in lesions.items():
                if (model_id, of) == (model["model_id"], table) and group in {None, value}:
                    mine[action, truth] += n
            known = sum(n for (_, truth), n in mine.items() if truth != "unknown")
            pairs += [(row["lesions"], mine.total()), (row["with_outcome"], known)]
            for name, truths in _TRUTHS.items():
                missed = row[name]["not_referred" if name == "benign" else "missed"]
                parts = {action: sum(mine[action, truth] for truth in truths) for action in ("refer", "not")}
                pairs += [(row[name]["referred"], parts["refer"]), (missed, parts["not"])]
                pairs.append((row[name]["n"], parts["refer"] + parts["not"]))
    shown = [(n, counted) for n, counted in pairs if n is not None]
    return len(shown), sum(n != counted for n, counted in shown)


if __name__ == "__main__":
    main()
