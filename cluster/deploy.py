"""Runs in a process of its own: connect to the node, deploy the graph, leave it running.

`python -m cluster.deploy`, with the node's environment set. The applications are detached:
they outlive this process, which would otherwise hold 150 MB for nothing.
"""

from __future__ import annotations

import argparse
import logging
import sys

import ray
from ray import serve

from graphs.triage import TriageArgs, build

APPLICATION = "triage"

#: As in serve_config.yaml: access is in the audit log, and no log holds a path or a query string.
#: The replicas say what is amiss only: Serve's line a call, kept or not, is a tenth of a small stage's work.
NODE_LOGGING = {"encoding": "JSON", "log_level": "INFO", "enable_access_log": False}
REPLICA_LOGGING = {**NODE_LOGGING, "log_level": "WARNING"}


def deploy(address: str, *, host: str, port: int, args: TriageArgs) -> None:
    """Start Serve on a running node and run the graph on it; returns when every replica is healthy."""
    ray.init(address=address, namespace="serve", log_to_driver=False, logging_level=logging.WARNING)
    serve.start(
        proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=NODE_LOGGING
    )
    serve.run(build(args), name=APPLICATION, route_prefix="/", blocking=False, logging_config=REPLICA_LOGGING)


def main() -> None:
    """Read the arguments that `derm-cds serve` passes on.

    With `--wait` it first imports everything, then waits for a line on standard input: the
    imports then cost no time after the node has started.
    """
    parser = argparse.ArgumentParser(description="Deploy the graph on this node.")
    parser.add_argument("--address", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--profile", choices=("cpu", "gpu"), required=True)
    parser.add_argument("--wait", action="store_true")
    parsed = parser.parse_args()
    if parsed.wait and not sys.stdin.readline():
        sys.exit("The start was given up.")
    args = TriageArgs(profile=parsed.profile)
    deploy(parsed.address, host=parsed.host, port=parsed.port, args=args)


if __name__ == "__main__":
    main()
