"""Failed attempts are counted by address, so that guessing is slow for the one who guesses and for nobody else."""

import ipaddress
import time
from collections.abc import Callable
from typing import Final

from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter

from gatelodge_server.http.edge import parse_address
from gatelodge_server.http.problems import TooManyFailures

_PREFIX: Final = 64


def bucket_of(address: str) -> str:
    """What an address is counted under: IPv4 by itself, IPv6 by its /64, which is what one household gets."""
    parsed = parse_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((parsed, _PREFIX), strict=False))
    return str(parsed or "unknown")


class Attempts:
    """Counts presentations of what is no credential at all, per address and worker.

    The credential is judged first, always: a genuine one gets its own answer from any address, however much noise comes from
    there. Only the answer "invalid" turns into "too many" (and so tells a guesser less).
    """

    def __init__(self, limit: str, *, wall_clock: Callable[[], float] = time.time) -> None:  # noqa: TID251 - limits' own clock
        self._limit: RateLimitItem = parse(limit)
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._wall_clock = wall_clock

    async def count(self, address: str) -> None:
        """Count an ``InvalidCredential`` that is about to be answered. Raises ``TooManyFailures`` past the limit instead."""
        bucket = bucket_of(address)
        if not await self._limiter.hit(self._limit, bucket):
            window = await self._limiter.get_window_stats(self._limit, bucket)
            raise TooManyFailures(max(1, round(window.reset_time - self._wall_clock())))
