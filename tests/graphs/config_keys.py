"""The keys of a `serve deploy` file, held against Ray's own schema.

Ray ignores what it does not know, so that a misspelt limit is no limit at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from ray.serve import schema
from ray.serve.config import AutoscalingConfig, BackpressureConfig, ControllerOptions, RequestRouterConfig

#: Which keys hold a model of their own, by the model they are in.
NESTED: Mapping[type[BaseModel], Mapping[str, type[BaseModel]]] = {
    schema.ServeDeploySchema: {
        "http_options": schema.HTTPOptionsSchema,
        "grpc_options": schema.gRPCOptionsSchema,
        "controller_options": ControllerOptions,
        "logging_config": schema.LoggingConfig,
        "tracing_config": schema.TracingConfig,
        "applications": schema.ServeApplicationSchema,
    },
    schema.ServeApplicationSchema: {
        "deployments": schema.DeploymentSchema,
        "logging_config": schema.LoggingConfig,
    },
    schema.DeploymentSchema: {
        "autoscaling_config": AutoscalingConfig,
        "backpressure_config": BackpressureConfig,
        "logging_config": schema.LoggingConfig,
        "ray_actor_options": schema.RayActorOptionsSchema,
        "request_router_config": RequestRouterConfig,
    },
}


def unknown_keys(
    found: Mapping[str, Any], model: type[BaseModel] = schema.ServeDeploySchema, at: str = ""
) -> Iterator[str]:
    """The paths of all keys that the model does not have."""
    for key, value in found.items():
        path = f"{at}.{key}" if at else key
        if key not in model.model_fields:
            yield path
            continue
        inner = NESTED.get(model, {}).get(key)
        if inner is None:
            continue
        for number, item in enumerate(value if isinstance(value, list) else [value]):
            place = f"{path}[{number}]" if isinstance(value, list) else path
            if not isinstance(item, Mapping):
                yield f"{place} is not a mapping"
                continue
            yield from unknown_keys(item, inner, place)
