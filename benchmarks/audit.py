"""What the audit log costs: its hashing against an upload's time in one run, and a long log sealed and verified.

`python -m benchmarks.audit --json`: uploads, one at a time, to plain uvicorn workers; then their own events are hashed
again, alone. Then so many events like theirs are written, sealed, verified, exported, and the export verified.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable
from datetime import UTC, datetime
import json
from pathlib import Path
import tempfile
from time import perf_counter, process_time
from typing import Any, TypeVar

import psutil

from benchmarks.load import default_archive, drive, images_in, make_upload
from benchmarks.systems import CORES, measure_cpu, prepare_records, running_baseline
from cluster.postgres import DatabaseUrls, EmbeddedPostgres
from serve_app.audit.chain import GENESIS, export_line, exported_events, follow, link, read_events
from serve_app.records.audit_log import AuditChain, copy_rows
from serve_app.records.pool import open_pool
from serve_app.sql import parse

#: What is asked of both.
MOST_OF_AN_UPLOAD, VERIFIED_WITHIN_S = 0.03, 60.0

_SQL = parse(Path(__file__).with_suffix(".sql").read_text())
_FIELDS = {
    "patient_id": "benchmark-patient",
    "age_approx": "60",
    "sex": "male",
    "anatom_site_general": "torso",
}

Result = TypeVar("Result")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--seconds", type=float, default=12.0, help="of uploads")
    parser.add_argument("--events", type=int, default=1_000_000, help="in the long log")
    parser.add_argument("--port", type=int, default=8190)
    parser.add_argument("--images", type=Path, default=default_archive() / "uploads")
    parsed = parser.parse_args()
    images_in(parsed.images)
    with tempfile.TemporaryDirectory(prefix="derm-bench-") as folder:
        home = Path(folder)
        home.chmod(0o711)
        report = run(home, parsed)
    print(json.dumps(report, indent=2) if parsed.json else summary(report))


def run(home: Path, parsed: argparse.Namespace) -> dict[str, Any]:
    """Measure both on one database."""
    postgres = EmbeddedPostgres(home)
    urls = postgres.ensure()
    token = prepare_records(home, urls, clinician="dr-benchmark", patient=_FIELDS["patient_id"])
    uploads = [make_upload(image.read_bytes(), _FIELDS) for image in images_in(parsed.images)]
    try:
        with running_baseline(home, port=parsed.port, workers=1) as system:
            asyncio.run(drive(system.url, token, uploads, concurrency=1, seconds=3.0))
            load = asyncio.run(drive(system.url, token, uploads, concurrency=1, seconds=parsed.seconds))
        hashing = asyncio.run(_hash_alone(urls, load.report()))
        export, server = home / "log.ndjson", psutil.Process(postgres.pid())
        log = asyncio.run(_long_log(urls, server, export, parsed.events))
        log["export_mb"] = round(export.stat().st_size / 1e6, 1)
    finally:
        postgres.stop()
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return {"benchmark": "audit", "at": at, "cores": CORES, "upload": hashing, "log": log}


def summary(report: dict[str, Any]) -> str:
    """The figures, for people."""
    upload, log = report["upload"], report["log"]
    return (
        f"hashing, of an upload's time: {upload['share']:.4%} (asked: {MOST_OF_AN_UPLOAD:.0%} at most)\n"
        f"{log['events']} events verified in {log['verify']['s']} s (asked: {VERIFIED_WITHIN_S:.0f}), of the "
        f"processors' {log['verify']['cpu_s']}"
    )


async def _hash_alone(urls: DatabaseUrls, load: dict[str, Any]) -> dict[str, Any]:
    """Hash the events of the uploads again, which the sealer did meanwhile; against the uploads' median."""
    pool = await open_pool(urls.app, minimum=0, maximum=1, timeout_s=60)
    async with pool.connection() as connection:
        copied = await copy_rows(connection, _SQL["written"])
    await pool.close()
    count, began, before = 0, perf_counter(), GENESIS
    for count, event in enumerate(read_events(copied), 1):
        before = link(before, count, event.text or b"")
    event_us = (perf_counter() - began) / count * 1e6
    upload_us = 2 * event_us  # one event each commit
    return {
        "p50_ms": load["p50_ms"],
        "non_2xx": load["non_2xx"],
        "events_hashed": count,
        "event_us": round(event_us, 2),
        "share": round(upload_us / (load["p50_ms"] * 1e3), 6),
    }


async def _long_log(urls: DatabaseUrls, server: psutil.Process, export: Path, events: int) -> dict[str, Any]:
    owner = await open_pool(urls.owner, minimum=0, maximum=1, timeout_s=300)
    while (there := await owner.fetchval("SELECT count(*) FROM audit_events")) < events:
        await owner.execute(_SQL["multiply"], min(100_000, events - there))
    await owner.execute("ANALYZE audit_events")
    await owner.close()
    pool = await open_pool(urls.app, minimum=0, maximum=1, timeout_s=60)
    chain = AuditChain(pool)

    async def seal() -> None:
        while await chain.seal(wait=True):
            pass

    async def write() -> None:
        with export.open("wb") as file:
            async for batch in chain.events():
                file.writelines(map(export_line, batch))

    def used() -> float:
        return process_time() + sum(measure_cpu([server]).values())

    taken: dict[str, dict[str, float]] = {}

    async def time(name: str, work: Awaitable[Result]) -> Result:
        """A busy machine disturbs the processors' seconds, this process's and the server's, least."""
        began, before = perf_counter(), used()
        result = await work
        taken[name] = {"s": round(perf_counter() - began, 1), "cpu_s": round(used() - before, 1)}
        return result

    await time("seal", seal())
    found = await time("verify", chain.verify())
    await time("export", write())
    again = await time("verify_export", follow(exported_events(export), [found.head]))
    await pool.close()
    findings = len(found.findings) + len(again.findings)
    return {"events": found.head.position, "findings": findings, **taken}


if __name__ == "__main__":
    main()
