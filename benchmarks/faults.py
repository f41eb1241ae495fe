"""Faults under load: nothing acknowledged is lost or doubled, and the service is whole again in time.

`python -m benchmarks.faults --rounds 100` runs every kind; `--only query,disk,keys` those that need
no Ray. Prints JSON, and ends with exit status 1 when the verdict is not kept.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
import contextlib
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
import json
import os
from pathlib import Path
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from typing import Any, Literal

import asyncpg
import psutil

from benchmarks.faults_load import (
    Account,
    GraphService,
    Load,
    LocalService,
    graph_service,
    local_service,
    new_home,
    supervised,
    under_load,
)
from cluster.postgres import DatabaseUrls, EmbeddedPostgres
from serve_app.records.pool import Pool
from serve_app.settings import NodeFiles

KINDS = ("classifier", "ingress", "postgres", "query", "disk", "keys")
#: Whole again within so many seconds of the fault, or of its end where it does not end by itself.
WHOLE_S = 30.0

#: An initialised server, its model's references and some write-ahead log take 250 MB.

SIZE = "700m"


class NoSmallDisk(RuntimeError):
    """A tmpfs cannot be mounted here: that needs root, and a container with CAP_SYS_ADMIN."""


@contextmanager
def small_disk(size: str = SIZE) -> Iterator[Path]:
    """Mount a tmpfs of so many bytes, and unmount it. Raises NoSmallDisk."""
    folder = Path(tempfile.mkdtemp(prefix="derm-disk-"))
    mount, unmount = shutil.which("mount"), shutil.which("umount")
    try:
        if mount is None or unmount is None or os.geteuid() != 0:
            raise NoSmallDisk(NoSmallDisk.__doc__)
        done = subprocess.run(
            [mount, "-t", "tmpfs", "-o", f"size={size},mode=0711", "tmpfs", str(folder)],
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise NoSmallDisk(f"{NoSmallDisk.__doc__} mount said: {done.stderr.strip()}")
        try:
            yield folder
        finally:
            subprocess.run([unmount, "--lazy", str(folder)], check=True)
    finally:
        folder.rmdir()


def fill(disk: Path) -> Path:
    """Write until the disk takes no byte more; returns the ballast, which `unlink` takes off again."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as output:
        for block in (1024 * 1024, 4096, 1):
            try:
                while output.write(b"\0" * block):
                    pass
            except OSError:
                continue
    return ballast


#: Puts things right again.
Mend = Callable[[], None]


def take_keyring(files: NodeFiles) -> Mend:
    """Move the keyring away, as a share that is not mounted does."""
    away = files.keyring.with_suffix(".away")
    files.keyring.rename(away)

    def back() -> None:
        away.rename(files.keyring)

    return back


def lock_store(files: NodeFiles) -> Mend:
    """Hold the key store's write lock, as a process that hangs in a transaction does."""
    connection = sqlite3.connect(files.keystore, isolation_level=None, timeout=5.0, check_same_thread=False)
    connection.execute("BEGIN EXCLUSIVE")

    def back() -> None:
        connection.execute("ROLLBACK")
        connection.close()

    return back


Loss = Literal["before", "after"]
_STATEMENTS = frozenset({"fetch", "fetchrow", "fetchval", "execute", "executemany"})


class FaultyConnections:
    """Stands in for a pool's connections, counts their statements, and cuts the one that it was armed for.

    `before`: the statement never reaches the server. `after`: the server has done and committed it,
    and the answer is lost with the connection, which is really closed both times.
    """

    def __init__(self, pool: Pool) -> None:
        self._connections = pool._pool  # noqa: SLF001 - beneath everything the service does with it
        pool._pool = self  # noqa: SLF001
        self.seen = 0
        self._armed: tuple[int, Loss] | None = None

    def arm(self, n: int, loss: Loss) -> None:
        """Cut the n-th statement from now on, counted from 1."""
        self.seen, self._armed = 0, (n, loss)

    @property
    def is_armed(self) -> bool:
        """Whether the armed statement has not come yet."""
        return self._armed is not None

    def disarm(self) -> None:
        """Let everything through again."""
        self._armed = None

    @asynccontextmanager
    async def acquire(self, *, timeout: float) -> AsyncIterator[Any]:  # noqa: ASYNC109 - asyncpg's own word
        """Take a connection whose statements are counted."""
        async with self._connections.acquire(timeout=timeout) as connection:
            yield _Counted(connection, self)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._connections, name)

    def is_due(self) -> Loss | None:
        """Count one statement; how it is to be lost, if it is the one."""
        self.seen += 1
        if self._armed is None or self.seen != self._armed[0]:
            return None
        loss = self._armed[1]
        self._armed = None
        return loss


