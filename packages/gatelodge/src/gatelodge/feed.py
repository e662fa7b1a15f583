"""The issuer's feed of revocations, followed: ``RemoteRevocations`` keeps a ``Following`` up to date by long polls.

One thread for each process does that, for every thread and every event loop in it. It begins when it is first needed, and again
in a process that was forked, and ends with ``close`` or, once nobody holds the ``RemoteRevocations`` any more, with the request
that is under way then. Each request says which step has been applied, under a name that nobody else has, so the issuer
can tell whoever revokes something how far that has got.

An answer is dated by when its request was *sent*. So what lay in a socket's buffer while this process was frozen is as old as
it is; dated by its arrival, as the events of a stream would have to be, it would look new.
"""

import asyncio
import logging
import os
import re
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from contextlib import suppress
from functools import partial
from typing import Final, Self
from urllib.parse import urlencode
from uuid import uuid4

from gatelodge.errors import RevocationsUnavailable
from gatelodge.keyset import Fetch, PlainHttp, check_url, https_fetch
from gatelodge.revocations import MAX_STALENESS, FeedPage, Following, JwtMarks, Source

_ROUNDS: Final = 3
"""Answers that somebody waits for: one that was under way already, one that is as new as the question, and one for bad luck."""
_WAIT: Final = 0.3
"""For what part of the maximum staleness a request waits for news."""
_CLOCK: Final[int | None] = getattr(time, "CLOCK_BOOTTIME", None)

_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,30}", re.ASCII)

_log = logging.getLogger("gatelodge.feed")


def _since_boot() -> float:
    """Seconds that nobody sets, and that go on while the machine sleeps where there is a clock for that."""
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)


