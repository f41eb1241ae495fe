"""A hook that runs in every worker process of a node before it works, for what Ray's options cannot say."""

from __future__ import annotations

from typing import Any

from ray._common import tls_utils
from ray.util import get_node_ip_address

#: How a replica of Ray Serve 2.60 asks for its port for calls between deployments: any, on every interface.
EVERYWHERE = "[::]:0"

_add_port = tls_utils.add_port_to_grpc_server


def bind_to_the_node() -> None:
    """Have the port of calls between deployments on the node's address, where its callers look for it.

    That is 127.0.0.1 on a node of its own. Ray has no setting for it; a Ray that asks in other words is left as
    it is, and `derm-cds status` then reports the port.
    """
    tls_utils.add_port_to_grpc_server = add_port


def add_port(server: Any, address: str) -> int:  # noqa: ANN401 - gRPC's server, synchronous or not
    """Open a port of a gRPC server as Ray does, but on the node's address rather than everywhere; return it."""
    if address == EVERYWHERE:
        node: str = get_node_ip_address()  # type: ignore[no-untyped-call]
        address = f"[{node}]:0" if ":" in node else f"{node}:0"
    port: int = _add_port(server, address)  # type: ignore[no-untyped-call]
    return port
