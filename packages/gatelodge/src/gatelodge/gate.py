"""The gate in front of an API: pure ASGI middleware.

What happens to a request, in order; whoever fails at one step hears of none of the later ones:

1. Plain HTTP is refused: a credential that came over it must not even be looked at.
2. The credential is taken from `Authorization: Bearer` or `R-Auth`, and ``Verifier`` says whose it is.
3. A body is read whole and its `partner`, if it names one, must be the caller's (``named_partners``).
4. The request is counted against the caller's quota. After this, as after the body, the caller is judged again.
5. The API is called, with the ``Caller`` in its scope (``caller_of``), the body as it was sent, and no header of ours that
   somebody else has written. Its answer gets the rate headers, and a notice if the credential is about to end.

The API never hears of a request that is refused.
"""

import itertools
import logging
import os
import re
import unicodedata
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from email.utils import formatdate
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple, TypeAlias
from uuid import uuid4

from gatelodge.errors import (
    AmbiguousCredentials,
    BodyTooLarge,
    HttpsRequired,
    MalformedJson,
    MalformedRequest,
    NoCredential,
    PartnerMismatch,
    UnsupportedMediaType,
)
from gatelodge.problems import REFUSALS, Headers, problem_of
from gatelodge.strict import encode_json, parse_json
from gatelodge.verify import Caller, Verifier

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

Rates: TypeAlias = list[tuple[bytes, bytes]]
"""The rate headers of an answer."""
Count = Callable[[Caller, Scope], Rates | Awaitable[Rates]]
"""Counts a request of the caller; the rate headers, at once or awaited. Raises ``QuotaExceeded`` or ``Unavailable``."""
OnRefused = Callable[[Scope, Exception, Caller | None], None]
"""Told of every refusal, with the caller if it was known by then."""
OtherBodies = Literal["refuse", "pass"]

CALLER: Final = "gatelodge.caller"
"""Where in the scope the caller is."""
REQUEST_ID: Final = "gatelodge.request_id"
BODY_MAX: Final = 64 * 1024

IDENTITY_HEADERS: Final = frozenset({b"x-partner-id", b"x-company-id", b"x-partner-tier", b"x-credential-id", b"x-scopes"})
"""What a gate says of a caller to an API in another process. From anybody else it is a lie."""
# RFC 3875 4.1.18: for whoever reads headers as CGI and WSGI do, `-` and `_` are one.
_LIES: Final = frozenset(
    b"".join(parts)
    for name in IDENTITY_HEADERS
    for parts in itertools.product(*((b"-", b"_") if part == b"-" else (part,) for part in re.split(rb"(-)", name)))
)
_OF_NOTE: Final = _LIES | {b"authorization", b"r-auth", b"content-length", b"transfer-encoding", b"x-request-id"}
_JSON_TYPE: Final = re.compile(rb"application/(?:[a-z0-9!#$&^_.-]+\+)?json")
_UTF8: Final = re.compile(rb"""\s*charset\s*=\s*"?(?:utf-?8|us-ascii)"?\s*""")
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
_PARTNER_FIELD: Final = "partner"
_SECURE: Final = frozenset({"https", "wss"})
_ANSWERS: Final = frozenset({"http.response.start", "websocket.accept", "websocket.http.response.start"})
_FRAMED_BY_HEADERS: Final = frozenset({"1.0", "1.1"})
"""Versions of HTTP in which a request without `Content-Length` and `Transfer-Encoding` has no body (RFC 9112 6.3)."""
_POLICY_VIOLATION: Final = 1008  # RFC 6455 7.4.1

_log = logging.getLogger("gatelodge.gate")


def caller_of(scope: Mapping[str, object]) -> Caller:
    """Who makes the request that ``scope`` is of. ``LookupError`` if no gate stands in front of the application."""
    caller = scope.get(CALLER)
    if not isinstance(caller, Caller):
        raise LookupError("there is no caller: the application does not stand behind a Gate")  # noqa: TRY004
    return caller