class RemoteRevocations:
    """What an issuer has revoked, as the feed at ``url`` (its `/auth/revocations`) tells it. A ``revocations.Revocations``.

    ``max_staleness``, ``cooldown`` and ``timeout`` are seconds: until what was heard is no longer believed, between two
    requests when there is no answer, and until a request is given up. ``name`` is how the issuer's log and database name this
    verifier, at most 30 letters, digits, `.`, `_` and `-`; random ones are put behind it. The rest is as in ``RemoteKeys``; a
    ``fetch`` must wait longer for its answer than 0.3 times ``max_staleness``.

    As a context manager it follows from the beginning to the end of the block.

    A feed says which issuer's and environment's it is. About JWTs of any other nothing is known: ``RevocationsUnavailable``.
    """

    def __init__(
        self,
        url: str,
        *,
        max_staleness: float = MAX_STALENESS,
        cooldown: float = 1.0,
        timeout: float = 5.0,
        name: str = "verifier",
        plain_http: PlainHttp = "never",
        fetch: Fetch | None = None,
        clock: Callable[[], float] = _since_boot,
        wall_clock: Callable[[], float] = time.time,  # noqa: TID251 - here the clock becomes a parameter
    ) -> None:
        check_url(url, plain_http)
        if cooldown <= 0 or timeout <= 0:
            raise ValueError("cooldown and timeout are positive numbers of seconds")
        if _NAME.fullmatch(name) is None:
            raise ValueError("a name is 1 to 30 letters, digits, dots, underscores and hyphens")
        self._url = url
        self._cooldown = cooldown
        self._timeout = timeout
        self._name = name
        self._fetch = fetch if fetch is not None else https_fetch(timeout=timeout)
        self._clock = clock
        self._wall_clock = wall_clock
        self._lock = threading.Lock()
        self._following = Following(max_staleness=max_staleness)
        self._foreign: Source | None = None
        self._is_heard = True
        self._landing: Future[None] | None = None
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._pid = 0
        if hasattr(os, "register_at_fork"):
            # Some other thread may hold the lock at that moment, and there are no other threads in the child.
            os.register_at_fork(after_in_child=partial(_renew_lock, weakref.ref(self)))

    def start(self) -> None:
        """Begin to follow, if that has not begun. The first ``check`` does so too, and waits for the beginning."""
        with self._lock:
            self._start()

    def close(self) -> None:
        """Follow no more: what is known is refused as soon as it is too old."""
        self._stopped.set()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def sequence(self) -> int:
        """The step of the issuer's change sequence up to which everything is known."""
        return self._following.sequence

    def check(self, jwt: JwtMarks, now: float) -> None:
        """Refuse what was revoked; see ``revocations.Revocations``."""
        for _ in range(_ROUNDS):
            landing = self._ask(jwt, now)
            if landing is None:
                return
            wait_for_futures([landing], self._timeout)
        if self._ask(jwt, now) is not None:
            raise RevocationsUnavailable

    async def check_async(self, jwt: JwtMarks, now: float) -> None:
        """Do what ``check`` does; other coroutines run during the wait."""
        for _ in range(_ROUNDS):
            landing = self._ask(jwt, now)
            if landing is None:
                return
            await self._wait_for(landing)
        if self._ask(jwt, now) is not None:
            raise RevocationsUnavailable

    async def _wait_for(self, landing: Future[None]) -> None:
        # Not asyncio.wrap_future: a caller that is cancelled must not cancel the request of all the others.
        loop, landed = asyncio.get_running_loop(), asyncio.Event()

        def wake(_: Future[None]) -> None:
            with suppress(RuntimeError):  # the loop was closed before the request was over
                loop.call_soon_threadsafe(landed.set)

        landing.add_done_callback(wake)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._timeout):
                await landed.wait()

    def _ask(self, jwt: JwtMarks, now: float) -> Future[None] | None:
        """Judge, and give ``None`` for a good JWT; or give the landing to wait for. Raises what the JWT is refused with."""
        with self._lock:
            self._start()
            monotonic = self._clock()
            if not self._following.is_fresh(monotonic):
                if self._landing is None:
                    raise RevocationsUnavailable  # the last request failed, and the next one has to wait
                return self._landing
            self._look_at_source(jwt.source)
            reason = self._following.judge(jwt, monotonic=monotonic, now=now)
        if reason is not None:
            raise reason
        return None

    def _look_at_source(self, wanted: Source) -> None:
        """Tell the log, once, that another deployment is followed: that is a mistake in somebody's settings."""
        source = self._following.source
        if source is not None and source not in {wanted, self._foreign}:
            self._foreign = source
            _log.error("%s tells of %r and not of %r: every JWT is refused", self._url, tuple(source), tuple(wanted))

    # following

    def _start(self) -> None:
        if self._stopped.is_set() or (self._thread is not None and self._pid == os.getpid() and self._thread.is_alive()):
            return
        self._pid = os.getpid()
        # In a process that was forked nothing is known of what this one has applied, so it bears another name.
        verifier = f"{self._name}-{uuid4().hex}"
        self._landing = Future()
        # A daemon, so that a hanging issuer cannot keep the process from ending.
        following = weakref.ref(self), verifier, self._stopped
        self._thread = threading.Thread(target=_follow, args=following, name="gatelodge-revocations", daemon=True)
        self._thread.start()

    def _turn(self, verifier: str) -> float:
        """Make one request, whatever comes of it; the seconds to rest before the next one."""
        self._take_off()
        try:
            pause = self._fly(verifier)
            if not self._is_heard:
                _log.info("the revocations of %s are heard again", self._url)
            self._is_heard = True
        except Exception as fault:  # noqa: BLE001 - whatever the fetch raises, the next request may be answered
            pause = self._cooldown
            if self._is_heard:
                # Only its text: a record that somebody keeps would hold us by the frames of the fault.
                _log.warning("the revocations of %s cannot be heard: %s", self._url, str(fault))
            self._is_heard = False
        self._land(is_resting=pause > 0)
        return pause

    def _fly(self, verifier: str) -> float:
        """Make one request and take in its answer; the seconds to rest before the next one."""
        sent_at = self._clock()
        with self._lock:
            position = self._following.position
            # Of what the issuer asks for, if that is less: or belief would end before the answer comes.
            news_wait = min(self._following.max_staleness * _WAIT, self._timeout / 2)
            # Somebody may be waiting: then not for news, but for the answer.
            is_late = self._following.age(sent_at) > 2 * news_wait
        wait = 0.0 if is_late or position is None else news_wait
        query = {"wait": f"{wait:.3f}", "verifier": verifier} | ({} if position is None else {"after": position})
        page = FeedPage.parse(self._fetch(f"{self._url}?{urlencode(query)}"))
        with self._lock:
            self._following.land(page, sent_at=sent_at, now=self._wall_clock())
        brought_nothing = page.position == position and not page.has_more
        # An issuer that is about to stop answers at once, with what there is; it is not to be asked again and again.
        return self._cooldown if brought_nothing and self._clock() - sent_at < wait / 2 else 0.0

    def _land(self, *, is_resting: bool) -> None:
        with self._lock:
            landing, self._landing = self._landing, None if is_resting else Future()
        if landing is not None:
            landing.set_result(None)

    def _take_off(self) -> None:
        with self._lock:
            if self._landing is None:
                self._landing = Future()

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()


def _follow(whose: "weakref.ref[RemoteRevocations]", verifier: str, stopped: threading.Event) -> None:
    """Follow until that is to stop, or nobody asks any more: only who asks holds what is followed for."""
    while not stopped.is_set():
        revocations = whose()
        if revocations is None:
            return
        pause = revocations._turn(verifier)  # noqa: SLF001 - it is its own
        del revocations
        stopped.wait(pause)
    revocations = whose()
    if revocations is not None:
        revocations._land(is_resting=True)  # noqa: SLF001 - nobody is to wait for what does not come


def _renew_lock(whose: "weakref.ref[RemoteRevocations]") -> None:
    revocations = whose()
    if revocations is not None:
        revocations._renew_lock()  # noqa: SLF001 - it is its own
