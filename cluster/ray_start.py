"""A hook that runs inside `ray start` (RAY_START_HOOK), for what its options cannot say."""

from __future__ import annotations

from ray._private.parameter import RayParams


def leave_out_client_server(parameters: RayParams, _head: bool) -> None:  # noqa: FBT001
    """Start no Ray Client server: it would be a second way in, and 55 MB."""
    parameters.ray_client_server_port = None
