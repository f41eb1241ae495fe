"""Ports are free, different from each other, and out of the way of outgoing connections."""

from __future__ import annotations

import socket

from cluster.ports import choose_port, choose_ports, is_listened_on


def test_ports_are_different_and_below_those_of_outgoing_connections() -> None:
    ports = choose_ports(200)
    assert len(set(ports)) == 200
    assert all(20_000 <= port < 32_768 for port in ports)
    assert not any(is_listened_on("127.0.0.1", port) for port in ports)


def test_the_wanted_port_is_given_unless_it_is_taken() -> None:
    wanted = choose_port()
    assert choose_port(wanted) == wanted
    assert choose_port(wanted, taken=[wanted]) != wanted
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", wanted))
        listener.listen()
        assert choose_port(wanted) != wanted
