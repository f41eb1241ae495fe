"""Sealing and verifying a long audit log: `python -m benchmarks.audit --json`; the baseline is reading it."""

from __future__ import annotations

import argparse
import asyncio
from datetime import UTC, datetime
import json
import os
from pathlib import Path
import platform
import tempfile
from time import perf_counter
from typing import Any

from cluster.postgres import EmbeddedPostgres
from serve_app.records.audit_log import AuditChain
from serve_app.records.migrate import migrate
from serve_app.records.pool import Pool, open_pool

_FILL = """
INSERT INTO audit_events (action, actor, outcome, patient_id, lesion_id, request_id, detail)
SELECT 'read', 'dr-' || n % 50, 'success', 'p-' || n % 5000, gen_random_uuid(), gen_random_uuid()::text, '{"n": 1}'
FROM generate_series(1, $1::int) AS n
"""
_READ = "SELECT count(*), max(length(e::text)) FROM audit_events AS e"


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--events", type=int, default=1_000_000)
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="derm-audit-") as folder:
        home = Path(folder)
        home.chmod(0o711)
        postgres = EmbeddedPostgres(home)
        try:
            report = asyncio.run(_run(postgres.ensure().owner, parsed.events))
        finally:
            postgres.stop()
    print(json.dumps(report, indent=2 if parsed.json else None))


async def _run(dsn: str, events: int) -> dict[str, Any]:
    await migrate(dsn, application_role="derm_app")
    pool = await open_pool(dsn, minimum=0, maximum=2, timeout_s=600)
    try:
        await pool.execute(_FILL, events)
        read_s = await _seconds(pool)
        chain = AuditChain(pool)
        started = perf_counter()
        while await chain.seal(wait=True):
            pass
        sealed = perf_counter()
        found = await chain.verify()
        verified = perf_counter()
    finally:
        await pool.close()
    return {
        "benchmark": "audit",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "events": found.head.position,
        "findings": len(found.findings),
        "read_s": round(read_s, 1),
        "seal_s": round(sealed - started, 1),
        "verify_s": round(verified - sealed, 1),
    }


async def _seconds(pool: Pool) -> float:
    started = perf_counter()
    await pool.fetch(_READ)
    return perf_counter() - started


if __name__ == "__main__":
    main()
