"""Where verification keys come from: a set given once, or an issuer's JWKS that is fetched and kept fresh.

``KeyRing`` decides and does no I/O: it is told the time and what a fetch brought, and says whether to serve, to fetch,
to wait or to give up. ``RemoteKeys`` drives it: it owns the lock, the clock and the thread in which a fetch runs. A
thread, for coroutines too, so that one fetch serves every thread and every event loop of the process.

The life of a set of keys, by its age since the fetch that brought it was *launched*::

    0 ────────────── max_age / 2 ─────────────────── max_age ──────────→
      served           served, refreshed meanwhile     refused: KeysUnavailable until a fetch succeeds

A ``kid`` that the set lacks asks the issuer at once. Whatever the reason, two fetches are launched at least
``cooldown`` apart, so that forged ``kid``s cannot make us flood the issuer.
"""

import asyncio
import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final, Literal, Protocol, Self, assert_never
from urllib.parse import urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
    getproxies,
)

from gatelodge.errors import KeysUnavailable
from gatelodge.strict import parse_json_object
from gatelodge.tokens import UnsupportedKey, VerificationKey

Fetch = Callable[[str], bytes]
"""Gets the body of a JWKS document from its URL, or raises. Called in a thread of its own, so it may block."""

PlainHttp = Literal["never", "loopback"]

JWKS_MAX_BYTES: Final = 64 * 1024
_JWKS_TYPES: Final = frozenset({"application/jwk-set+json", "application/json"})

_log = logging.getLogger("gatelodge.keyset")


class Keys(Protocol):
    """Whatever can find the verification key that a token names."""

    def find(self, kid: str) -> VerificationKey | None:
        """Find the key named ``kid``; ``None`` when there is none. ``KeysUnavailable`` when that cannot be known."""

    async def find_async(self, kid: str) -> VerificationKey | None:
        """Do what ``find`` does without ever blocking the event loop."""


class StaticKeys:
    """A set of keys that never changes. ``ValueError`` when two of them have one ``kid``."""

    def __init__(self, keys: Iterable[VerificationKey]) -> None:
        self._keys = _by_kid(keys)

    @classmethod
    def from_jwks(cls, document: bytes | Mapping[str, object]) -> Self:
        """Take the keys of a JWKS document (RFC 7517 section 5), as bytes or parsed.

        Keys of kinds that we do not know are left out; ``ValueError`` when none is left, or one is malformed, weak or
        private.
        """
        return cls(read_jwks(document).values())

    def find(self, kid: str) -> VerificationKey | None:
        """Find the key named ``kid``."""
        return self._keys.get(kid)

    async def find_async(self, kid: str) -> VerificationKey | None:
        """Find the key named ``kid``."""
        return self._keys.get(kid)


def read_jwks(document: bytes | Mapping[str, object]) -> dict[str, VerificationKey]:
    """Read a JWKS document into keys by ``kid``; the rules are those of ``StaticKeys.from_jwks``."""
    members = parse_json_object(document) if isinstance(document, bytes) else document
    if members is None:
        raise ValueError("the key set is not a JSON object")
    jwks = members.get("keys")
    if not isinstance(jwks, list):
        raise ValueError("the key set has no array of keys")  # noqa: TRY004 - data, not a caller's mistake
    keys = []
    for jwk in jwks:
        if not isinstance(jwk, Mapping):
            raise ValueError("a key of the set is not an object")  # noqa: TRY004 - as above
        # RFC 7517 section 5: keys of kinds unknown are ignored, so that an issuer can begin to publish new ones.
        with suppress(UnsupportedKey):
            keys.append(VerificationKey.from_jwk(jwk))
    if not keys:
        raise ValueError("the key set has no key that we can use")
    return _by_kid(keys)


def _by_kid(keys: Iterable[VerificationKey]) -> dict[str, VerificationKey]:
    by_kid: dict[str, VerificationKey] = {}
    for key in keys:
        if by_kid.setdefault(key.kid, key) is not key:
            raise ValueError("two keys have the same kid")
    return by_kid


# --- Deciding: no I/O -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Flight:
    """One fetch under way: its place in the sequence of all, and the monotonic second at which it was launched."""

    sequence: int
    launched_at: float


@dataclass(frozen=True, slots=True)
class Known:
    """Serve ``key``. When ``launch`` is a flight, start it, and do not wait for it."""

    key: VerificationKey
    launch: Flight | None


