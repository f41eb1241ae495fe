"""What the supervisor does when the node dies, without a node."""

from __future__ import annotations

from pathlib import Path
import socket
from threading import Event
from types import SimpleNamespace

import pytest

from cluster import supervisor
from cluster.ports import choose_port
from cluster.ray_node import RayFailed
from cluster.startup import ServeRequest, StartFailed


class _Node:
    """A node that dies at once, and whose first start after that fails."""

    home = Path("/nonexistent")
    dashboard = False

    def __init__(self, stop: Event) -> None:
        self.said: list[str] = []
        self._stop = stop

    def stop(self) -> None:
        self.said.append("stop")

    def start(self) -> None:
        self.said.append("start")
        if self.said.count("start") == 1:
            raise RayFailed("no")

    def deploy(self) -> None:
        self.said.append("deploy")
        if self.said.count("deploy") == 1:
            raise StartFailed("no")
        self._stop.set()


def test_a_dead_node_is_started_and_the_graph_deployed_until_it_works(monkeypatch, capsys) -> None:
    stop = Event()
    node = _Node(stop)
    monkeypatch.setattr(supervisor, "_LOOK_EVERY_S", 0)
    monkeypatch.setattr(supervisor, "_BACKOFF_S", (0.01, 0.02))
    monkeypatch.setattr(supervisor, "core", lambda _home: [])
    alive = iter([True, False])
    monkeypatch.setattr(supervisor, "live", lambda _core: next(alive, False))
    startup = SimpleNamespace(node=node, postgres=None, stop=stop, deploy=node.deploy)
    supervisor._keep_up(startup)
    assert node.said == ["stop", "start", "stop", "start", "deploy", "stop", "start", "deploy"]
    assert "the node has died" in capsys.readouterr().out


def test_a_taken_port_is_named_with_its_owner(tmp_path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(StartFailed, match=rf"Port {port} on 127\.0\.0\.1 is taken by .*pid"):
            supervisor._node(ServeRequest(tmp_path, port=port))


def test_other_ports_give_way(tmp_path, monkeypatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        monkeypatch.setattr(supervisor, "PORTS", dict.fromkeys(supervisor.PORTS, taken))
        node = supervisor._node(ServeRequest(tmp_path, port=choose_port()))
    ports = {node.port, node.stats_port, node.metrics_port, node.dashboard_port, node.fallback_port}
    assert len(ports) == 5
    assert taken not in ports
