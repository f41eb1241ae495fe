"""`derm-cds environment`: what a shell needs to talk to the node with `ray` and `serve`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys

from cluster.ray_node import RayNode
from cluster.running import running_service


def define(_name: str, parser: argparse.ArgumentParser) -> None:
    """Define `environment`."""
    parser.set_defaults(run=_environment)


def _environment(arguments: argparse.Namespace) -> int:
    running = running_service(arguments.home)
    node = RayNode(arguments.home)
    if running is not None:
        node = RayNode(
            arguments.home,
            port=running.ray_port,
            stats_port=running.stats_port,
            metrics_port=running.metrics_port,
            fallback_port=running.fallback_port,
            dashboard_port=running.dashboard_port or node.dashboard_port,
        )
    new = {name: value for name, value in node.environment.items() if os.environ.get(name) != value}
    # With the mark, `derm-cds stop` would end the shell as well.
    new.pop("DERM_NODE", None)
    new.pop("PYTHONPATH", None)
    new["RAY_ADDRESS"] = node.address
    new["RAY_DASHBOARD_ADDRESS"] = f"http://127.0.0.1:{node.dashboard_port}"
    sys.stdout.write("".join(f"export {name}={shlex.quote(value)}\n" for name, value in sorted(new.items())))
    return 0