@dataclass(frozen=True, slots=True)
class Pending:
    """Wait until the flight under way has landed, then ``settle``. When ``launch`` is a flight, start it first."""

    launch: Flight | None


@dataclass(frozen=True, slots=True)
class Unknown:
    """The set is fresh and has no such key."""


@dataclass(frozen=True, slots=True)
class Stale:
    """Nothing fresh is at hand, so nothing can be said: fail closed."""


class KeyRing:
    """The decisions about one issuer's keys. Not thread-safe: its driver locks.

    All times are seconds of one monotonic clock.
    """

    def __init__(self, *, cooldown: float, max_age: float, flight_limit: float) -> None:
        if cooldown <= 0 or max_age <= 0 or flight_limit <= 0:
            raise ValueError("cooldown, max age and flight limit are positive numbers of seconds")
        self._cooldown = cooldown
        self._max_age = max_age
        self._flight_limit = flight_limit
        self._keys: Mapping[str, VerificationKey] = {}
        self._landed = Flight(0, float("-inf"))
        self._launched = self._landed
        self._is_flying = False

    def ask(self, kid: str, now: float) -> Known | Pending | Unknown | Stale:
        """Decide what to do for somebody who needs the key ``kid``. A flight in the answer counts as launched."""
        age = now - self._landed.launched_at
        is_fresh = age < self._max_age
        key = self._keys.get(kid) if is_fresh else None
        if key is not None:
            return Known(key, self._launch(now) if age >= self._max_age / 2 else None)
        flight = self._launch(now)
        if flight is not None or self._is_in_flight(now):
            return Pending(flight)
        return Unknown() if is_fresh else Stale()

    def settle(self, kid: str, now: float) -> VerificationKey | None:
        """Give the key ``kid`` after a flight, however that ended. ``KeysUnavailable`` when nothing is fresh."""
        if now - self._landed.launched_at >= self._max_age:
            raise KeysUnavailable
        return self._keys.get(kid)

    def land(self, flight: Flight, keys: Mapping[str, VerificationKey] | None) -> None:
        """Take what ``flight`` brought; ``None`` when it failed, which leaves everything as it was."""
        if flight == self._launched:
            self._is_flying = False
        # A flight that was given up may land after its successor: what it brings is older, however late it comes.
        if keys is not None and flight.sequence > self._landed.sequence:
            self._keys, self._landed = keys, flight

    def _is_in_flight(self, now: float) -> bool:
        return self._is_flying and now < self._launched.launched_at + self._flight_limit

    def _launch(self, now: float) -> Flight | None:
        if self._is_in_flight(now) or now < self._launched.launched_at + self._cooldown:
            return None
        self._launched = Flight(self._launched.sequence + 1, now)
        self._is_flying = True
        return self._launched


# --- Driving: threads, coroutines, HTTP -------------------------------------------------------------------------------


