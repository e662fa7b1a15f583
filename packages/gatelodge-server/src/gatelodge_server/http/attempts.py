"""Failed attempts, and what bothers others, are counted by address: so that it is slow for who does it and for nobody else."""

import ipaddress
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter

from gatelodge_server.core.refusals import TooManyRequests
from gatelodge_server.http.edge import parse_address
from gatelodge_server.http.problems import TooManyFailures

_PREFIX: Final = 64
_AT_ONCE: Final = 16
"""So many of what is slow may one sender have under way, however many places there are: the rest is for others."""


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

    def __init__(
        self,
        limit: str,
        *,
        refusal: type[TooManyFailures | TooManyRequests] = TooManyFailures,
        wall_clock: Callable[[], float] = time.time,  # noqa: TID251 - limits' own clock
    ) -> None:
        self._limit: RateLimitItem = parse(limit)
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._refusal = refusal
        self._wall_clock = wall_clock
        self._under_way: Counter[str] = Counter()

    @contextmanager
    def place(self, address: str) -> Iterator[None]:
        """Around what is slow. Raises ``refusal`` while a sender has as much under way as one may; nothing is counted then."""
        bucket = bucket_of(address)
        if self._under_way[bucket] >= _AT_ONCE:
            raise self._refusal(1)
        self._under_way[bucket] += 1
        try:
            yield
        finally:
            self._under_way[bucket] -= 1
            self._under_way += Counter()  # forgets those that are at nought

    async def count(self, address: str) -> None:
        """Count what is about to be answered, an ``InvalidCredential`` mostly. Raises ``refusal`` past the limit instead."""
        bucket = bucket_of(address)
        if not await self._limiter.hit(self._limit, bucket):
            raise await self._refuse(bucket)

    @asynccontextmanager
    async def attempt(self, address: str) -> AsyncIterator[None]:
        """Around an attempt that must not even be judged past the limit: then it raises, and nothing was attempted.

        Those under way count as failures until they are over, so that no crowd gets through at once. Whoever makes the attempt
        says with ``count`` that it has failed.
        """
        bucket = bucket_of(address)
        window = await self._limiter.get_window_stats(self._limit, bucket)
        if window.remaining <= self._under_way[bucket]:
            raise await self._refuse(bucket)
        with self.place(address):
            yield

    async def _refuse(self, bucket: str) -> Exception:
        window = await self._limiter.get_window_stats(self._limit, bucket)
        return self._refusal(max(1, round(window.reset_time - self._wall_clock())))


class Names:
    """The names under which callers come who come again and again: so many at once from one address, on each worker.

    A name keeps its place until it has not been heard for ``kept`` seconds. So there are no more new ones in that time, either.
    """

    def __init__(self, *, each: int, kept: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._each = each
        self._kept = kept
        self._monotonic = monotonic
        self._heard_at: dict[tuple[str, str], float] = {}
        """In the order of the times."""
        self._names: Counter[str] = Counter()

    def hear(self, address: str, name: str) -> None:
        """Take a place for a name, or keep it. Raises ``TooManyRequests`` if the address has as many others as it may."""
        now, bucket = self._monotonic(), bucket_of(address)
        self._forget(now)
        key = bucket, name
        if self._heard_at.pop(key, None) is None:
            if self._names[bucket] >= self._each:
                raise TooManyRequests(math.ceil(self._kept))
            self._names[bucket] += 1
        self._heard_at[key] = now

    def _forget(self, now: float) -> None:
        while self._heard_at:
            key, heard_at = next(iter(self._heard_at.items()))
            if now < heard_at + self._kept:
                return
            del self._heard_at[key]
            bucket, _ = key
            self._names[bucket] -= 1
            if not self._names[bucket]:
                del self._names[bucket]
