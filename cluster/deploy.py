"""Runs in a process of its own: connect to the node, deploy its configuration, leave it running.

`python -m cluster.deploy`, with the node's environment set. The configuration is serve_config.yaml, deployed as
`serve deploy` does; or what was deployed last in this home, where that was over the same file (cluster.deployed).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
from pathlib import Path
import sys
from typing import Any

import ray
from ray.serve._private.api import serve_start
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema
import yaml

from cluster.deployed import Applications, deployed_file, keep_deployed, read_deployed
import graphs
from serve_app.settings import REPOSITORY

#: Beside the package in a wheel, at the root of a checkout.
CONFIG = next(
    path
    for path in (Path(graphs.__file__).with_name("serve_config.yaml"), REPOSITORY / "serve_config.yaml")
    if path.exists()
)


def choose_config(home: Path, *, host: str, port: int, profile: str) -> tuple[dict[str, Any], str]:
    """What to deploy in this home, and the digest of what serve_config.yaml alone would be."""
    config = yaml.safe_load(CONFIG.read_text())
    config["http_options"] |= {"host": host, "port": port}
    for application in config["applications"]:
        application["args"]["profile"] = profile
    shipped = config["applications"]
    over = hashlib.sha256(json.dumps(shipped, sort_keys=True).encode()).hexdigest()
    try:
        kept = read_deployed(home)
        if kept is not None and kept["over"] != over:
            _say("serve_config.yaml or the profile has changed: what was deployed over another is not used")
        elif kept is not None and _read(kept["applications"]) != _read(shipped):
            config["applications"] = kept["applications"]
            _say(f"as it was deployed last; without {deployed_file(home)}, as in serve_config.yaml")
    except (ValueError, TypeError, LookupError) as error:
        # Not for this to decide what an operator's policy is to be replaced by.
        raise SystemExit(
            f"{deployed_file(home)} is damaged, or of another version ({type(error).__name__}): "
            "remove it to start as in serve_config.yaml"
        ) from error
    return config, over


def _read(applications: Applications) -> list[ServeApplicationSchema]:
    return [ServeApplicationSchema.model_validate(application) for application in applications]


def deploy(address: str, config: dict[str, Any]) -> None:
    """Start Serve on a running node and deploy; returns when every replica is healthy. RuntimeError says what is not."""
    ray.init(address=address, namespace="serve", log_to_driver=False, logging_level=logging.WARNING)
    schema = ServeDeploySchema.model_validate(config)
    client = serve_start(
        proxy_location=schema.proxy_location,
        http_options=schema.http_options.model_dump(),
        global_logging_config=schema.logging_config,
    )
    # Its own `_blocking` would wait for 60 s, also for what has failed.
    client.deploy_apps(schema)
    for application in schema.applications:
        client._wait_for_application_running(application.name)  # noqa: SLF001 - as `serve.run` does
    client.wait_for_proxies_serving(wait_for_applications_running=True)


def _say(line: str) -> None:
    print(f"graph: {line}", flush=True)  # cluster.supervisor repeats it


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
    home = Path(os.environ["DERM_HOME"])
    config, over = choose_config(home, host=parsed.host, port=parsed.port, profile=parsed.profile)
    deploy(parsed.address, config)
    keep_deployed(home, over=over, applications=config["applications"])


if __name__ == "__main__":
    main()
