"""The reference search against exact NumPy search over the same vectors, in one run.

`python -m benchmarks.search --json`: latency at concurrency 1 and 5, and recall@10 counted by distance,
without a filter and under each; by the store alone and through the retriever's deployment. Also what
filling, indexing and storing cost. The space is filled as the embed job fills it: 256 images a transaction.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from itertools import count
import json
import logging
import os
from pathlib import Path
import platform
import resource
import sys
import tempfile
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
import yaml

from benchmarks.search_data import SearchData, Truth, describe, make_search_data, search_exactly
from cluster.node_files import write_service_environment
from cluster.ports import choose_ports
from cluster.postgres import DatabaseUrls, EmbeddedPostgres
from cluster.ray_node import RayNode
from serve_app.domain.assessment import EVERY_REFERENCE, Neighbours, ReferenceFilter
from serve_app.records.migrate import migrate
from serve_app.records.pool import Pool, open_pool, queries
from serve_app.records.references import ReferenceCache, ReferenceStore, SpaceEmbedder
from serve_app.settings import model_folder
from serve_app.sql import parse

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

K = 10
CONCURRENCIES = (1, 5)
_SPACE = "benchmark"
_ROWS_PER_WRITE = 256
_SQL = parse((Path(__file__).parent / "search.sql").read_text())

Search = Callable[[NDArray[np.float32], ReferenceFilter], Awaitable[Neighbours]]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--rows", type=int, default=50_000, help="references")
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=10.0, help="of load at each concurrency")
    parser.add_argument("--shared-buffers", help="as PostgreSQL writes it, in place of the server's own")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parsed = parser.parse_args()
    data = make_search_data(model_folder(), rows=parsed.rows, queries=parsed.queries)
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
            report = asyncio.run(_run(home, urls, data, parsed.seconds))
        finally:
            postgres.stop()
    text = json.dumps(report, indent=2)
    if parsed.output:
        parsed.output.write_text(text + "\n")
    print(text if parsed.json else summary(report))


def summary(report: dict[str, Any]) -> str:
    """The figures that were asked for, for people."""
    named = {"numpy, exact": report["numpy"]} | report["latency"]
    lines = [f"{name:24} p50 {row['p50_ms']:7} p95 {row['p95_ms']:7} ms" for name, row in named.items()]
    for way, rows in report["filters"].items():
        lines += [
            f"{way:10} {row['filter']:32} {row['passing']:7} recall {row['recall']}"
            f" p95 {row['at 1']['p95_ms']} ms, at 5 {row['at 5']['p95_ms']} ms"
            for row in rows
        ]
    return "\n".join(lines)


async def _run(home: Path, urls: DatabaseUrls, data: SearchData, seconds: float) -> dict[str, Any]:
    started = datetime.now(UTC)
    await migrate(urls.owner, application_role="derm_app")
    owner = await open_pool(urls.owner, minimum=0, maximum=1)
    # As many connections as the retriever has unless told otherwise.
    pool = await open_pool(urls.app, minimum=4, maximum=4)
    limits = data.filters()
    numpy_alone, truths = _numpy(data), search_exactly(data, limits, K)
    _say("searched exactly")
    latency: dict[str, Any] = {}
    filters: dict[str, Any] = {}

    async def drive(way: str, search: Search) -> None:
        for concurrency in CONCURRENCIES:
            latency[f"{way}, at {concurrency}"] = await _drive(search, data, concurrency, seconds)

    async def measure(way: str, search: Search) -> None:
        await drive(way, search)
        filters[way] = [await _compare(search, data, *case) for case in zip(limits, truths, strict=True)]

    try:
        built = await _fill(owner, data)
        shared_buffers = await owner.fetchval(_SQL["shared_buffers"])
        await drive("store, exact", _by_store(ReferenceStore(pool, exact_below=len(data.images) + 1)))
        await measure("store", _by_store(ReferenceStore(pool)))
        with running_node(home, urls) as node:
            async with running_retriever(node) as nearest:
                await measure("retriever", lambda query, asked: nearest.remote(query, _SPACE, K, asked))
    finally:
        await pool.close()
        await owner.close()
    return {
        "benchmark": "search",
        "at": started.isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "shared_buffers": shared_buffers,
        "references": len(data.images),
        "queries": len(data.queries),
        "k": K,
        "build": built,
        "numpy": numpy_alone,
        "latency": latency,
        "filters": filters,
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def _by_store(store: ReferenceStore) -> Search:
    return lambda query, asked: store.nearest(query, embedding_space=_SPACE, k=K, reference_filter=asked)


async def _fill(owner: Pool, data: SearchData) -> dict[str, Any]:
    cache = ReferenceCache(owner)
    started = perf_counter()
    await cache.begin(SpaceEmbedder(_SPACE, "benchmark", "0" * 64, "1"), expected=len(data.images))
    for first in range(0, len(data.images), _ROWS_PER_WRITE):
        rows = slice(first, first + _ROWS_PER_WRITE)
        await cache.take_in(_SPACE, data.images[rows], data.vectors[rows])
    filled = perf_counter()
    _say(f"filled in {filled - started:.1f} s")
    await cache.complete(_SPACE)
    indexed = perf_counter()
    _say(f"indexed in {indexed - filled:.1f} s")
    return {
        "fill_s": round(filled - started, 1),
        "index_s": round(indexed - filled, 1),
        "maintenance_work_mem": await owner.fetchval(queries("references")["prepare_to_load"]),
        "sizes_mib": {
            row["name"]: round(row["bytes"] / 2**20, 1) for row in await owner.fetch(_SQL["sizes"])
        },
    }


async def _drive(search: Search, data: SearchData, concurrency: int, seconds: float) -> dict[str, Any]:
    """Keep so many searches under way for a while, after a second to warm up."""
    turn = count()
    taken: list[float] = []
    started = perf_counter()

    async def client() -> None:
        while (begun := perf_counter()) - started < seconds + 1:
            await search(data.queries[next(turn) % len(data.queries)], EVERY_REFERENCE)
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


async def _compare(search: Search, data: SearchData, asked: ReferenceFilter, truth: Truth) -> dict[str, Any]:
    """Hold every query under a filter against what is true, at each concurrency."""
    report: dict[str, Any] = {"filter": describe(asked), "passing": truth.passing, "recall": 1.0}
    for concurrency in CONCURRENCIES:
        found, taken = await _ask_all(search, data, asked, concurrency)
        shares = [truth.share_found(neighbours, query) for query, neighbours in found.items()]
        report["recall"] = min(report["recall"], round(float(np.mean(shares)), 4))
        report["fewer_than_k"] = sum(truth.is_short(neighbours) for neighbours in found.values())
        report["nearest_of_a_kind_missed"] = sum(
            truth.kinds_missed(neighbours, query) for query, neighbours in found.items()
        )
        report[f"at {concurrency}"] = _percentiles(taken)
    _say(str(report))
    return report


async def _ask_all(
    search: Search, data: SearchData, asked: ReferenceFilter, concurrency: int
) -> tuple[dict[int, Neighbours], list[float]]:
    """Ask every query once: what was found for each, and the seconds that each took."""
    turn = iter(range(len(data.queries)))
    found: dict[int, Neighbours] = {}
    taken: list[float] = []

    async def client() -> None:
        for query in turn:
            begun = perf_counter()
            found[query] = await search(data.queries[query], asked)
            taken.append(perf_counter() - begun)

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return found, taken


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


_APPLICATION = "retriever"


@contextmanager
def running_node(home: Path, urls: DatabaseUrls) -> Iterator[RayNode]:
    """Start a Ray node on which a replica finds this database, and put its environment into this process's.

    Before anything imports ray, which reads that environment then.
    """
    write_service_environment(home, urls)
    ports = choose_ports(5)
    node = RayNode(
        home,
        port=ports[0],
        stats_port=ports[1],
        metrics_port=ports[2],
        dashboard_port=ports[3],
        fallback_port=ports[4],
    )
    try:
        node.start()
        os.environ.update(node.environment)
        yield node
    finally:
        node.stop()


@asynccontextmanager
async def running_retriever(node: RayNode) -> AsyncIterator[DeploymentHandle[Any]]:
    """Deploy the retriever alone, with the CPU profile's options and no front door; yields `nearest` of its handle."""
    # Not before the node's environment is in place: see `running_node`.
    import ray  # noqa: PLC0415
    from ray import serve  # noqa: PLC0415

    from cluster.deploy import CONFIG  # noqa: PLC0415
    from deployments.retriever.deployment import RetrieverDeployment  # noqa: PLC0415
    from graphs.profiles import actor_options  # noqa: PLC0415
    from serve_app.http.deployment import by_message  # noqa: PLC0415

    ray.init(address=node.address, namespace="serve", log_to_driver=False, logging_level=logging.WARNING)
    try:
        config = yaml.safe_load(CONFIG.read_text())
        (application,) = config["applications"]
        (figures,) = (found for found in application["deployments"] if found["name"] == "retriever")
        serve.start(proxy_location="Disabled", logging_config=config["logging_config"])
        deployment: Any = RetrieverDeployment
        deployment = deployment.options(**figures, ray_actor_options=actor_options("retriever", "cpu"))
        handle = serve.run(
            deployment.bind(),
            name=_APPLICATION,
            route_prefix=None,
            logging_config=application["logging_config"],
        )
        # The router runs in this loop, as in the ingress: it ends before its node does.
        nearest = by_message(handle).nearest
        yield nearest
        await nearest.shutdown_async()  # type: ignore[no-untyped-call]
        await serve.shutdown_async()  # type: ignore[no-untyped-call]
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
