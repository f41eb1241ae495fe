"""The embed job against a plain two-process ONNX Runtime pool over the same files, in one run.

`python -m benchmarks.embedding --json`: images a second in steady state and of the whole process from start to
end, with indexing and without, peak PSS of everything the job starts, and what indexing takes. The archive's images are repeated under new ids up to
--count; that is fine for load and would be no measure of recall.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
import json
import multiprocessing
import os
from pathlib import Path
import platform
import subprocess
import sys
import tempfile
from threading import Event, Thread
from time import monotonic
from typing import Any

import numpy as np
import psutil

from benchmarks.load import default_archive, images_in
from benchmarks.systems import measure_pss
from cluster.postgres import EmbeddedPostgres
from data_jobs.references.catalogue import CatalogueEntry, read_catalogue, write_catalogue
from data_jobs.references.embedder import (
    ReferenceEmbedder,
    prepare_reference,
    space_spec,
)
from deployments.preprocess.pixels import InputGeometry
from model_store.registry import ModelStore
from serve_app.records.migrate import migrate
from serve_app.records.pool import open_pool
from serve_app.records.references import FailedReference
from serve_app.settings import REPOSITORY, model_folder

_PROCESSES = 2
#: Reading the PSS of all of Ray's processes takes a tenth of a second of a core: seldom enough to cost the job nothing.
_SAMPLE_S = 10.0
#: The share of images between which the job runs neither warming up nor out.
_STEADY = (0.1, 0.9)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--baseline-count", type=int, default=3_000, help="images of the plain pool")
    parser.add_argument("--model", help="default: the first of the store")
    parser.add_argument("--isic", type=Path, default=default_archive())
    parser.add_argument("--pictures", action="store_true", help="have the job make pictures, too")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parsed = parser.parse_args()
    images_in(parsed.isic / "images")
    models = model_folder()
    model_id = parsed.model or next(iter(ModelStore(models)))
    with tempfile.TemporaryDirectory(prefix="derm-embedding-") as scratch:
        folder = repeat_archive(parsed.isic.resolve(), Path(scratch) / "references", parsed.count)
        before = _run_pool(folder, models, model_id, parsed.baseline_count)
        job = _run_job(Path(scratch), folder, models, model_id, pictures=parsed.pictures)
        after = _run_pool(folder, models, model_id, parsed.baseline_count)
    pool = (before + after) / 2.0
    rates = ("steady", "start_to_end", "start_to_end_without_indexing")
    report = {
        "benchmark": "embedding",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "images": parsed.count,
        "pictures": parsed.pictures,
        "pool_images_per_s": {"before": round(before, 2), "after": round(after, 2)},
        "job": job,
        **{f"{rate}_ratio": _ratio(job[f"{rate}_images_per_s"], pool) for rate in rates},
    }
    text = json.dumps(report, indent=2)
    if parsed.output:
        parsed.output.write_text(text + "\n")
    print(text if parsed.json else "\n".join(f"{name:36} {value}" for name, value in report.items()))


def repeat_archive(archive: Path, folder: Path, count: int) -> Path:
    """Make a folder of so many references: the archive's images, linked again and again under new ids."""
    (folder / "images").mkdir(parents=True)
    entries: list[CatalogueEntry] = read_catalogue(archive)
    made = []
    for number in range(count):
        entry = entries[number % len(entries)]
        isic_id = f"ISIC_{90_000_000 + number}"
        path = f"images/{isic_id}.jpg"
        (folder / path).symlink_to(archive / entry.path)
        made.append(replace(entry, isic_id=isic_id, lesion_id=None, path=path))
    write_catalogue(folder, made)
    return folder


def _run_pool(folder: Path, models: Path, model_id: str, count: int) -> float:
    """Images a second of two processes that prepare and embed, each a file at a time, and do nothing else."""
    paths = [folder / entry.path for entry in read_catalogue(folder)[:count]]
    context = multiprocessing.get_context("spawn")
    with context.Pool(_PROCESSES, initializer=_open_model, initargs=(models, model_id)) as pool:
        pool.map(_embed_file, paths[:64], chunksize=16)
        started = monotonic()
        vectors = pool.map(_embed_file, paths, chunksize=32)
        seconds = monotonic() - started
    if not np.isfinite(np.stack(vectors)).all():
        raise SystemExit("The plain pool gave a vector that is not finite.")
    return len(paths) / seconds


