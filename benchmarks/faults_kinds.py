"""Every kind of fault, put into a service under load, round after round."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
import shutil
import time
from typing import Any

import psutil

from benchmarks.faults_disk import fill, small_disk
from benchmarks.faults_keys import lock_store, running_vault, seal_vault, stop_vault, take_keyring
from benchmarks.faults_load import Account, Load, under_load
from benchmarks.faults_service import (
    GraphService,
    LocalService,
    graph_service,
    local_service,
    new_home,
    prepare_database,
    supervised,
)
from benchmarks.faults_statements import FaultyConnections, Loss
from benchmarks.key_service import KeyService
from cluster.postgres import DatabaseUrls, EmbeddedPostgres

#: How long a fault lasts that does not end by itself, seconds; a lock outlasts what SQLite waits for it (5 s).
_LASTS_S, _LOCK_LASTS_S = 1.5, 7.0


@dataclass
class Outcome:
    """One kind's rounds: what they were, what the load saw, and how long the service took each time."""

    kind: str
    rounds: int = 0
    account: Account = field(default_factory=Account)
    recoveries_s: list[float] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)


async def killed_replicas(outcome: Outcome, rounds: int, concurrency: int, service: GraphService) -> None:
    """`kill -9` of every replica of the deployment that the kind is named after."""

    def kill() -> None:
        replicas = service.replicas(outcome.kind)
        if not replicas:
            raise RuntimeError(f"no replica of {outcome.kind} is running")
        for replica in replicas:
            replica.kill()

    async with under_load(service.target, outcome.account, concurrency=concurrency) as load:
        for _ in range(rounds):
            await _strike(outcome, load, kill)


async def killed_postgres(outcome: Outcome, rounds: int, concurrency: int, service: GraphService) -> None:
    """`kill -9` of the server and all its sessions; its supervisor starts it again."""
    postgres = service.system.postgres

    def kill() -> None:
        pid = postgres.pid()
        if pid is None:
            raise RuntimeError("PostgreSQL is not running")
        server = psutil.Process(pid)
        for process in [server, *server.children(recursive=True)]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue

    async with under_load(service.target, outcome.account, concurrency=concurrency) as load:
        for _ in range(rounds):
            await _strike(outcome, load, kill)


async def _strike(outcome: Outcome, load: Load, kill: Callable[[], None]) -> None:
    moment = time.monotonic()
    await asyncio.to_thread(kill)
    # What was begun before the process was gone may still be answered by it.
    outcome.recoveries_s.append(await load.until_whole(max(moment, time.monotonic())))
    outcome.rounds += 1


async def lost_statements(outcome: Outcome, rounds: int, concurrency: int, service: LocalService) -> None:
    """The n-th statement of uploads at once, for every n that there is: lost before, and lost after, it was done."""
    faults = FaultyConnections(service.app.state.services.pool)
    load = Load(service.target, outcome.account)

    async def uploads() -> None:
        await asyncio.gather(*(load.upload() for _ in range(concurrency)))

    await uploads()
    faults.disarm()
    counts = []
    for _ in range(3):
        faults.seen = 0
        await uploads()
        counts.append(faults.seen)
    # The least: now and then a statement of housekeeping is among them.
    statements = min(counts)
    places: list[tuple[int, Loss]] = [
        (n, loss) for n in range(1, statements + 1) for loss in ("before", "after")
    ]
    struck = 0
    for turn in range(max(rounds, 1)):
        # Few rounds are spread over all places; many go through them again and again.
        place = places[turn * len(places) // rounds] if rounds < len(places) else places[turn % len(places)]
        faults.arm(*place)
        moment = time.monotonic()
        await uploads()
        struck += not faults.is_armed
        faults.disarm()
        outcome.recoveries_s.append(time.monotonic() - moment)
        outcome.rounds += 1
    outcome.notes = {"statements": statements, "places": len(places), "struck": struck}
    await load.settle()


async def full_disk(
    outcome: Outcome, rounds: int, concurrency: int, service: LocalService, disk: Path
) -> None:
    """The disk of database and key store is filled to the last byte, and emptied again."""

    def fill_disk() -> Callable[[], None]:
        return fill(disk).unlink

    await _rounds_of(outcome, rounds, concurrency, service, [(fill_disk, _LASTS_S)])


async def lost_keys(outcome: Outcome, rounds: int, concurrency: int, service: LocalService) -> None:
    """The keyring is away, or the key store is locked by another process: turn by turn."""
    files = service.settings.files
    await _rounds_of(
        outcome,
        rounds,
        concurrency,
        service,
        [(lambda: take_keyring(files), _LASTS_S), (lambda: lock_store(files), _LOCK_LASTS_S)],
    )


async def lost_vault(
    outcome: Outcome, rounds: int, concurrency: int, service: LocalService, vault: KeyService
) -> None:
    """The Vault that has the KEKs is down, or sealed: turn by turn."""
    await _rounds_of(
        outcome,
        rounds,
        concurrency,
        service,
        [(lambda: stop_vault(vault), _LASTS_S), (lambda: seal_vault(vault), _LASTS_S)],
    )


async def _rounds_of(
    outcome: Outcome,
    rounds: int,
    concurrency: int,
    service: LocalService,
    faults: list[tuple[Callable[[], Callable[[], None]], float]],
) -> None:
    """Break, wait, mend: the recovery counts from the mending."""
    async with under_load(service.target, outcome.account, concurrency=concurrency) as load:
        for turn in range(rounds):
            break_it, lasts_s = faults[turn % len(faults)]
            mend = await asyncio.to_thread(break_it)
            try:
                await asyncio.sleep(lasts_s)
            finally:
                await asyncio.to_thread(mend)
            outcome.recoveries_s.append(await load.until_whole(time.monotonic()))
            outcome.rounds += 1


@asynccontextmanager
async def own_database(folder: Path | None = None) -> AsyncIterator[tuple[Path, DatabaseUrls]]:
    """A home with an embedded server of its own, watched by its supervisor."""
    home = new_home("derm-faults-", folder)
    postgres = EmbeddedPostgres(home)
    try:
        urls = await asyncio.to_thread(postgres.ensure)
        await prepare_database(urls)
        with supervised(postgres):
            yield home, urls
    finally:
        await asyncio.to_thread(postgres.stop, mode="immediate")
        shutil.rmtree(home, ignore_errors=True)


async def run_kind(kind: str, rounds: int, concurrency: int) -> Outcome:
    """Start what the kind needs, run its rounds, and say what came of them."""
    outcome = Outcome(kind)
    if kind in {"classifier", "ingress", "postgres"}:
        on_graph: Callable[[Outcome, int, int, GraphService], Awaitable[None]] = (
            killed_postgres if kind == "postgres" else killed_replicas
        )
        home = new_home("derm-faults-")
        try:
            async with graph_service(home) as graph:
                await on_graph(outcome, rounds, concurrency, graph)
        finally:
            shutil.rmtree(home, ignore_errors=True)
    elif kind == "disk":
        with small_disk() as disk:
            async with own_database(disk) as (home, urls), local_service(home, urls) as service:
                await full_disk(outcome, rounds, concurrency, service, disk)
    elif kind == "vault":
        async with own_database() as (home, urls):
            with running_vault(home) as (vault, settings):
                async with local_service(home, urls, **settings) as service:
                    await lost_vault(outcome, rounds, concurrency, service, vault)
    else:
        run = lost_statements if kind == "query" else lost_keys
        async with own_database() as (home, urls), local_service(home, urls) as service:
            await run(outcome, rounds, concurrency, service)
    return outcome
