"""The reference search against exact NumPy search over the same vectors, in one run.

`python -m benchmarks.search --json`: latency at concurrency 1 and 5 through the store, recall@10
counted by distance without a filter and under each, build time and sizes.
"""

from __future__ import annotations

import argparse
import asyncio
from datetime import UTC, datetime
from itertools import count
import json
import os
from pathlib import Path
import platform
import sys
import tempfile
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.search_data import Filter, SearchData, make_search_data
from cluster.postgres import EmbeddedPostgres
from serve_app.domain.assessment import Neighbours
from serve_app.records.migrate import migrate
from serve_app.records.pool import Pool, open_pool
from serve_app.records.references import ReferenceStore
from serve_app.records.sql import parse
from serve_app.settings import REPOSITORY

K = 10
_SPACE = "benchmark"
_SQL = parse((Path(__file__).parent / "search.sql").read_text())
#: Similarities are sums of float32: as near as this is the same distance.
_TIE = 1e-5


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--count", type=int, default=50_000, help="references")
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=10.0, help="of load at each concurrency")
    parser.add_argument("--shared-buffers", help="as PostgreSQL writes it, in place of the server's own")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parsed = parser.parse_args()
    models = Path(os.environ.get("DERM_MODELS", REPOSITORY / "model_store" / "models"))
    data = make_search_data(models, count=parsed.count, queries=parsed.queries)
    with tempfile.TemporaryDirectory(prefix="derm-search-") as folder:
        home = Path(folder)
        home.chmod(0o711)
        postgres = EmbeddedPostgres(home)
        if parsed.shared_buffers:
            local = postgres.directory / "etc" / "local.conf"
            local.parent.mkdir(parents=True)
            local.write_text(f"shared_buffers = '{parsed.shared_buffers}'\n")
        try:
            urls = postgres.ensure()
            report = asyncio.run(_run(urls.owner, urls.app, data, parsed.seconds))
        finally:
            postgres.stop()
    text = json.dumps(report, indent=2)
    if parsed.output:
        parsed.output.write_text(text + "\n")
    print(text if parsed.json else summary(report))


def summary(report: dict[str, Any]) -> str:
    """The figures that were asked for, for people."""
    named = {"numpy, exact": report["numpy"]} | report["store"]
    lines = [f"{name:24} p50 {row['p50_ms']:7} p95 {row['p95_ms']:7} ms" for name, row in named.items()]
    lines += [
        f"{row['filter']:32} {row['passing']:7} recall {row['recall']} p95 {row['p95_ms']} ms"
        for row in report["filters"]
    ]
    return "\n".join(lines)


async def _run(owner_dsn: str, app_dsn: str, data: SearchData, seconds: float) -> dict[str, Any]:
    await migrate(owner_dsn, application_role="derm_app")
    owner = await open_pool(owner_dsn, minimum=0, maximum=1)
    # As many connections as the retriever has unless told otherwise.
    pool = await open_pool(app_dsn, minimum=4, maximum=4)
    everything = len(data.images) + 1
    try:
        built = await _load(owner, data)
        shared_buffers = await owner.fetchval(_SQL["shared_buffers"])
        indexed, exact = ReferenceStore(pool), ReferenceStore(pool, exact_below=everything)
        store: dict[str, Any] = {}
        for concurrency in (1, 5):
            store[f"at {concurrency}"] = await _drive(indexed, data, concurrency, seconds)
        for concurrency in (1, 5):
            store[f"exact, at {concurrency}"] = await _drive(exact, data, concurrency, seconds)
        filters = [await _compare(indexed, data, limits) for limits in data.filters()]
    finally:
        await pool.close()
        await owner.close()
    return {
        "benchmark": "search",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "shared_buffers": shared_buffers,
        "references": len(data.images),
        "queries": len(data.queries),
        "k": K,
        "build": built,
        "numpy": _numpy(data),
        "store": store,
        "filters": filters,
    }