class _Counted:
    """A connection that asks before and after each statement whether it is to be lost."""

    def __init__(self, connection: asyncpg.Connection, faults: FaultyConnections) -> None:
        self._connection, self._faults = connection, faults

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        real = getattr(self._connection, name)
        if name not in _STATEMENTS:
            return real

        async def run(*args: object, **options: object) -> object:
            loss = self._faults.is_due()
            if loss == "before":
                self._lose()
            result: object = await real(*args, **options)
            if loss == "after":
                self._lose()
            return result

        return run

    def _lose(self) -> None:
        self._connection.terminate()
        raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")


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


async def killed(outcome: Outcome, rounds: int, concurrency: int, service: GraphService) -> None:
    """`kill -9` of every replica of the deployment that the kind is named after, or of PostgreSQL and its sessions."""

    def kill() -> None:
        processes = service.replicas(outcome.kind)
        if outcome.kind == "postgres" and (pid := service.system.postgres.pid()) is not None:
            server = psutil.Process(pid)
            processes = [server, *server.children(recursive=True)]
        if not processes:
            raise RuntimeError(f"no process of {outcome.kind} is running")
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    async with under_load(service.target, outcome.account, concurrency=concurrency) as load:
        for _ in range(rounds):
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
        with supervised(postgres):
            yield home, urls
    finally:
        await asyncio.to_thread(postgres.stop, mode="immediate")
        shutil.rmtree(home, ignore_errors=True)


async def run_kind(kind: str, rounds: int, concurrency: int) -> Outcome:
    """Start what the kind needs, run its rounds, and say what came of them."""
    outcome = Outcome(kind)
    if kind in {"classifier", "ingress", "postgres"}:
        home = new_home("derm-faults-")
        try:
            async with graph_service(home) as graph:
                await killed(outcome, rounds, concurrency, graph)
        finally:
            shutil.rmtree(home, ignore_errors=True)
    elif kind == "disk":
        with small_disk() as disk:
            async with own_database(disk) as (home, urls), local_service(home, urls) as service:
                await full_disk(outcome, rounds, concurrency, service, disk)
    else:
        run = lost_statements if kind == "query" else lost_keys
        async with own_database() as (home, urls), local_service(home, urls) as service:
            await run(outcome, rounds, concurrency, service)
    return outcome


def report_kind(outcome: Outcome) -> dict[str, Any]:
    """The counts of one kind."""
    account, slowest = outcome.account, max(outcome.recoveries_s, default=0.0)
    return {
        "rounds": outcome.rounds,
        "acknowledged": account.acknowledged,
        "lost": len(account.lost),
        "doubled": len(account.doubled),
        "untyped": len(account.untyped),
        "slowest_recovery_s": round(slowest, 2),
        "answers": dict(account.answers.most_common()),
        "untyped_answers": account.untyped[:5],
        **outcome.notes,
        "kept": not (account.lost or account.doubled or account.untyped) and slowest <= WHOLE_S,
    }


async def run(kinds: list[str], rounds: int, concurrency: int) -> dict[str, Any]:
    """Run the kinds one after another."""
    found: dict[str, Any] = {}
    for kind in kinds:
        print(f"{kind}: {rounds} rounds", file=sys.stderr, flush=True)
        try:
            found[kind] = report_kind(await run_kind(kind, rounds, concurrency))
        except NoSmallDisk as error:
            found[kind] = {"rounds": 0, "kept": False, "not_run": str(error)}
        except TimeoutError as error:
            found[kind] = {"kept": False, "not_whole": str(error)}
    return {
        "benchmark": "faults",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "concurrency": concurrency,
        "kinds": found,
        "lost": sum(one.get("lost", 0) for one in found.values()),
        "doubled": sum(one.get("doubled", 0) for one in found.values()),
        "verdict": "kept" if all(one["kept"] for one in found.values()) else "not kept",
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100, help="of each kind")
    parser.add_argument("--only", default=",".join(KINDS), help="kinds, at commas")
    parser.add_argument("--concurrency", type=int, default=4, help="uploads at once")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parsed = parser.parse_args()
    kinds = parsed.only.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    report = asyncio.run(run(kinds, parsed.rounds, parsed.concurrency))
    text = json.dumps(report, indent=2)
    if parsed.output:
        parsed.output.write_text(text + "\n")
    print(text)
    sys.exit(0 if report["verdict"] == "kept" else 1)


if __name__ == "__main__":
    main()