def credential_in(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The credential in `Authorization: Bearer` or `R-Auth`. Raises ``AmbiguousCredentials`` if there are two.

    Any other scheme in `Authorization` is none of ours, and no credential. What is not ASCII is one, and not a good one.
    """
    head = _look_over(headers)
    if head.is_ambiguous:
        raise AmbiguousCredentials
    return head.credential


class _Head(NamedTuple):
    """What the gate needs to know of a request's headers."""

    credential: str | None
    is_ambiguous: bool
    may_have_body: bool
    has_lies: bool
    request_id: bytes


def _look_over(headers: Iterable[tuple[bytes, bytes]]) -> _Head:
    """Look at all headers once: every request has some ten of them, and few are of note."""
    found = None
    is_ambiguous = may_have_body = has_lies = False
    request_id = b""
    for name, value in headers:
        if name not in _OF_NOTE:
            continue
        if name == b"authorization":
            if value[:7].lower() != b"bearer ":
                continue
            token = value[7:].strip()
        elif name == b"r-auth":
            token = value.strip()
        elif name == b"x-request-id":
            request_id = request_id or value
            continue
        else:
            has_lies = has_lies or name in _LIES
            may_have_body = may_have_body or name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
            continue
        is_ambiguous = is_ambiguous or (found is not None and found != token)
        found = token
    return _Head(None if found is None else found.decode("latin-1"), is_ambiguous, may_have_body, has_lies, request_id)


def named_partners(body: dict[str, object] | list[object]) -> list[object]:
    """Whatever a JSON body says that its partner is: the member `partner` of an object, or of each object of an array.

    A name that a lenient reader would take for it (`Partner`, or a twin under NFKC) counts as it.
    """
    objects = [body] if isinstance(body, dict) else [item for item in body if isinstance(item, dict)]
    return [value for members in objects for name, value in members.items() if _is_partner_field(name)]


def _is_partner_field(name: str) -> bool:
    return name == _PARTNER_FIELD or unicodedata.normalize("NFKC", name).casefold() == _PARTNER_FIELD


class Gate:
    """Lets in whom the verifier knows, and nobody else. An ASGI application around ``app``.

    ``count`` counts quotas; without it nothing is counted. ``body_limit`` is in bytes. ``other_bodies`` says what becomes of
    a body that is not said to be JSON: it is refused, or passed on unread, and then the API must never look for a partner in
    it. One that is said to be JSON, but in another charset than UTF-8 or compressed, is refused in any case.
    """

    def __init__(
        self,
        app: App,
        *,
        verifier: Verifier,
        count: Count | None = None,
        body_limit: int = BODY_MAX,
        other_bodies: OtherBodies = "refuse",
        on_refused: OnRefused | None = None,
    ) -> None:
        if body_limit < 0:
            raise ValueError("a body limit is a number of bytes")
        self._app = app
        self._verifier = verifier
        self._count = count
        self._body_limit = body_limit
        self._other_bodies = other_bodies
        self._on_refused = on_refused or _log_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        sort = scope["type"]
        if sort == "lifespan":
            await self._app(scope, receive, send)
            return
        if sort not in {"http", "websocket"}:
            raise ValueError("a Gate knows http, websocket and lifespan")
        scope = dict(scope)
        scope.pop(CALLER, None)
        head = _look_over(scope["headers"])
        added: Headers = [] if REQUEST_ID in scope else [_identify(scope, head.request_id)]
        try:
            receive, rates = await self._admit(scope, head, receive)
        except REFUSALS as refused:
            self._on_refused(scope, refused, scope.pop(CALLER, None))
            await _refuse(scope, receive, send, refused, added)
            return
        added += rates
        caller: Caller = scope[CALLER]
        if caller.sunset_at is not None:
            added += _farewell(caller.sunset_at, caller.rotated_at)
        if not added:
            await self._app(scope, receive, send)
            return

        ours = dict(added)

        async def send_marked(message: Message) -> None:
            if message["type"] in _ANSWERS:
                # A new one, for the API may send its own again; and what we say is said once, by us.
                theirs = [pair for pair in message.get("headers", ()) if pair[0].lower() not in ours]
                message = {**message, "headers": theirs + added}
            await send(message)

        await self._app(scope, receive, send_marked)

    async def _admit(self, scope: Scope, head: _Head, receive: Receive) -> tuple[Receive, Rates]:
        """Put the caller into the scope; what the API is to read the body from, and the rate headers. Raises a refusal."""
        if scope.get("scheme") not in _SECURE:
            raise HttpsRequired
        credential, is_ambiguous, may_have_body, has_lies, _ = head
        if is_ambiguous:
            raise AmbiguousCredentials
        if credential is None:
            raise NoCredential
        verifier, headers = self._verifier, scope["headers"]
        caller = scope[CALLER] = verifier.recall(credential) or await verifier.verify_async(credential)
        if scope["type"] == "http":
            if may_have_body or scope.get("http_version", "1.1") not in _FRAMED_BY_HEADERS:
                receive = await self._check_body(headers, receive, caller)
                # A body may take its time, and what has been revoked meanwhile is not to be believed any more.
                caller = scope[CALLER] = await verifier.verify_async(credential)
            else:
                receive = _without_body(receive)
        if has_lies:
            scope["headers"] = [pair for pair in headers if pair[0] not in _LIES]
        if self._count is None:
            return receive, []
        rates = self._count(caller, scope)
        if not isinstance(rates, list):
            rates = await rates
            # As a body may, so may a count: it asks a store.
            scope[CALLER] = await verifier.verify_async(credential)
        return receive, rates

    async def _check_body(self, headers: Sequence[tuple[bytes, bytes]], receive: Receive, caller: Caller) -> Receive:
        """Read the body and judge what it says; a ``receive`` that gives it again."""
        sort = _sort_of_body(headers)
        if sort == "other" and self._other_bodies == "pass":
            return receive
        length = _only(headers, b"content-length")
        if length is not None:
            if not length.isdigit():
                raise MalformedRequest
            if int(length[:18]) > self._body_limit:
                raise BodyTooLarge(self._body_limit)
        body = await _collect(receive, self._body_limit)
        if body and sort != "json":
            raise UnsupportedMediaType
        if body:
            _judge(body, caller)
        return _again(body, receive)


async def _collect(receive: Receive, limit: int) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise MalformedRequest  # not the same as an empty body, which may be a whole request
        body += message.get("body", b"")
        if len(body) > limit:
            raise BodyTooLarge(limit)
        if not message.get("more_body"):
            return bytes(body)


def _judge(body: bytes, caller: Caller) -> None:
    parsed = parse_json(body)
    if parsed is None:
        raise MalformedJson
    # By exact code points: nothing else is the caller's id, however it may look.
    if any(named != caller.partner for named in named_partners(parsed)):
        raise PartnerMismatch


def _again(body: bytes, receive: Receive) -> Receive:
    is_told = False

    async def receive_again() -> Message:
        nonlocal is_told
        if is_told:
            return await receive()  # that the client has gone
        is_told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


def _without_body(receive: Receive) -> Receive:
    """For a request that announces no body: should one come all the same, nobody has judged it, and nobody is to read it."""

    async def receive_no_body() -> Message:
        message = await receive()
        return {"type": "http.disconnect"} if message.get("body") else message

    return receive_no_body


def _only(headers: Sequence[tuple[bytes, bytes]], wanted: bytes) -> bytes | None:
    values = {value for name, value in headers if name == wanted}
    if len(values) > 1:
        raise MalformedRequest
    return values.pop() if values else None


def _sort_of_body(headers: Sequence[tuple[bytes, bytes]]) -> Literal["json", "unreadable", "other"]:
    """What the body is said to be: JSON in UTF-8, not compressed; JSON in which others may read what we do not; or other."""
    media_type, *parameters = (_only(headers, b"content-type") or b"").lower().split(b";")
    if _JSON_TYPE.fullmatch(media_type.strip()) is None:
        return "other"
    charsets = [parameter for parameter in parameters if parameter.strip().startswith(b"charset")]
    if not all(_UTF8.fullmatch(charset) for charset in charsets):
        return "unreadable"
    return "json" if (_only(headers, b"content-encoding") or b"identity").lower() == b"identity" else "unreadable"


@lru_cache(maxsize=1024)  # the same for each request of a credential
def _farewell(sunset_at: int, rotated_at: int | None) -> Sequence[tuple[bytes, bytes]]:
    """How an answer tells that its caller's credential has a successor: RFC 9745 (`Deprecation`), RFC 8594 (`Sunset`)."""
    sunset = (b"sunset", formatdate(sunset_at, usegmt=True).encode("ascii"))
    return (sunset,) if rotated_at is None else (sunset, (b"deprecation", b"@%d" % rotated_at))


class _RequestIds:
    """Ids for requests that have none: counted, since a random number for each would be felt, behind one of the process."""

    def __init__(self) -> None:
        self.begin()
        os.register_at_fork(after_in_child=self.begin)

    def begin(self) -> None:
        """Count anew, behind another number: a process that was forked must not count what its parent does."""
        self._process = uuid4().hex[:12].encode("ascii")
        self._count = itertools.count(1)

    def take(self) -> bytes:
        """One that nobody else has."""
        return b"%b-%x" % (self._process, next(self._count))


_ids: Final = _RequestIds()


def _identify(scope: Scope, given: bytes) -> tuple[bytes, bytes]:
    """Give the request the id that it came with, if that is a good one, or one of ours; the header that says it."""
    request_id = given if given and _REQUEST_ID.fullmatch(given) else _ids.take()
    scope[REQUEST_ID] = request_id.decode("ascii")
    return b"x-request-id", request_id


async def _refuse(scope: Scope, receive: Receive, send: Send, refused: Exception, added: Headers) -> None:
    problem = problem_of(refused, scope[REQUEST_ID])
    body = encode_json(problem.members)
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
        *problem.headers,
        *added,
    ]
    prefix = "http"
    if scope["type"] == "websocket":
        await receive()  # the handshake
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": problem.members["code"]})
            return
        prefix = "websocket.http"
    await send({"type": f"{prefix}.response.start", "status": problem.status, "headers": headers})
    await send({"type": f"{prefix}.response.body", "body": body})


def _log_refusal(scope: Scope, refused: Exception, caller: Caller | None) -> None:
    # Who and what, never the credential: a `Rejected` does not hold it either.
    partner, code = caller.partner if caller is not None else "-", getattr(refused, "code", "")
    _log.info("refused %s: partner %s, request %s", code, partner, scope[REQUEST_ID])
