"""Ports: which are free on loopback, who has the others, and which of a node's another machine could reach."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
import random
import socket

import psutil

# Above Ray's worker ports (10002 to 19999), below the kernel's for outgoing connections (32768 on): such a port
# cannot be taken by a connection of Ray or PostgreSQL between being chosen and being listened on.
_CHOSEN = range(20_000, 32_768)
#: What this process has chosen.
_reserved: set[int] = set()


def is_listened_on(host: str, port: int) -> bool:
    """Whether a server here could not listen on this address, because somebody does already."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError:
            return True
        return False


def choose_port(wanted: int = 0, *, taken: Collection[int] = ()) -> int:
    """Return the wanted loopback port, or else any that is free and not in `taken`.

    As long as this process lives no other is given it here: Ray opens HAProxy's long after they are chosen.
    """
    port = wanted or random.choice(_CHOSEN)  # noqa: S311 - nothing secret
    while (
        port in taken
        or (port in _reserved and port != wanted)
        or is_listened_on("127.0.0.1", port)
        or not _reserve(port)
    ):
        port = random.choice(_CHOSEN)  # noqa: S311
    return port


def _reserve(port: int) -> bool:
    """Have a port for this process; False where another process of this machine has chosen it."""
    if port not in _reserved:
        # A name that the kernel frees with the process: nothing is left behind by one that was killed.
        holder = socket.socket(socket.AF_UNIX)
        try:
            holder.bind(f"\0derm-cds-port-{port}")
        except OSError:
            holder.close()
            return False
        holder.detach()
        _reserved.add(port)
    return True


def choose_ports(count: int) -> list[int]:
    """Return as many different free loopback ports."""
    return [choose_port() for _ in range(count)]


def listener_on(port: int) -> str:
    """Say which program listens on a port, as far as this user may see."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.Error:
        return "another program"
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            try:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
            except psutil.Error:
                break
    return "another program"


@dataclass(frozen=True, slots=True)
class Listener:
    """One listening TCP socket."""

    process: str
    address: str
    port: int

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        address = ip_address(self.address.partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None)
        return bool((mapped or address).is_loopback)


def listeners(processes: Mapping[int, str]) -> list[Listener]:
    """The listening sockets of these processes (pid: name), by port."""
    found = {
        Listener(processes[connection.pid], connection.laddr.ip, connection.laddr.port)
        for connection in psutil.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN and connection.pid in processes
    }
    return sorted(found, key=lambda listener: (listener.port, listener.process, listener.address))


def exposed(found: list[Listener]) -> list[Listener]:
    """Those that another machine can reach: none, on a node as `derm-cds serve` starts it."""
    return [listener for listener in found if not listener.loopback]
