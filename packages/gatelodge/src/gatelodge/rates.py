"""Rate headers: what a partner may still do, said in every answer that the gate lets through, or refuses for want of it.

`RateLimit-Policy` and `RateLimit` are draft-ietf-httpapi-ratelimit-headers-10, sections 3 to 5; both are lists of structured
fields (RFC 9651 section 3.1). Older clients know only one window, and read `X-RateLimit-Limit`, `-Remaining` and `-Reset`.
"""

from collections.abc import Sequence
from functools import lru_cache
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


def rate_headers(windows: Sequence[RateWindow], now: int) -> list[Header]:
    """The headers for one or more windows at ``now`` (Unix milliseconds).

    The `X-RateLimit-…` ones tell of the window with the least remaining, which is the one that will refuse first. `-Reset` is
    when it ends in Unix seconds, rounded up, as GitHub has made it known; who wants seconds to wait reads `t` of `RateLimit`.
    """
    # All but what is left is the same for every request of a window: made once, and found by the rest of the window.
    policy, form, older = _lasting(tuple([window[:4] for window in windows]))
    numbers: list[int] = []
    least, tightest = windows[0][4], 0
    for at, (_, _, _, ends_at, remaining) in enumerate(windows):
        left = (ends_at - now + 999) // 1_000  # as `seconds_left` has it, without the cost of a call
        numbers += (remaining, max(0, left))
        if remaining < least:
            least, tightest = remaining, at
    limit, reset = older[tightest]
    return [
        policy,
        (b"ratelimit", form % tuple(numbers)),
        limit,
        (b"x-ratelimit-remaining", b"%d" % least),
        reset,
    ]


@lru_cache(maxsize=4_096)
def _lasting(windows: tuple[tuple[str, int, int, int], ...]) -> tuple[Header, bytes, tuple[tuple[Header, Header], ...]]:
    policies = ", ".join(f'"{name}";q={limit};w={seconds}' for name, limit, seconds, _ in windows)
    form = ", ".join(f'"{name}";r=%d;t=%d' for name, *_ in windows)
    older = tuple(
        ((b"x-ratelimit-limit", b"%d" % limit), (b"x-ratelimit-reset", b"%d" % -(-ends_at // _SECOND)))
        for _, limit, _, ends_at in windows
    )
    return (b"ratelimit-policy", policies.encode("ascii")), form.encode("ascii"), older
