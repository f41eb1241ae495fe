"""The embed job killed again and again: `python -m benchmarks.embedding_kills --json`.

Runs the job undisturbed, empties the database, and then kills the job (`kill -9`) --kills times: once while it starts,
then each time at a random moment of its own part of the work, the last one near the end. After each kill it counts,
for a kill that came when all was stored would prove nothing. Then a last run ends it, and both are compared: every
image once, every vector equal bit by bit.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
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
from benchmarks.load import default_archive, images_in
from cluster.postgres import EmbeddedPostgres
from model_store.registry import ModelStore
from serve_app.records.migrate import migrate
from serve_app.records.pool import open_pool
from serve_app.settings import REPOSITORY

#: The last kill comes before so much is stored: what is in the midst of being stored is still to come.
_LAST_SHARE = 0.9
_LOOK_EVERY_S = 0.02
_COUNT = "SELECT count(*) FROM reference_embeddings"
_SPACE_DROP = "TRUNCATE reference_embeddings, reference_failures, space_embedders"


def main() -> None:
    """Run and print; exit code 1 when a kill came too late, or anything was lost, doubled or changed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--count", type=int, default=5_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--isic", type=Path, default=default_archive())
    parsed = parser.parse_args()
    images_in(parsed.isic / "images")
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
    right = report["equal_bit_by_bit"] and report["incomplete_at_each_kill"]
    sys.exit(0 if right and report["rows"] == parsed.count else 1)


def _drill(dsn: str, folder: Path, models: Path, parsed: argparse.Namespace) -> dict[str, object]:
    asyncio.run(migrate(dsn, application_role="derm_app"))
    model_id = next(iter(ModelStore(models)))
    # Transactions small enough for every kill to have some before it and some after it.
    rows = max(4, min(256, parsed.count // (8 * parsed.kills)))
    command = [sys.executable, "-m", "data_jobs.references.embed", str(folder), "--model", model_id]
    command += ["--models", str(models), "--no-pictures", "--rows-per-write", str(rows)]
    began = monotonic()
    process = _start(command, dsn)
    _until_stored(process, dsn, 1)
    starting_s = monotonic() - began
    _until_stored(process, dsn, parsed.count)
    # From the first transaction to the last: what comes before and after has no part in how long one takes.
    transaction_s = (monotonic() - began - starting_s) * rows / parsed.count
    process.wait()
    undisturbed_s = monotonic() - began
    expected = asyncio.run(_vectors(dsn))
    asyncio.run(_execute(dsn, _SPACE_DROP))
    rng = np.random.default_rng(parsed.seed)
    kills = []
    for share in _shares(parsed.kills, rng):
        began = monotonic()
        process = _start(command, dsn)
        if share is None:
            sleep(rng.uniform(0.0, 0.9 * starting_s))
        else:
            _until_stored(process, dsn, int(share * parsed.count))
            # Counting ends just behind a transaction: kills are wanted in the midst of one, too.
            sleep(rng.uniform(0.0, transaction_s))
        ended = process.poll() is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        stored = asyncio.run(_count(dsn))
        kills.append({"after_s": round(monotonic() - began, 1), "stored": stored, "job_had_ended": ended})
    _start(command, dsn).wait()
    found = asyncio.run(_vectors(dsn))
    return {
        "benchmark": "embedding_kills",
        "images": parsed.count,
        "rows_per_write": rows,
        "kills": kills,
        "incomplete_at_each_kill": all(
            kill["stored"] < parsed.count and not kill["job_had_ended"] for kill in kills
        ),
        "rows": len(found),
        "equal_bit_by_bit": found == expected,
        "starting_s": round(starting_s, 1),
        "undisturbed_s": round(undisturbed_s, 1),
    }


def _shares(kills: int, rng: np.random.Generator) -> list[float | None]:
    """How much is to be stored at each kill, ever more, each in its own part of the work; None: while it starts."""
    parts = np.linspace(0.0, _LAST_SHARE, kills)
    return [None, *(float(rng.uniform(low, high)) for low, high in itertools.pairwise(parts))]


def _until_stored(process: subprocess.Popen[bytes], dsn: str, count: int) -> None:
    """Wait until so many vectors are stored, or the job has ended."""

    async def wait() -> None:
        # One connection: a small job stores all it has in the time that a few take to open.
        pool = await open_pool(dsn, minimum=0, maximum=1, timeout_s=60)
        try:
            while process.poll() is None:
                if await pool.fetchval(_COUNT) >= count:
                    break
                await asyncio.sleep(_LOOK_EVERY_S)
        finally:
            await pool.close()

    asyncio.run(wait())


def _start(command: list[str], dsn: str) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"DERM_OWNER_DATABASE_URL": dsn, "PYTHONWARNINGS": ""}
    return subprocess.Popen(
        command, env=environment, cwd=REPOSITORY, stdout=subprocess.DEVNULL, start_new_session=True
    )


async def _count(dsn: str) -> int:
    pool = await open_pool(dsn, minimum=0, maximum=1, timeout_s=60)
    try:
        return int(await pool.fetchval(_COUNT))
    finally:
        await pool.close()


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