class RemoteKeys:
    """The keys that an issuer publishes at ``url``, fetched when they are needed.

    ``cooldown``, ``max_age`` and ``timeout`` are seconds: between two fetches, until a set is no longer trusted, and
    until a fetch is given up. The URL must be ``https``; ``plain_http="loopback"`` lets ``http`` through to this very
    host, for tests and sidecars. Issuers with a private CA: ``fetch=https_fetch(context=...)``.
    """

    def __init__(
        self,
        url: str,
        *,
        cooldown: float = 10.0,
        max_age: float = 600.0,
        timeout: float = 5.0,
        plain_http: PlainHttp = "never",
        fetch: Fetch | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_url(url, plain_http)
        self._url = url
        self._timeout = timeout
        self._fetch = fetch if fetch is not None else https_fetch(timeout=timeout)
        self._clock = clock
        self._lock = threading.Lock()
        self._ring = KeyRing(cooldown=cooldown, max_age=max_age, flight_limit=timeout)
        self._landing: Future[None] = Future()

    def find(self, kid: str) -> VerificationKey | None:
        """Find the key named ``kid``; may wait for one fetch. ``KeysUnavailable`` when nothing fresh can be had."""
        answer = self._ask(kid)
        if not isinstance(answer, Future):
            return answer
        wait_for_futures([answer], self._timeout)
        return self._settle(kid)

    async def find_async(self, kid: str) -> VerificationKey | None:
        """Do what ``find`` does; other coroutines run during the wait."""
        answer = self._ask(kid)
        if not isinstance(answer, Future):
            return answer
        # Not asyncio.wrap_future: a caller that is cancelled must not cancel the fetch of all the others.
        loop, landed = asyncio.get_running_loop(), asyncio.Event()

        def wake(_: Future[None]) -> None:
            with suppress(RuntimeError):  # the loop was closed before the fetch was over
                loop.call_soon_threadsafe(landed.set)

        answer.add_done_callback(wake)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._timeout):
                await landed.wait()
        return self._settle(kid)

    def _ask(self, kid: str) -> VerificationKey | Future[None] | None:
        """Give the key, or ``None`` for an unknown one, or the landing to wait for."""
        with self._lock:
            answer = self._ring.ask(kid, self._clock())
            match answer:
                case Known(key, launch):
                    self._start(launch)
                    return key
                case Pending(launch):
                    self._start(launch)
                    return self._landing
                case Unknown():
                    return None
                case Stale():
                    raise KeysUnavailable
                case unreachable:
                    assert_never(unreachable)

    def _settle(self, kid: str) -> VerificationKey | None:
        with self._lock:
            return self._ring.settle(kid, self._clock())

    def _start(self, flight: Flight | None) -> None:
        if flight is None:
            return
        self._landing = Future()
        # A daemon, so that a hanging issuer cannot keep the process from ending.
        threading.Thread(target=self._fly, args=(flight, self._landing), name="gatelodge-keys", daemon=True).start()

    def _fly(self, flight: Flight, landing: Future[None]) -> None:
        keys = None
        try:
            keys = read_jwks(self._fetch(self._url))
        except Exception as fault:  # noqa: BLE001 - whatever the fetch raises, the flight must land or its waiters starve
            _log.warning("the keys of %s could not be fetched: %s", self._url, fault)
        with self._lock:
            self._ring.land(flight, keys)
        landing.set_result(None)


def https_fetch(*, timeout: float = 5.0, context: ssl.SSLContext | None = None) -> Fetch:
    """Make the fetch that ``RemoteKeys`` uses, for issuers whose certificate needs a ``context`` of its own.

    ``timeout`` is the seconds for the whole answer. Follows no redirect, reads no more than 64 KiB, takes only a 200
    with the media type of a JWKS or of JSON; anything else is an ``OSError`` or a ``ValueError``.
    """
    # Put together by hand: the usual opener would also follow redirects and open file:, ftp: and data: URLs.
    opener = OpenerDirector()
    for handler in (
        # The environment's proxy sees no more of https than the host's name; plain http to this host must not go that
        # way.
        ProxyHandler({scheme: proxy for scheme, proxy in getproxies().items() if scheme == "https"}),
        UnknownHandler(),
        HTTPHandler(),
        HTTPSHandler(context=context if context is not None else ssl.create_default_context()),
        HTTPErrorProcessor(),
        HTTPDefaultErrorHandler(),
    ):
        opener.add_handler(handler)

    def fetch(url: str) -> bytes:
        deadline = time.monotonic() + timeout
        request = Request(url, headers={"Accept": ", ".join(sorted(_JWKS_TYPES))})  # noqa: S310 - checked by RemoteKeys
        with opener.open(request, timeout=timeout) as response:
            if response.status != 200:  # noqa: PLR2004 - a 204 or a 206 has not the whole set
                raise ValueError(f"the issuer answered {response.status}")
            if response.headers.get_content_type() not in _JWKS_TYPES:
                raise ValueError("the issuer's answer is not JSON")
            body = b""
            while chunk := response.read1(JWKS_MAX_BYTES):
                body += chunk
                if len(body) > JWKS_MAX_BYTES:
                    raise ValueError(f"the issuer's answer is longer than {JWKS_MAX_BYTES} bytes")
                if time.monotonic() >= deadline:  # the socket's own timeout starts anew with every drip
                    raise TimeoutError("the issuer's answer took too long")
            return body

    return fetch


def check_url(url: str, plain_http: PlainHttp) -> None:
    """``ValueError`` unless ``url`` is one of those that ``RemoteKeys`` takes."""
    parts = urlsplit(url)
    host = parts.hostname
    if not host or parts.username is not None or parts.fragment:
        raise ValueError("an issuer's URL has a host, no user and no fragment")
    if parts.scheme == "https" or (parts.scheme == "http" and plain_http == "loopback" and _is_loopback(host)):
        return
    raise ValueError("an issuer's URL is https; http is for this very host and must be asked for")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
