"""What Ray 2.60 needs hooks for: each proves that it is so still, and that the hook helps."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import grpc
import pytest
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

from cluster import ray_hooks
from cluster.ray_node import NODE_ENVIRONMENT


def test_ray_still_asks_for_every_interface_and_we_are_where_it_looks() -> None:
    replica = Path(find_spec("ray.serve").origin).parent / "_private" / "replica.py"
    source = replica.read_text()
    assert f'add_port_to_grpc_server(self._server, "{ray_hooks.EVERYWHERE}")' in source
    assert "from ray._common.tls_utils import add_port_to_grpc_server" in source  # after the hook has run
    module, _, name = NODE_ENVIRONMENT[WORKER_PROCESS_SETUP_HOOK_ENV_VAR].rpartition(".")
    assert (module, getattr(ray_hooks, name)) == (ray_hooks.__name__, ray_hooks.prepare_worker)


@pytest.mark.parametrize(
    ("asked", "at"), [(ray_hooks.EVERYWHERE, "127.0.0.2"), ("127.0.0.3:0", "127.0.0.3")], ids=["any", "one"]
)
def test_a_port_is_opened_on_the_nodes_address_or_the_one_that_was_asked_for(monkeypatch, asked, at) -> None:
    monkeypatch.setattr(ray_hooks, "get_node_ip_address", lambda: "127.0.0.2")
    server = grpc.server(ThreadPoolExecutor(1))
    port = ray_hooks.add_port(server, asked)
    server.start()
    try:
        assert _reaches(f"{at}:{port}", within_s=10)
        assert not _reaches(f"127.0.0.4:{port}", within_s=0.3)
    finally:
        server.stop(None)


def _reaches(address: str, *, within_s: float) -> bool:
    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=within_s)
        except grpc.FutureTimeoutError:
            return False
        return True
