"""The port of calls between deployments: Ray's own way of asking for it, on the node's address."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
import subprocess
import sys

import grpc
import pytest

from cluster import ray_hooks
from cluster.ray_node import NODE_ENVIRONMENT


def test_ray_still_asks_as_we_expect() -> None:
    """And looks the function up where the hook puts its own: in a fresh process, as a worker is."""
    program = (
        "from cluster.ray_hooks import bind_to_the_node; bind_to_the_node();"
        "import inspect; from ray.serve._private import replica;"
        "print(replica.add_port_to_grpc_server.__module__); print(inspect.getsource(replica))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    module, _, source = done.stdout.partition("\n")
    assert module == "cluster.ray_hooks"
    assert f'add_port_to_grpc_server(self._server, "{ray_hooks.EVERYWHERE}")' in source


def test_the_hook_is_where_ray_looks_for_it() -> None:
    from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

    module, _, name = NODE_ENVIRONMENT[WORKER_PROCESS_SETUP_HOOK_ENV_VAR].rpartition(".")
    assert module == ray_hooks.__name__
    assert getattr(ray_hooks, name) is ray_hooks.bind_to_the_node


@pytest.mark.parametrize("node", ["127.0.0.1", "127.0.0.2"])
def test_a_port_is_opened_on_the_nodes_address(monkeypatch, node: str) -> None:
    monkeypatch.setattr(ray_hooks, "get_node_ip_address", lambda: node)
    server = grpc.server(ThreadPoolExecutor(1))
    port = ray_hooks.add_port(server, ray_hooks.EVERYWHERE)
    server.start()
    try:
        assert _reaches(f"{node}:{port}")
        assert not _reaches(f"127.0.0.3:{port}")
    finally:
        server.stop(None)


def test_any_other_address_is_left_alone() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = ray_hooks.add_port(server, "127.0.0.3:0")
    server.start()
    try:
        assert _reaches(f"127.0.0.3:{port}")
    finally:
        server.stop(None)


def _reaches(address: str) -> bool:
    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=2)
        except grpc.FutureTimeoutError:
            return False
        return True
