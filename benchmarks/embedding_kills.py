"""The embed job killed again and again: `python -m benchmarks.embedding_kills --json`.

Runs the job undisturbed, then in a second database with --kills `kill -9` at random moments, each followed
by a new start, and compares: every image once, every vector equal bit by bit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import tempfile
from time import monotonic, sleep

import numpy as np

from benchmarks.embedding import repeat_archive
from cluster.postgres import EmbeddedPostgres
from model_store.registry import ModelStore
from serve_app.records.migrate import migrate
from serve_app.records.pool import open_pool
from serve_app.settings import REPOSITORY

_SPACE_DROP = "TRUNCATE reference_embeddings, reference_failures, space_embedders"


def main() -> None:
    """Run and print; exit code 1 when anything was lost, doubled or changed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--count", type=int, default=5_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=10)
    default = os.environ.get("DERM_ISIC_DIR", REPOSITORY.parent / "shared" / "isic")
    parser.add_argument("--isic", type=Path, default=Path(default))
    parsed = parser.parse_args()
    models = Path(os.environ.get("DERM_MODELS", REPOSITORY / "model_store" / "models"))
    with tempfile.TemporaryDirectory(prefix="derm-kills-") as scratch:
        folder = repeat_archive(parsed.isic.resolve(), Path(scratch) / "references", parsed.count)
        home = Path(scratch) / "home"
        home.mkdir()
        Path(scratch).chmod(0o711)
        home.chmod(0o711)
        postgres = EmbeddedPostgres(home)
        try:
            report = _drill(postgres.ensure().owner, folder, models, parsed)
        finally:
            postgres.stop()
    print(json.dumps(report, indent=2 if parsed.json else None))
    sys.exit(0 if report["equal_bit_by_bit"] and report["rows"] == parsed.count else 1)


def _drill(dsn: str, folder: Path, models: Path, parsed: argparse.Namespace) -> dict[str, object]:
    asyncio.run(migrate(dsn, application_role="derm_app"))
    model_id = next(iter(ModelStore(models)))
    command = [sys.executable, "-m", "data_jobs.references.embed", str(folder), "--model", model_id]
    command += ["--models", str(models), "--no-pictures"]
    began = monotonic()
    _start(command, dsn).wait()
    undisturbed_s = monotonic() - began
    expected = asyncio.run(_vectors(dsn))
    asyncio.run(_execute(dsn, _SPACE_DROP))
    rng = np.random.default_rng(parsed.seed)
    stored_at_kill = []
    for _ in range(parsed.kills):
        process = _start(command, dsn)
        # Some kills hit a job that is still starting, some one that writes: both must be survived.
        sleep(rng.uniform(0.0, undisturbed_s / 2.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        stored_at_kill.append(len(asyncio.run(_vectors(dsn))))
    _start(command, dsn).wait()
    found = asyncio.run(_vectors(dsn))
    return {
        "benchmark": "embedding_kills",
        "images": parsed.count,
        "kills": parsed.kills,
        "stored_at_each_kill": stored_at_kill,
        "rows": len(found),
        "equal_bit_by_bit": found == expected,
        "undisturbed_s": round(undisturbed_s, 1),
    }


def _start(command: list[str], dsn: str) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"DERM_OWNER_DATABASE_URL": dsn, "PYTHONWARNINGS": ""}
    return subprocess.Popen(
        command, env=environment, cwd=REPOSITORY, stdout=subprocess.DEVNULL, start_new_session=True
    )


async def _vectors(dsn: str) -> dict[str, bytes]:
    pool = await open_pool(dsn, minimum=0, maximum=1, timeout_s=60)
    try:
        rows = await pool.fetch("SELECT isic_id, embedding FROM reference_embeddings")
        return {row["isic_id"]: row["embedding"].to_numpy().tobytes() for row in rows}
    finally:
        await pool.close()


async def _execute(dsn: str, statement: str) -> None:
    pool = await open_pool(dsn, minimum=0, maximum=1, timeout_s=60)
    try:
        await pool.execute(statement)
    finally:
        await pool.close()


if __name__ == "__main__":
    main()
