"""Deployment options of a profile: the CPU default, and GPU replicas by one argument.

`serve_config.yaml` states the same figures where an operator looks for them; a test keeps
the two equal. Resources are here alone: in YAML `ray_actor_options` would replace the whole
of it, and one argument could then no longer choose the profile.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Profile = Literal["cpu", "gpu"]

_BACKPRESSURE = {"status_code": 503, "retry_after_s": 2}

#: The ingress's own gate (DERM_MAX_UPLOADS_IN_FLIGHT, 32) refuses with a problem document
#: before Serve's limits do: those are the backstop.
#: Replicas, load limits and health checks, the same on either profile. Requests above
#: max_ongoing_requests queue at the caller, above max_queued_requests are refused.
DEPLOYMENT_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "ingress": {"max_ongoing_requests": 100, "max_queued_requests": 64, "max_replicas": 4, "target": 16},
    "preprocess": {"max_ongoing_requests": 16, "max_queued_requests": 64, "max_replicas": 8, "target": 4},
    "classifier": {"max_ongoing_requests": 16, "max_queued_requests": 64, "max_replicas": 8, "target": 8},
    "embedder": {"max_ongoing_requests": 32, "max_queued_requests": 64, "max_replicas": 2, "target": 16},
    "retriever": {"max_ongoing_requests": 16, "max_queued_requests": 64, "max_replicas": 4, "target": 8},
    "risk": {"max_ongoing_requests": 32, "max_queued_requests": 64, "max_replicas": 2, "target": 16},
}

#: Logical CPUs: how Ray packs replicas, not what they may use. Twice their sum fits the smallest
#: machine, of 2: an update starts every new replica beside the old one (max_surge_percent).
_NUM_CPUS = {
    "ingress": 0.15,
    "preprocess": 0.15,
    "classifier": 0.4,
    "embedder": 0.05,
    "retriever": 0.1,
    "risk": 0.05,
}


def deployment_options(name: str, profile: Profile) -> dict[str, Any]:
    """Everything `.options()` takes for one deployment of a profile."""
    load = DEPLOYMENT_OPTIONS[name]
    resources: dict[str, Any] = {"num_cpus": _NUM_CPUS[name]}
    if profile == "gpu" and name == "classifier":
        # Half a GPU a replica: one replica's copies overlap the other's compute.
        resources["num_gpus"] = 0.5
    return {
        "max_ongoing_requests": load["max_ongoing_requests"],
        "max_queued_requests": load["max_queued_requests"],
        "backpressure_config": _BACKPRESSURE,
        "max_surge_percent": 100,
        "health_check_period_s": 5,
        "health_check_timeout_s": 15,
        "graceful_shutdown_timeout_s": 20,
        "autoscaling_config": {
            "min_replicas": 1,
            "max_replicas": load["max_replicas"],
            "target_ongoing_requests": load["target"],
            "upscale_delay_s": 10,
            "downscale_delay_s": 300,
        },
        "ray_actor_options": resources,
    }