_open: dict[str, Any] = {}


def _open_model(models: Path, model_id: str) -> None:
    model = ModelStore(models).open(model_id)
    _open["geometry"] = InputGeometry.from_manifest(model.manifest.input)
    _open["embedder"] = ReferenceEmbedder(model, space_spec(model, None))


def _embed_file(path: Path) -> Any:  # noqa: ANN401 - a vector, by way of pickle
    prepared = prepare_reference(path, path.stem, _open["geometry"], picture=False)
    if isinstance(prepared, FailedReference):
        raise SystemExit(f"{path}: {prepared.detail}")
    return _open["embedder"].embed(prepared.pixels[np.newaxis])[0]


def _run_job(scratch: Path, folder: Path, models: Path, model_id: str, *, pictures: bool) -> dict[str, Any]:
    home = scratch / "home"
    home.mkdir()
    scratch.chmod(0o711)
    home.chmod(0o711)
    postgres = EmbeddedPostgres(home)
    command = [sys.executable, "-m", "data_jobs.references.embed", str(folder), "--model", model_id]
    command += ["--models", str(models), *([] if pictures else ["--no-pictures"])]
    try:
        urls = postgres.ensure()
        asyncio.run(migrate(urls.owner, application_role="derm_app"))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"DERM_OWNER_DATABASE_URL": urls.owner, "PYTHONWARNINGS": ""}
        started = monotonic()
        process = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE)
        with _watching(process.pid, urls.owner, started) as seen:
            said, _ = process.communicate()
        seconds = monotonic() - started
    finally:
        postgres.stop()
    if process.returncode:
        raise SystemExit(f"The job exited with {process.returncode}: {said.decode()[-2000:]}")
    report = json.loads(said.splitlines()[-1])
    indexing_s = report["total_s"] - report["embedding_s"]
    return {
        "embedded": report["embedded"],
        "seconds": round(seconds, 1),
        "indexing_s": round(indexing_s, 1),
        "steady_images_per_s": _steady_rate(seen["stored"], report["expected"]),
        "start_to_end_images_per_s": round(report["embedded"] / seconds, 2),
        "start_to_end_without_indexing_images_per_s": round(report["embedded"] / (seconds - indexing_s), 2),
        "peak_pss_mb": max(seen["pss"]),
    }


def _ratio(rate: float | None, pool: float) -> float | None:
    return None if rate is None else round(rate / pool, 3)


def _steady_rate(stored: list[tuple[float, int]], total: int) -> float | None:
    """Images a second between warming up and running out; None when the job was too short to be seen there twice."""
    steady = [(at, count) for at, count in stored if _STEADY[0] * total <= count <= _STEADY[1] * total]
    if len(steady) < 2:
        return None
    (first_at, first), (last_at, last) = steady[0], steady[-1]
    return round((last - first) / (last_at - first_at), 2)


@contextmanager
def _watching(pid: int, dsn: str, started: float) -> Iterator[dict[str, list[Any]]]:
    """Note every few seconds how many vectors are stored, and the PSS of the job and all it has started."""
    seen: dict[str, list[Any]] = {"stored": [], "pss": [0.0]}
    over = Event()

    async def look() -> None:
        pool = await open_pool(dsn, minimum=0, maximum=1)
        while not over.is_set():
            count = await pool.fetchval("SELECT count(*) FROM reference_embeddings")
            seen["stored"].append((monotonic() - started, count))
            seen["pss"].append(measure_pss([psutil.Process(pid)])["total_mb"])
            await asyncio.sleep(_SAMPLE_S)
        await pool.close()

    thread = Thread(target=lambda: asyncio.run(look()), daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


if __name__ == "__main__":
    main()
