"""Which sockets the processes of a node listen on, and who outside could reach them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address

import psutil


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
