"""A hook that runs inside `ray start` (RAY_START_HOOK), for what its options cannot say."""

from __future__ import annotations

from ray._private.node import Node
from ray._private.parameter import RayParams


def leave_out_the_needless(parameters: RayParams, _head: bool) -> None:  # noqa: FBT001
    """Start no Ray Client server, and no dashboard where none was asked for.

    The former would be a second way in, and 55 MB. The latter `ray start` runs even when told not to,
    to collect usage statistics, and waits for it: 2 s of every start, and 60 MB.
    """
    parameters.ray_client_server_port = None
    if not parameters.include_dashboard:
        Node.start_api_server = _start_nothing  # type: ignore[method-assign, assignment]


def _start_nothing(_node: Node, **_options: object) -> None:
    """Stand in for the start of the dashboard."""
