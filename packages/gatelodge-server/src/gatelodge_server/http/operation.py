"""An operation: one method on one path, with the types of what it takes and gives. It is an ASGI application by itself.

The same table of operations is served, and described in the OpenAPI document: what is documented is what validates.
"""

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final, NamedTuple, TypeAlias
from urllib.parse import parse_qsl

import msgspec

from gatelodge.errors import BodyTooLarge, MalformedJson, MalformedRequest, UnsupportedMediaType
from gatelodge.gate import credential_in
from gatelodge.strict import parse_json_object
from gatelodge_server.core.model import Holder
from gatelodge_server.core.secrets import Secret
from gatelodge_server.http.fields import ENCODER, decode
from gatelodge_server.http.problems import FieldError, InvalidFields, InvalidIdempotencyKey, Refused, problem_of
from gatelodge_server.log import log

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

BODY_MAX: Final = 64 * 1024
"""Bytes."""
_CREDENTIAL_LIKE: Final = re.compile(r"[A-Za-z0-9_.~+/=-]{40,}")
"""What is left out of a path that is logged: somebody may have put a key where an id belongs. An id is shorter."""
_IDEMPOTENCY_KEY_MAX: Final = 255
_JSON: Final = (b"content-type", b"application/json")
_PROBLEM_JSON: Final = (b"content-type", b"application/problem+json")
_NO_STORE: Final = (b"cache-control", b"no-store")
_WITHOUT_CONTENT: Final = frozenset({HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED})
"""RFC 9110 8.6: a length there would be that of some other answer."""


class Call:
    """One request, as a handler sees it."""

    __slots__ = ("_headers", "address", "holder", "parameters", "request_id", "scope", "subject")

    holder: Holder
    """Who makes the request: set before the handler is called, where the operation admits known callers only."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.subject = ""
        """The id of the credential or session that is presented, once it is known: for the log."""
        self.request_id: str = scope["gatelodge.request_id"]
        self.address: str = scope["gatelodge.address"]
        """Who sent it, as far as trusted proxies say."""
        self.parameters: Mapping[str, str] = scope.get("path_params", {})
        self._headers: Sequence[tuple[bytes, bytes]] = scope["headers"]

    def header(self, name: bytes) -> bytes | None:
        """The value of a header. Raises ``MalformedRequest`` if it was sent twice with different values."""
        found = None
        for key, value in self._headers:
            if key == name:
                if found is not None and found != value:
                    raise MalformedRequest
                found = value
        return found

    def query(self) -> dict[str, str]:
        """The parameters of the query string, the last of each name."""
        return dict(parse_qsl(self.scope["query_string"].decode("latin-1"), keep_blank_values=True))

    def credential(self) -> Secret | None:
        """The credential in `Authorization: Bearer` or `R-Auth`. Raises ``AmbiguousCredentials`` if there are two."""
        found = credential_in(self._headers)
        return None if found is None else Secret(found)

    def idempotency_key(self) -> str | None:
        """The Idempotency-Key, if one was sent. Raises ``InvalidIdempotencyKey``."""
        values = [value for name, value in self._headers if name == b"idempotency-key"]
        if not values:
            return None
        if len(values) > 1 or not 1 <= len(values[0]) <= _IDEMPOTENCY_KEY_MAX:
            raise InvalidIdempotencyKey
        if not all(0x21 <= byte <= 0x7E for byte in values[0]):  # noqa: PLR2004 - visible ASCII
            raise InvalidIdempotencyKey
        return values[0].decode("ascii")


class Answer(NamedTuple):
    """What a handler answers with."""

    status: int
    body: msgspec.Struct | None = None
    headers: Sequence[tuple[bytes, bytes]] = (_NO_STORE,)


Handler: TypeAlias = Callable[[Call, Any], Awaitable[Answer]]
"""Takes the call and the decoded body, which is ``None`` where the operation takes none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method on one path."""

    method: str
    path: str
    handler: Handler
    summary: str
    tag: str
    description: str = ""
    body: type[msgspec.Struct] | None = None
    answers: Mapping[int, type[msgspec.Struct] | None] = field(default_factory=lambda: {HTTPStatus.OK: None})
    refusals: Sequence[type[Exception]] = ()
    admit: Callable[[Call], Awaitable[Holder]] | None = None
    """Who may call it: judged before the body is looked at. ``None``: anybody, or the handler finds out."""
    credential: str | None = None
    """Which credential it takes, in words for the documentation; ``None``: none."""
    credential_optional: bool = False
    body_optional: bool = False
    idempotent_by_key: bool = False
    """Whether an `Idempotency-Key` lets a lost answer be asked for again."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Query parameters and what they mean."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        call = Call(scope)
        try:
            if self.admit is not None:
                call.holder = await self.admit(call)
                log.info("admitted", **_who(call.holder), method=self.method, path=self.path, **_whence(call))
            body = None
            if self.body is not None:
                data = await read_body(call, receive)
                if data or not self.body_optional:
                    body = decode(_parse(call, data), self.body)
                if self.admit is not None:
                    # A body may take its time, and what has been revoked meanwhile is not to be believed any more.
                    call.holder = await self.admit(call)
            answer = await self.handler(call, body)
        except Refused as refused:
            await send_problem(refused, call, send)
            return
        data = b"" if answer.body is None else ENCODER.encode(answer.body)
        await send_bytes(send, answer.status, data, [*((_JSON,) if data else ()), *answer.headers])


