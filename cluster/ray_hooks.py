"""Hooks that run inside Ray's own processes, for what its options cannot say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray._common import tls_utils
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray.util import get_node_ip_address

from serve_app.private_files import forbid_core_dumps

if TYPE_CHECKING:  # most of Ray's processes need neither
    from starlette.middleware import Middleware

#: How a replica of Ray Serve 2.60 asks for its port for calls between deployments: any, on every interface.
EVERYWHERE = "[::]:0"

#: What bodies may take in Serve's own proxy, bytes: the largest upload, or several of the usual size.
PROXY_ROOM = 32 * 1024 * 1024

_add_port = tls_utils.add_port_to_grpc_server


def leave_out_the_needless(parameters: RayParams, _head: bool) -> None:  # noqa: FBT001
    """Start no Ray Client server, and no dashboard where none was asked for: runs in `ray start` (RAY_START_HOOK).

    The former would be a second way in, and 55 MB. The latter `ray start` runs even when told not to,
    to collect usage statistics, and waits for it: 2 s of every start, and 60 MB.
    """
    parameters.ray_client_server_port = None
    if not parameters.include_dashboard:
        Node.start_api_server = lambda *_, **_options: None  # type: ignore[method-assign]


def prepare_worker() -> None:
    """Runs in every worker, before it works: no core dumps, and the port of calls between deployments on the node's address.

    The former for nodes that others than `derm-cds serve` start. The latter is needed with Ray 2.60, which asks for EVERYWHERE and has no setting for it (tests/cluster/test_ray_hooks.py); a
    Ray that asks in other words is left as it is, and `derm-cds status` then reports the port.
    """
    forbid_core_dumps()
    tls_utils.add_port_to_grpc_server = add_port


def add_port(server: Any, address: str) -> int:  # noqa: ANN401 - gRPC's server, synchronous or not
    """Open a port of a gRPC server as Ray does, but on the node's address rather than everywhere; return it."""
    if address == EVERYWHERE:
        node: str = get_node_ip_address()  # type: ignore[no-untyped-call]
        address = f"[{node}]:0" if ":" in node else f"{node}:0"
    port: int = _add_port(server, address)  # type: ignore[no-untyped-call]
    return port


def surround_serve() -> list[Middleware]:
    """Stand around Serve's own HTTP code, in every ingress replica and in its proxy, which start with this."""
    from ray.serve.context import _get_internal_replica_context  # noqa: PLC0415
    from starlette.middleware import Middleware  # noqa: PLC0415

    from serve_app.http.ingress import IngressMiddleware  # noqa: PLC0415

    replica = _get_internal_replica_context()  # type: ignore[no-untyped-call]
    return [Middleware(IngressMiddleware, room=PROXY_ROOM if replica is None else None)]
