"""The graph against its baseline, in one run: latency, throughput, memory.

`python -m benchmarks.serving --json`: the baseline is the same plain functions in two uvicorn
workers, without Ray. Both have the same model, database, durability and audit.
"""

from __future__ import annotations

import argparse
import asyncio
from contextlib import AbstractContextManager
from datetime import UTC, datetime
import json
from pathlib import Path
import platform
import sys
import tempfile
from typing import Any

from benchmarks.load import LoadResult, Upload, default_archive, drive, images_in, make_upload
from benchmarks.systems import CORES, System, prepare_records, running_baseline, running_graph
from cluster.postgres import EmbeddedPostgres

_CLINICIAN = "dr-benchmark"
PATIENT = "benchmark-patient"
_CONCURRENCIES = (1, 5, 16)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--seconds", type=float, default=12.0, help="of load at each concurrency")
    parser.add_argument("--rounds", type=int, default=2, help="graph and baseline take turns")
    parser.add_argument("--port", type=int, default=8190)
    parser.add_argument("--dashboard", action="store_true", help="with Ray's dashboard")
    parser.add_argument("--images", type=Path, default=default_archive() / "uploads")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parsed = parser.parse_args()
    images_in(parsed.images)
    with tempfile.TemporaryDirectory(prefix="derm-bench-") as folder:
        home = Path(folder)
        home.chmod(0o711)
        report = run(home, parsed)
    text = json.dumps(report, indent=2)
    if parsed.output:
        parsed.output.write_text(text + "\n")
    print(text if parsed.json else summary(report))


def run(home: Path, parsed: argparse.Namespace) -> dict[str, Any]:
    """Start each system in turn, drive it, and compare."""
    postgres = EmbeddedPostgres(home)
    token = prepare_records(home, postgres.ensure(), clinician=_CLINICIAN, patient=PATIENT)
    uploads = _uploads(images_in(parsed.images))
    measured: dict[str, list[dict[str, Any]]] = {"graph": [], "baseline": []}
    try:
        for number in range(parsed.rounds):
            for name in ("graph", "baseline"):
                _say(f"round {number + 1} of {parsed.rounds}: {name}")
                with _start(name, home, parsed) as system:
                    measured[name].append(_measure(system, token, uploads, parsed.seconds))
    finally:
        postgres.stop()
    return {
        "benchmark": "serving",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": CORES, "processor": platform.processor() or platform.machine()},
        "images": len(uploads),
        "dashboard": parsed.dashboard,
        "ratios": _ratios(measured),
        **measured,
    }


def summary(report: dict[str, Any]) -> str:
    """The ratios, for people."""
    return "\n".join(f"{name:40} {value}" for name, value in report["ratios"].items())


def _start(name: str, home: Path, parsed: argparse.Namespace) -> AbstractContextManager[System]:
    if name == "graph":
        return running_graph(home, port=parsed.port, dashboard=parsed.dashboard)
    return running_baseline(home, port=parsed.port, workers=2)


def _measure(system: System, token: str, uploads: list[Upload], seconds: float) -> dict[str, Any]:
    asyncio.run(drive(system.url, token, uploads, concurrency=4, seconds=min(5.0, seconds)))
    levels = []
    memory: dict[str, Any] = {}
    for concurrency in _CONCURRENCIES:
        before = system.cpu()
        result, sampled = asyncio.run(
            _drive_and_sample(system, token, uploads, concurrency=concurrency, seconds=seconds)
        )
        levels.append(result.report() | _cpu_report(before, system.cpu(), len(result.latencies_ms)))
        memory = sampled or memory
    return {"ready_s": round(system.ready_s, 1), "levels": levels, "memory_at_16": memory}


async def _drive_and_sample(
    system: System, token: str, uploads: list[Upload], *, concurrency: int, seconds: float
) -> tuple[LoadResult, dict[str, Any]]:
    load = asyncio.create_task(drive(system.url, token, uploads, concurrency=concurrency, seconds=seconds))
    peak: dict[str, Any] = {}
    if concurrency == _CONCURRENCIES[-1]:
        # Few samples: each reads the page tables of every process and costs the machine half a second.
        for _ in range(3):
            await asyncio.sleep(seconds / 4)
            sample = await asyncio.to_thread(system.memory)
            if not peak or sample["total_mb"] > peak["total_mb"]:
                peak = sample
    return await load, peak


def _cpu_report(before: dict[str, float], after: dict[str, float], requests: int) -> dict[str, Any]:
    """Processor milliseconds a request: what a shared, noisy machine disturbs least."""
    used = {name: 1000.0 * (seconds - before.get(name, 0.0)) / requests for name, seconds in after.items()}
    parts = {name: round(ms, 2) for name, ms in sorted(used.items(), key=lambda u: -u[1]) if ms >= 0.1}
    return {"cpu_ms_per_request": round(sum(used.values()), 1), "cpu_parts_ms": parts}


def _ratios(measured: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    def best(name: str, level: int, key: str, *, least: bool) -> float:
        values = [round_["levels"][level][key] for round_ in measured[name]]
        return float(min(values) if least else max(values))

    ratios: dict[str, Any] = {}
    for level, concurrency in enumerate(_CONCURRENCIES):
        graph, baseline = (best(n, level, "p50_ms", least=True) for n in ("graph", "baseline"))
        ratios[f"p50 at {concurrency}, graph / baseline"] = round(graph / baseline, 3)
        graph, baseline = (best(n, level, "requests_per_s", least=False) for n in ("graph", "baseline"))
        ratios[f"requests/s at {concurrency}, graph / baseline"] = round(graph / baseline, 3)
    everything = [level for rounds in measured.values() for one in rounds for level in one["levels"]]
    ratios["non-2xx"] = sum(level["non_2xx"] for level in everything)
    for name, rounds in measured.items():
        ratios[f"{name} PSS at 16, MB"] = max(one["memory_at_16"]["total_mb"] for one in rounds)
    return ratios


def _uploads(images: list[Path]) -> list[Upload]:
    fields = {"patient_id": PATIENT, "age_approx": "60", "sex": "male", "anatom_site_general": "torso"}
    return [make_upload(image.read_bytes(), fields) for image in images]


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
