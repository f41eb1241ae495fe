"""What was deployed last on a home's node, kept there for the next start.

`$DERM_HOME/ray/deployed.json` (0600) holds the applications that run, and a digest of those that the start would
have deployed otherwise: with another serve_config.yaml or another profile it is out of date, and not used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import contextlib
from http.client import HTTPException
import json
from pathlib import Path
from threading import Event
from typing import Any
import urllib.request

from cluster.ray_node import RayNode
from serve_app.domain.errors import DermError
from serve_app.private_files import locked_folder, read_private, write_private

Applications = Sequence[dict[str, Any]]

_LOOK_EVERY_S = 5.0


def deployed_file(home: Path) -> Path:
    """Where it is kept."""
    return home / "ray" / "deployed.json"


def read_deployed(home: Path) -> dict[str, Any] | None:
    """`over`, the digest, and `applications`; None before the first deployment."""
    path = deployed_file(home)
    kept: dict[str, Any] | None = json.loads(read_private(path)) if path.exists() else None
    return kept


def keep_deployed(home: Path, *, over: str, applications: Applications) -> None:
    """Keep what runs now."""
    path = deployed_file(home)
    with locked_folder(path.parent):
        write_private(path, json.dumps({"over": over, "applications": applications}, indent=1).encode())


def watch_deployed(node: RayNode, stop: Event) -> None:
    """Keep what `serve deploy` has brought up, until `stop`; only a node with a dashboard takes any. Give it a thread."""
    while node.dashboard and not stop.wait(_LOOK_EVERY_S):
        # The node is down, or coming up.
        with contextlib.suppress(OSError, HTTPException, ValueError, LookupError, TypeError, DermError):
            kept, applications = read_deployed(node.home), _running(node)
            if kept and applications and applications != kept["applications"]:
                keep_deployed(node.home, over=kept["over"], applications=applications)


def _running(node: RayNode) -> Applications:
    environment = node.environment
    token = environment.get("RAY_AUTH_TOKEN") or Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
    request = urllib.request.Request(
        f"http://127.0.0.1:{node.dashboard_port}/api/serve/applications/",
        headers={"Authorization": f"Bearer {token}"},
    )
    # By no proxy: the token is for this node, whatever the environment says of others.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=10) as answer:
        return applications_of(json.load(answer)["applications"].values())


def applications_of(found: Iterable[dict[str, Any]]) -> Applications:
    """The configurations of what the dashboard found to be deployed; none unless all of it runs.

    Without what was not deployed by a configuration (`serve run`), and could not be again.
    """
    applications = list(found)
    if any(application["status"] != "RUNNING" for application in applications):
        return []
    return [config for application in applications if (config := application["deployed_app_config"])]
