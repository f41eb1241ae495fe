"""How wide the job runs, and the room there is for it on a cluster that serves: what is free, less what an update needs.

Logical CPUs are shares by which Ray packs processes, not what they may use: niceness keeps the job behind
the service. But a share that is taken is one that no new replica can have, so the job takes small ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
import math
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from model_store.session import Device
from serve_app.domain.errors import StageFailed


@dataclass(frozen=True, slots=True)
class Resources:
    """What the job takes of the cluster; CPUs are Ray's logical ones, shares allowed.

    `prepare_cpus` 0: the actors prepare their images themselves. Otherwise tasks that take so much each do,
    `prepare_tasks` at a time, or as many as find room. One task at a time writes: loaders wait for each other.
    These and the writing must find room beside the actors: on a node whose CPUs the actors took all of,
    nothing would ever be read or written.
    """

    actors: int
    actor_cpus: float = 1.0
    actor_gpus: float = 0.0
    threads: int = 1
    batch: int = 1
    prepare_cpus: float = 0.0
    prepare_tasks: int | None = None
    write_cpus: float = 0.25
    rows_per_write: int = 256

    @property
    def device(self) -> Device:
        """Where the network runs."""
        return "cuda" if self.actor_gpus else "cpu"

    @property
    def cpus(self) -> float:
        """What must be there for the job to move at all."""
        return self.actors * self.actor_cpus + self.prepare_cpus + self.write_cpus


#: Ray counts in 1/10,000; rounded down to this, shares of a room never add up to more than it.
_STEP = 0.01
#: Logical CPUs that an update of the service needs: one more replica of every deployment (`graphs.profiles`).
SURGE_CPUS = 0.9


@dataclass(frozen=True, slots=True)
class NodeRoom:
    """A node of the cluster: cores and GPUs that are there, and those that nobody holds."""

    cpus: float
    free_cpus: float
    free_gpus: float = 0.0


def read_nodes() -> list[NodeRoom]:
    """Say what each node of the joined cluster has. Needs `ray.init`."""
    free: Mapping[str, Mapping[str, float]] = available_resources_per_node()  # type: ignore[no-untyped-call]
    rooms = []
    for node in _live_nodes():
        there = free.get(node["NodeID"], {})
        rooms.append(
            NodeRoom(node["Resources"].get("CPU", 0.0), there.get("CPU", 0.0), there.get("GPU", 0.0))
        )
    return rooms


def fit_in(
    wanted: Resources, nodes: Sequence[NodeRoom], *, actors: int | None, actor_cpus: float | None
) -> Resources:
    """What the job takes beside the service: as asked for, or one actor a core with equal shares of the room.

    With `actor_gpus`, one actor for each share of a free GPU. Raises StageFailed when that does not fit.
    """
    free = sum(node.free_cpus for node in nodes)
    room = free - SURGE_CPUS
    if actors is None:
        gpus = wanted.actor_gpus
        shares = [math.floor(node.free_gpus / gpus + 1e-6) if gpus else node.cpus for node in nodes]
        actors = max(1, int(sum(shares)))
    write_cpus = max(_STEP, min(wanted.write_cpus, _down(room / 4)))
    if actor_cpus is None:
        actor_cpus = max(_STEP, min(1.0, _down((room - write_cpus - wanted.prepare_cpus) / actors)))
    taken = replace(wanted, actors=actors, actor_cpus=actor_cpus, write_cpus=write_cpus)
    if taken.cpus > room + 1e-6:
        raise StageFailed(
            f"The job needs {taken.cpus:.2f} logical CPUs. {free:.2f} are free, and an update of the service needs "
            f"{SURGE_CPUS:.2f} of those. Ask for less with --actors and --actor-cpus, or start it when the "
            "service has fewer replicas."
        )
    if taken.prepare_cpus:
        spare = room - taken.cpus
        taken = replace(taken, prepare_tasks=1 + math.floor(spare / taken.prepare_cpus + 1e-6))
    by_cpu = [math.floor(n.free_cpus / actor_cpus + 1e-6) if actor_cpus else actors for n in nodes]
    by_gpu = [
        math.floor(n.free_gpus / taken.actor_gpus + 1e-6) if taken.actor_gpus else actors for n in nodes
    ]
    if (there := sum(map(min, by_cpu, by_gpu))) < actors:
        raise StageFailed(
            f"Only {there} of {actors} actors find {actor_cpus:.2f} logical CPUs and "
            f"{taken.actor_gpus:.2f} GPUs free on one node."
        )
    return taken


def _down(share: float) -> float:
    return math.floor(share / _STEP + 1e-6) * _STEP


def check_nodes(folder: Path, models: Path) -> None:
    """Raise StageFailed unless every node that may run a part of the job has Ray Data, images and models."""
    asked = {}
    for node in _live_nodes():
        if node["Resources"].get("CPU"):
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(find_lacking).options(num_cpus=0, scheduling_strategy=where)
            asked[node["NodeManagerAddress"]] = task.remote(folder.resolve(), models.resolve())
    found = zip(asked, ray.get(list(asked.values())), strict=True)
    lacking = [f"{address}: {', '.join(lacks)}" for address, lacks in found if lacks]
    if lacking:
        raise StageFailed(
            f"Not every node can do a part of the job. There is lacking at {'; '.join(lacking)}."
        )


def _live_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def find_lacking(folder: Path, models: Path) -> list[str]:
    """What the job needs and this process does not find."""
    found = {
        "Ray Data (stop the node, then `DERM_LOCKS=jobs scripts/serve`)": find_spec("pandas"),
        f"the folder {folder}": folder.is_dir(),
        f"the models {models}": models.is_dir(),
    }
    return [name for name, there in found.items() if not there]