async def read_body(call: Call, receive: Receive) -> bytes:
    """The whole body. Raises ``BodyTooLarge`` as soon as it is known to be."""
    length = call.header(b"content-length")
    if length is not None and (not length.isdigit() or int(length) > BODY_MAX):
        raise BodyTooLarge(BODY_MAX)
    message = await receive()
    if message["type"] == "http.disconnect":
        raise MalformedRequest  # not the same as an empty body, which may be a whole request
    data: bytes = message.get("body", b"")
    if not message.get("more_body"):
        if len(data) > BODY_MAX:
            raise BodyTooLarge(BODY_MAX)
        return data
    parts = bytearray(data)
    while message.get("more_body"):
        message = await receive()
        if message["type"] == "http.disconnect":
            raise MalformedRequest
        parts += message.get("body", b"")
        if len(parts) > BODY_MAX:
            raise BodyTooLarge(BODY_MAX)
    return bytes(parts)


def _parse(call: Call, data: bytes) -> Mapping[str, object]:
    media_type = (call.header(b"content-type") or b"").partition(b";")[0].strip().lower()
    encoding = call.header(b"content-encoding")
    if media_type != b"application/json" or encoding not in {None, b"identity"}:
        raise UnsupportedMediaType
    fields = parse_json_object(data)
    if fields is None:
        raise MalformedJson
    return fields


async def send_problem(refused: Exception, call: Call, send: Send, extra: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """Answer with a refusal, and log it."""
    problem = problem_of(refused, call.request_id)
    log.info(
        "refused",
        code=problem.members["code"],
        status=problem.status,
        method=call.scope["method"],
        path=credential_free(call.scope["path"]),
        subject=call.subject,
        **_whence(call),
    )
    headers = [_PROBLEM_JSON, _NO_STORE, *problem.headers, *extra]
    await send_bytes(send, problem.status, ENCODER.encode(problem.members), headers)


def credential_free(path: str) -> str:
    """A path as it may be logged."""
    return _CREDENTIAL_LIKE.sub("…", path)


def _who(holder: Holder) -> dict[str, str]:
    company = {} if holder.company_id is None else {"company": str(holder.company_id)}
    return {"partner": holder.partner_id, "credential": holder.credential_id, **company}


def _whence(call: Call) -> dict[str, str]:
    return {"address": call.address, "request_id": call.request_id}


async def send_bytes(send: Send, status: int, data: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """Send a whole answer."""
    if status not in _WITHOUT_CONTENT:
        headers.append((b"content-length", str(len(data)).encode("ascii")))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})


def invalid_parameter(name: str, detail: str) -> InvalidFields:
    """A query parameter is not valid."""
    return InvalidFields([FieldError(f"?{name}", detail)])
