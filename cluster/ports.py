"""Finding ports on loopback: which are free, and who has the others."""

from __future__ import annotations

from collections.abc import Collection
import socket

import psutil


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
    """Return the wanted loopback port, or else any that is free and not in `taken`."""
    if wanted and wanted not in taken and not is_listened_on("127.0.0.1", wanted):
        return wanted
    while True:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = int(listener.getsockname()[1])
        if port not in taken:
            return port


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
