"""How wide the job runs, and on what."""

from __future__ import annotations

from dataclasses import dataclass

from model_store.session import Device


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
