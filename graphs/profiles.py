"""What each replica asks of a machine: the CPU default, and GPU replicas by one argument.

All else about a deployment is in `serve_config.yaml`. Resources are not: `ray_actor_options` there would replace
the whole of these, and one argument could then no longer choose the profile.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Profile = Literal["cpu", "gpu"]

#: Logical CPUs: how Ray packs replicas, not what they may use. Twice their sum fits the smallest
#: machine, of 2: an update starts every new replica beside the old one (max_surge_percent).
NUM_CPUS: Mapping[str, float] = {
    "ingress": 0.15,
    "preprocess": 0.15,
    "classifier": 0.4,
    "embedder": 0.05,
    "retriever": 0.1,
    "risk": 0.05,
}


def actor_options(name: str, profile: Profile) -> dict[str, float]:
    """`ray_actor_options` of one deployment."""
    if profile == "gpu" and name == "classifier":
        # Half a GPU a replica: one replica's copies overlap the other's compute.
        return {"num_cpus": NUM_CPUS[name], "num_gpus": 0.5}
    return {"num_cpus": NUM_CPUS[name]}
