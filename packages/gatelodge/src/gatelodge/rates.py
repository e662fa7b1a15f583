"""Rate headers: what a partner may still do, said in every answer that the gate lets through, or refuses for want of it.

`RateLimit-Policy` and `RateLimit` are draft-ietf-httpapi-ratelimit-headers-10, sections 3 to 5; both are lists of structured
fields (RFC 9651 section 3.1). Older clients know only one window, and read `X-RateLimit-Limit`, `-Remaining` and `-Reset`.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

_SECOND: Final = 1_000

Header = tuple[bytes, bytes]


class RateWindow(NamedTuple):
    """One window: ``limit`` requests in ``seconds``, of which ``remaining`` are left until ``ends_at`` (Unix milliseconds).

    ``name`` is lower-case letters, digits and hyphens: it stands in the headers as it is.
    """

    name: str
    limit: int
    seconds: int
    ends_at: int
    remaining: int


def seconds_left(window: RateWindow, now: int) -> int:
    """Whole seconds from ``now`` (Unix milliseconds) until the window ends, rounded up: who waits so long is not too early."""
    return max(0, -((now - window.ends_at) // _SECOND))


class RateForm:
    """What the rate headers of some windows have in common for as long as the windows last: all but what is left."""

    __slots__ = ("_ends_at", "_form", "_older", "_policy", "_second", "_windows")

    def __init__(self, windows: Sequence[RateWindow]) -> None:
        policies = ", ".join(f'"{window.name}";q={window.limit};w={window.seconds}' for window in windows)
        self._policy: Header = (b"ratelimit-policy", policies.encode("ascii"))
        self._windows = windows
        self._ends_at = [-(-window.ends_at // _SECOND) for window in windows]
        self._older: list[tuple[Header, Header]] = [
            ((b"x-ratelimit-limit", b"%d" % window.limit), (b"x-ratelimit-reset", b"%d" % ends_at))
            for window, ends_at in zip(windows, self._ends_at, strict=True)
        ]
        self._second = -1
        self._form = b""

    def headers(self, remaining: tuple[int, ...], now: int) -> list[Header]:
        """The headers at ``now`` (Unix milliseconds), by what remains of each window."""
        second = now // _SECOND
        if second != self._second:  # many requests come within one, and only what remains is another for each
            self._second, self._form = second, self._form_in(second)
        least = min(remaining)
        limit, reset = self._older[remaining.index(least)]
        return [
            self._policy,
            (b"ratelimit", self._form % remaining),
            limit,
            (b"x-ratelimit-remaining", b"%d" % least),
            reset,
        ]

    def _form_in(self, second: int) -> bytes:
        windows = zip(self._windows, self._ends_at, strict=True)
        return ", ".join(f'"{window.name}";r=%d;t={max(0, ends_at - second)}' for window, ends_at in windows).encode("ascii")


def rate_headers(windows: Sequence[RateWindow], now: int) -> list[Header]:
    """The headers for one or more windows at ``now`` (Unix milliseconds).

    The `X-RateLimit-…` ones tell of the window with the least remaining, which is the one that will refuse first. `-Reset` is
    when it ends in Unix seconds, rounded up, as GitHub has made it known; who wants seconds to wait reads `t` of `RateLimit`.
    """
    return RateForm(windows).headers(tuple(window.remaining for window in windows), now)
