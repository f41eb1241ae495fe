"""Where a request comes from, for bounds on those who have shown no token."""

from __future__ import annotations

from collections.abc import Collection
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from fastapi import Request

UNKNOWN = "unknown"
#: One subscriber has at least this much of IPv6 to choose addresses from (RFC 6177).
_IPV6_PREFIX = 64


def client_address(request: Request, trusted_proxies: Collection[str] = ()) -> str:
    """Name the sender's address (IPv6: its /64 network), as far as it can be believed.

    X-Forwarded-For is read from its right end, through `trusted_proxies` and no further: what
    stands left of them, the sender may have made up.
    """
    here = _parse(request.client.host if request.client else "")
    hops = [hop.strip() for line in request.headers.getlist("x-forwarded-for") for hop in line.split(",")]
    while here is not None and str(here) in trusted_proxies and hops:
        before = _parse(hops.pop())
        if before is None:
            break
        here = before
    if here is None:
        return UNKNOWN
    if isinstance(here, IPv6Address):
        return str(ip_network((here, _IPV6_PREFIX), strict=False))
    return str(here)


def _parse(text: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