async def _load(owner: Pool, data: SearchData) -> dict[str, Any]:
    started = perf_counter()
    unindexed = ReferenceStore(owner, exact_below=len(data.images) + 1)
    await unindexed.load(data.images, data.vectors, embedding_space=_SPACE)
    loaded = perf_counter()
    _say(f"loaded in {loaded - started:.1f} s")
    # Loading one image again indexes what is there.
    await ReferenceStore(owner).load(data.images[:1], data.vectors[:1], embedding_space=_SPACE)
    indexed = perf_counter()
    _say(f"indexed in {indexed - loaded:.1f} s")
    sizes = {row["name"]: round(row["bytes"] / 2**20, 1) for row in await owner.fetch(_SQL["sizes"])}
    return {
        "load_s": round(loaded - started, 1),
        "index_s": round(indexed - loaded, 1),
        "sizes_mib": sizes,
    }


async def _drive(store: ReferenceStore, data: SearchData, concurrency: int, seconds: float) -> dict[str, Any]:
    """Keep so many searches under way for a while, after a second to warm up."""
    turn = count()
    taken: list[float] = []
    started = perf_counter()

    async def client() -> None:
        while (begun := perf_counter()) - started < seconds + 1:
            query = data.queries[next(turn) % len(data.queries)]
            await store.nearest(query, embedding_space=_SPACE, k=K)
            if begun - started >= 1:
                taken.append(perf_counter() - begun)

    await asyncio.gather(*(client() for _ in range(concurrency)))
    row = _percentiles(taken)
    _say(f"{concurrency} at once: {row}")
    return row


def _numpy(data: SearchData) -> dict[str, Any]:
    """Time the exact search of one query at a time."""
    taken = []
    for query in data.queries:
        begun = perf_counter()
        scores = data.vectors @ query
        best = np.argpartition(-scores, K)[:K]
        best[np.argsort(-scores[best])]
        taken.append(perf_counter() - begun)
    return _percentiles(taken)


async def _compare(store: ReferenceStore, data: SearchData, limits: Filter) -> dict[str, Any]:
    passing, malignant = data.passing(limits), data.malignant()
    cosines = _cosines(data, passing)
    wanted = min(K, int(passing.sum()))
    taken, shares, fewer, missed = [], [], 0, 0
    for query, row in zip(data.queries, cosines, strict=True):
        begun = perf_counter()
        found = await store.nearest(
            query, embedding_space=_SPACE, k=K, licences=limits.licences, sites=limits.sites
        )
        taken.append(perf_counter() - begun)
        farthest = np.sort(row)[-wanted]
        shares.append(sum(case.similarity >= farthest - _TIE for case in found.similar) / wanted)
        fewer += len(found.similar) < wanted
        missed += _misses(found, row, malignant[passing])
    report = {
        "filter": str(limits),
        "passing": int(passing.sum()),
        "recall": round(float(np.mean(shares)), 4),
        "fewer_than_k": fewer,
        "nearest_of_a_kind_missed": missed,
    }
    _say(str(report))
    return report | _percentiles(taken)


def _misses(found: Neighbours, cosines: NDArray[np.float64], malignant: NDArray[np.bool_]) -> int:
    missed = 0
    for case, kind in ((found.nearest_malignant, malignant), (found.nearest_benign, ~malignant)):
        best = cosines[kind].max(initial=-np.inf)
        missed += (-np.inf if case is None else case.similarity) < best - _TIE
    return int(missed)


def _cosines(data: SearchData, passing: NDArray[np.bool_]) -> NDArray[np.float64]:
    vectors, queries = data.vectors[passing].astype(np.float64), data.queries.astype(np.float64)
    lengths = np.outer(np.linalg.norm(queries, axis=1), np.linalg.norm(vectors, axis=1))
    cosines: NDArray[np.float64] = queries @ vectors.T / lengths
    return cosines


def _percentiles(seconds: list[float]) -> dict[str, Any]:
    p50, p95, p99 = np.percentile(np.array(seconds) * 1000, (50, 95, 99))
    return {
        "searches": len(seconds),
        "p50_ms": round(float(p50), 2),
        "p95_ms": round(float(p95), 2),
        "p99_ms": round(float(p99), 2),
    }


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
