"""Uploads while the embed job runs on the same node, against uploads without it, in one run.

`python -m benchmarks.embedding_beside_serving --json`: starts `derm-cds serve --dashboard` on a home of its own,
drives uploads at one concurrency before, while and after `ray job submit` embeds --count references into the space
that answers, and reports latencies, statuses and what the job said. Exit code 1 when an answer was no 201, or an
image is missing.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
import json
import os
from pathlib import Path
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.embedding import repeat_archive
from benchmarks.load import LoadResult, Upload, default_archive, drive, images_in, make_upload
from benchmarks.records import prepare_records
from benchmarks.systems import CORES
from cluster.ports import choose_port
from cluster.postgres import EmbeddedPostgres
from cluster.ray_node import RayNode
from cluster.running import running_service
from model_store.registry import ModelStore
from serve_app.settings import REPOSITORY

_PATIENT = "embedding-patient"
_READY_S, _STOP_S = 300.0, 60.0
#: The load is looked at so often for whether the job has ended.
_TURN_S = 5.0


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--count", type=int, default=1_000)
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30.0, help="of load before the job, and after it")
    parser.add_argument("--option", action="append", default=[], help="for the job: --option=--actors=1")
    parser.add_argument("--isic", type=Path, default=default_archive())
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parsed = parser.parse_args()
    images_in(parsed.isic / "images")
    images_in(parsed.isic / "uploads")
    with tempfile.TemporaryDirectory(prefix="derm-beside-") as scratch:
        Path(scratch).chmod(0o711)
        folder = repeat_archive(parsed.isic.resolve(), Path(scratch) / "references", parsed.count)
        with _serving(Path(scratch) / "home") as (url, token, home):
            phases, said, code = asyncio.run(_measure(url, token, home, folder, parsed))
    report = _report(phases, said, code, parsed)
    text = json.dumps(report, indent=2)
    if parsed.output:
        parsed.output.write_text(text + "\n")
    print(text if parsed.json else "\n".join(f"{name:16} {value}" for name, value in report.items()))
    job = report["job"]
    complete = job and job["found"] + job["embedded"] == job["expected"]
    sys.exit(0 if complete and report["only_201"] and code == 0 else 1)


@contextmanager
def _serving(home: Path) -> Iterator[tuple[str, str, Path]]:
    """A node as an operator starts it; gives where to upload, a token, and its home."""
    home.mkdir(mode=0o711)
    postgres, port = EmbeddedPostgres(home), choose_port()
    token = prepare_records(home, postgres, clinician="dr-embedding", patient=_PATIENT)
    command = [sys.executable, "-m", "cluster.cli", "serve", "--home", str(home), "--port", str(port)]
    # A job starts in a folder of Ray's, and must find this code there.
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": ""}
    with (home.parent / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--dashboard"], env=environment, cwd=REPOSITORY, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + _READY_S
        while not ((running := running_service(home)) and running.ready):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"The node did not start: {(home.parent / 'serve.log').read_text()[-2000:]}")
            time.sleep(0.5)
        yield f"{running.url}/api/lesions", token, home
    finally:
        process.terminate()
        process.wait(_STOP_S)
        RayNode(home).stop()
        shutil.rmtree(RayNode(home).directory, ignore_errors=True)
        postgres.stop()


async def _measure(
    url: str, token: str, home: Path, folder: Path, parsed: argparse.Namespace
) -> tuple[dict[str, LoadResult], str, int]:
    uploads = _uploads(parsed.isic / "uploads")

    async def load(seconds: float) -> LoadResult:
        return await drive(url, token, uploads, concurrency=parsed.concurrency, seconds=seconds)

    await load(min(_TURN_S, parsed.seconds))  # what the first requests warm up is no part of the comparison
    before = await load(parsed.seconds)
    job = asyncio.create_task(_submit(home, folder, parsed.option))
    during = LoadResult(parsed.concurrency)
    while not job.done():
        _add(during, await load(_TURN_S))
    said, code = await job
    return {"before": before, "during": during, "after": await load(parsed.seconds)}, said, code


async def _submit(home: Path, folder: Path, options: list[str]) -> tuple[str, int]:
    """Submit the job as docs/references.md has it, and wait for its end; what it said, and the exit code."""
    model_id = next(iter(ModelStore(REPOSITORY / "model_store" / "models")))
    job = ["python", "-m", "data_jobs.references.embed", str(folder), "--model", model_id, *options]
    script = (
        f'eval "$({shlex.quote(sys.executable)} -m cluster.cli environment --home {shlex.quote(str(home))})"\n'
        f"exec {shlex.quote(sys.executable)} -m ray.scripts.scripts job submit -- {shlex.join(job)}"
    )
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", script),
        cwd=REPOSITORY,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    return said.decode(), process.returncode or 0


def _add(whole: LoadResult, part: LoadResult) -> None:
    whole.seconds += part.seconds
    whole.latencies_ms += part.latencies_ms
    whole.statuses += part.statuses
    for stage, times in part.stages_ms.items():
        whole.stages_ms.setdefault(stage, []).extend(times)


def _uploads(folder: Path) -> list[Upload]:
    return [
        make_upload(path.read_bytes(), {"patient_id": _PATIENT, "age_approx": "60"})
        for path in images_in(folder)
    ]


def _report(
    phases: dict[str, LoadResult], said: str, code: int, parsed: argparse.Namespace
) -> dict[str, Any]:
    lines = [line for line in said.splitlines() if line.startswith('{"embedding_space"')]
    if code or not lines:
        print(said[-4000:], file=sys.stderr)
    return {
        "benchmark": "embedding_beside_serving",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": CORES, "processor": platform.processor() or platform.machine()},
        "images": parsed.count,
        "job_options": parsed.option,
        "only_201": all(set(result.statuses) == {201} for result in phases.values()),
        "job_exit_code": code,
        "job": json.loads(lines[-1]) if lines else None,
        "job_said": [line for line in said.splitlines() if " s] " in line],
        **{name: result.report() for name, result in phases.items()},
    }


if __name__ == "__main__":
    main()
