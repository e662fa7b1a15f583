"""Clients that hide nothing: one request, one answer or none; no retry of their own; all of it written into a ``Book``.

Tokens stay in memory. What the book hands on to a file are digests (``Book.operations``).
"""

import asyncio
import base64
import hashlib
import itertools
import json
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from experiments.history import UNKNOWN, Operation, Status

ANSWER_TIMEOUT = 40.0


class Down(Exception):
    """Nobody listens: nothing was sent."""


class Lost(Exception):
    """The request was sent, and no answer came."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. Its body may hold secrets, and is not shown."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: Mapping[str, Any] = field(repr=False)


class Link:
    """One TLS connection that carries one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int, context: ssl.SSLContext) -> Self:
        """Connect. Raises ``Down``."""
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
        except (OSError, EOFError, TimeoutError) as fault:
            raise Down from fault
        return cls(reader, writer)

    async def call(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        """Send one request and wait for its answer. Raises ``Lost``; the connection is of no use afterwards."""
        data = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "host: localhost", f"content-length: {len(data)}"]
        lines += ["content-type: application/json"] if body is not None else []
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                self._writer.write("\r\n".join([*lines, "", ""]).encode("ascii") + data)
                return await self._read()
        except (OSError, EOFError, TimeoutError, ValueError) as fault:
            self.close()
            raise Lost from fault

    async def _read(self) -> Answer:
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        fields = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        data = await self._reader.readexactly(int(fields.get("content-length", "0")))
        return Answer(int(head[0].split(" ")[1]), fields, json.loads(data) if data else {})

    def close(self) -> None:
        """Hang up."""
        self._writer.transport.abort()


def digest(secret: str) -> str:
    """What stands for a secret in a history."""
    return hashlib.sha256(secret.encode()).hexdigest()[:32]


def session_id(refresh_token: str) -> str:
    """The id of a refresh token's session, as the audit trail has it."""
    return base64.urlsafe_b64decode(refresh_token[-60:])[:16].hex()


def key_id(api_key: str) -> str:
    """The public id of an API key."""
    return api_key.split("_")[3]


@dataclass
class Book:
    """All that was done in a run, and every secret that came to light in it."""

    operations: list[Operation] = field(default_factory=list)
    secrets: set[str] = field(default_factory=set)
    _ids: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    def note(self, op: str, t0: float, status: Status, **more: Any) -> Operation:
        """Write down an operation that is over now. ``token_in``, ``token_out`` and ``retry`` are given in the clear."""
        for name in ("token_in", "token_out", "retry"):
            if more.get(name) is not None:
                more[name] = digest(more[name])
        operation = Operation(id=next(self._ids), op=op, t0=t0, t1=time.monotonic(), status=status, **more)
        self.operations.append(operation)
        return operation

    def learn(self, body: Mapping[str, Any]) -> None:
        """Remember the secrets of an answer."""
        self.secrets.update(str(body[name]) for name in ("jwt", "refreshToken", "apiKey") if name in body)


class Caller:
    """Speaks to a server as partners do, over connections that it keeps, and writes down what it sees."""

    def __init__(self, port: int, context: ssl.SSLContext, book: Book, *, node: str = "") -> None:
        self._port = port
        self._context = context
        self._book = book
        self._node = node
        self._idle: list[Link] = []

    async def log_in(self, key: str) -> Answer | None:
        """Log in; ``None`` if no answer came. Raises ``Down``."""
        return await self._told("login", "/auth/login", {"apiKey": key}, token_in=key)

    async def refresh(self, token: str, retry: str | None = None) -> Answer | None:
        """Refresh, with an Idempotency-Key if ``retry`` is one."""
        more = {"event": "session.reuse", "subject": session_id(token)}
        return await self._told("refresh", "/auth/refresh", {"refreshToken": token}, token_in=token, retry=retry, **more)

    async def log_out(self, token: str) -> Answer | None:
        """End a session."""
        more = {"event": "session.logout", "subject": session_id(token)}
        return await self._told("logout", "/auth/logout", {"refreshToken": token}, token_in=token, **more)

    async def create_company(self, partner_key: str, tax_number: str, retry: str | None = None) -> Answer | None:
        """Add a company."""
        body = {"companyName": "Example", "country": "DE", "taxNumber": tax_number}
        return await self._told("create", "/companies", body, credential=partner_key, retry=retry, event="company.created")

    async def rotate_company(self, partner_key: str, company: str, old: str, retry: str | None = None) -> Answer | None:
        """Give a company a new key in the place of ``old``."""
        return await self._told("rotate", f"/companies/{company}/key", {}, credential=partner_key, token_in=old, retry=retry)

    async def get(self, path: str, credential: str) -> Answer:
        """Read something."""
        link = await self._link()
        answer = await link.call("GET", path, Authorization=f"Bearer {credential}")
        self._idle.append(link)
        return answer

    def close(self) -> None:
        """Hang up everywhere."""
        for link in self._idle:
            link.close()
        self._idle.clear()

    async def _link(self) -> Link:
        return self._idle.pop() if self._idle else await Link.open(self._port, self._context)

    async def _told(
        self, op: str, path: str, body: object, *, credential: str | None = None, retry: str | None = None, **more: Any
    ) -> Answer | None:
        headers = {"Idempotency-Key": retry} if retry is not None else {}
        if credential is not None:
            headers["Authorization"] = f"Bearer {credential}"
        link = await self._link()
        t0 = time.monotonic()
        try:
            answer = await link.call("POST", path, body, **headers)
        except Lost:
            self._book.note(op, t0, UNKNOWN, node=self._node, retry=retry, **_event_of(op, None, more))
            return None
        self._idle.append(link)
        self._book.learn(answer.body)
        self._book.note(
            op,
            t0,
            answer.status,
            node=self._node,
            retry=retry,
            token_out=answer.body.get("refreshToken") or answer.body.get("apiKey"),
            code=answer.body.get("code"),
            **_event_of(op, answer, more),
        )
        return answer


def _event_of(op: str, answer: Answer | None, more: Mapping[str, Any]) -> dict[str, Any]:
    """The audit event that stands for an operation: of a refresh only if it was a reuse, of a new company its id."""
    found = dict(more)
    if op == "refresh" and (answer is None or answer.body.get("code") != "refresh_token_reused"):
        del found["event"], found["subject"]
    if op == "create" and answer is not None and "companyId" in answer.body:
        found["subject"] = answer.body["companyId"]
    return found
