"""What a page of the worklist costs: the clinic's lesions, a clinician's share of them, from first page to last.

`python -m benchmarks.worklist --json`: the store's statement alone, as the application's role, one after another.
"""

from __future__ import annotations

import argparse
import asyncio
from datetime import UTC, datetime
import json
from pathlib import Path
import statistics
import tempfile
from time import perf_counter, process_time
from typing import Any

import psutil

from benchmarks.systems import measure_cpu
from cluster.postgres import DatabaseUrls, EmbeddedPostgres
from serve_app.records.migrate import migrate
from serve_app.records.pool import open_pool
from serve_app.records.worklist import WorkKind, WorklistStore, WorkPlace
from serve_app.sql import parse

_SQL = parse(Path(__file__).with_suffix(".sql").read_text())
_CLINICIAN = "dr-benchmark"
_DAYS = {"urgent": 14, "expedited": 28, "routine": 126}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument(
        "--lesions", type=int, default=100_000, help="in the clinic, of half as many patients"
    )
    parser.add_argument("--in-care", type=int, default=2_000, help="lesions in the clinician's care")
    parser.add_argument("--limit", type=int, default=50)
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="derm-bench-") as folder:
        home = Path(folder)
        home.chmod(0o711)
        postgres = EmbeddedPostgres(home)
        try:
            urls = postgres.ensure()
            report = asyncio.run(run(urls, psutil.Process(postgres.pid()), parsed))
        finally:
            postgres.stop()
    print(json.dumps(report, indent=2) if parsed.json else summary(report))


async def run(urls: DatabaseUrls, server: psutil.Process, parsed: argparse.Namespace) -> dict[str, Any]:
    """Fill the records, and read the whole list twice, page by page."""
    await migrate(urls.owner, application_role="derm_app")
    owner = await open_pool(urls.owner, minimum=0, maximum=1, timeout_s=600)
    await owner.execute(_SQL["fill"], parsed.lesions, parsed.lesions // 2)
    await owner.execute(_SQL["decide"])
    await owner.execute(_SQL["care"], _CLINICIAN, parsed.in_care // 2)
    for table in ("lesions", "lesion_images", "assessments", "reviews", "care_assignments"):
        await owner.execute(f"VACUUM ANALYZE {table}")
    pool = await open_pool(urls.app, minimum=1, maximum=1, timeout_s=60)
    store = WorklistStore(pool, _DAYS)
    took: list[float] = []
    await store.worklist(_CLINICIAN, limit=1)
    before = process_time() + sum(measure_cpu([server]).values())
    for _ in range(2):
        after: WorkPlace | None = None
        kinds: dict[str, int] = {}
        while True:
            began = perf_counter()
            page = await store.worklist(_CLINICIAN, kinds=tuple(WorkKind), limit=parsed.limit, after=after)
            took.append((perf_counter() - began) * 1e3)
            for item in page:
                kinds[item.kind] = kinds.get(item.kind, 0) + 1
            if len(page) < parsed.limit:
                break
            after = page[-1].place
    used = process_time() + sum(measure_cpu([server]).values()) - before
    await pool.close()
    await owner.close()
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "benchmark": "worklist",
        "at": at,
        "lesions": parsed.lesions,
        "in_care": parsed.in_care,
        "items": kinds,
        "pages": len(took),
        "cpu_ms": round(used / len(took) * 1e3, 1),
        "p50_ms": round(statistics.median(took), 1),
        "p95_ms": round(statistics.quantiles(took, n=20)[-1], 1),
    }


def summary(report: dict[str, Any]) -> str:
    """The figures, for people."""
    return (
        f"{sum(report['items'].values())} items of {report['in_care']} lesions in care, of {report['lesions']}: a page in"
        f" {report['p50_ms']} ms (p95 {report['p95_ms']}), {report['cpu_ms']} of the processors'"
    )


if __name__ == "__main__":
    main()
