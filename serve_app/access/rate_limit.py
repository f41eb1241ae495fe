"""How often: token buckets for callers and addresses, and a bound on what they may write to the audit log.

All of it is one ingress process's own. N replicas let N times as much through, which is still a bound,
and no request waits for a shared store.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from time import monotonic

#: How many keys are remembered; the one not seen for longest is forgotten first, and starts afresh.
MAX_KEYS = 10_000
#: How often events are counted anew, seconds.
WINDOW_S = 60.0


class TokenBuckets:
    """A bucket for each key: `burst` requests at once, `rate_per_s` in the long run."""

    def __init__(self, *, rate_per_s: float, burst: int, clock: Callable[[], float] = monotonic) -> None:
        self._rate = rate_per_s
        self._burst = float(burst)
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, key: str) -> float:
        """Take one request out of the key's bucket; seconds until there is one if it is empty, else 0."""
        now = self._clock()
        left, since = self._buckets.pop(key, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._rate)
        wait = 0.0 if left >= 1 else (1 - left) / self._rate
        self._buckets[key] = (left if wait else left - 1, now)
        while len(self._buckets) > MAX_KEYS:
            self._buckets.popitem(last=False)
        return wait


class AuditBudget:
    """How many events of one kind may be written in a window: `per_key` for each key, `total` together.

    What is over is counted, for one summary after the window. Memory is bounded by `total`: keys
    beyond it are counted together.
    """

    def __init__(self, *, per_key: int, total: int, clock: Callable[[], float] = monotonic) -> None:
        self._per_key = per_key
        self._total = total
        self._clock = clock
        self._window = -1
        self._written: Counter[str] = Counter()
        self._suppressed = 0

    def spend(self, key: str) -> bool:
        """Say whether an event may be written for this key now; one that may not is counted."""
        if (window := int(self._clock() // WINDOW_S)) != self._window:
            self._window = window
            self._written.clear()
        if self._written[key] >= self._per_key or self._written.total() >= self._total:
            self.suppress()
            return False
        self._written[key] += 1
        return True

    def suppress(self) -> None:
        """Count an event that is not to be written on its own, budget or not."""
        self._suppressed += 1

    def drain(self) -> int:
        """Take the number of events that were not written since the last time."""
        suppressed, self._suppressed = self._suppressed, 0
        return suppressed


def sender_address(peer: str, forwarded: Sequence[str], trusted_proxies: Collection[str] = ()) -> str:
    """Name the sender's address (IPv6: its /64 network), as far as it can be believed; else `unknown`.

    `forwarded`, the lines of X-Forwarded-For, is read from its right end, through `trusted_proxies` and no further:
    what stands left of them, the sender may have made up.
    """
    here = _parse(peer)
    hops = [hop.strip() for line in forwarded for hop in line.split(",")]
    while here is not None and str(here) in trusted_proxies and hops:
        before = _parse(hops.pop())
        if before is None:
            break
        here = before
    if isinstance(here, IPv6Address):
        return str(ip_network((here, 64), strict=False))  # one subscriber has at least as much (RFC 6177)
    return "unknown" if here is None else str(here)


def is_from_loopback(peer: str, forwarded: Sequence[str]) -> bool:
    """Whether a request comes from this machine by every address that it names: a forged one can only say that it does not."""
    hops = [peer, *(hop.strip() for line in forwarded for hop in line.split(","))]
    return all(address is not None and address.is_loopback for address in map(_parse, hops))


def _parse(text: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
