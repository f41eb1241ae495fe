"""The retriever's deployment on a Ray node of its own, asked as the ingress asks it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, contextmanager
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cluster.node_files import write_service_environment
from cluster.ports import choose_ports
from cluster.postgres import DatabaseUrls
from cluster.ray_node import RayNode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray.serve.handle import DeploymentHandle

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
