"""What stands around a gate in a test: an API behind it, whoever knocks, and an issuer's records in memory.

It knows nothing but `gatelodge`: the light package is tested alone.
"""

import hashlib
import json
from dataclasses import dataclass, field

from gatelodge import Grant, InvalidCredential, Unavailable
from gatelodge.verify import Caller

FOREVER = float("inf")


class Api:
    """An API that reads its whole body and remembers whoever called it."""

    def __init__(self, *, reads=True, headers=((b"content-type", b"text/plain"),)):
        self.reads = reads
        self.headers = headers
        self.scopes = []
        self.bodies = []
        self.after = []

    @property
    def scope(self):
        assert len(self.scopes) == 1
        return self.scopes[0]

    async def __call__(self, scope, receive, send):
        self.scopes.append(scope)
        if scope["type"] == "lifespan":
            self.after.append(await receive())
            await send({"type": "lifespan.startup.complete"})
            return
        if scope["type"] == "websocket":
            assert (await receive())["type"] == "websocket.connect"
            await send({"type": "websocket.accept", "subprotocol": None})
            return
        if self.reads:
            body, more = b"", True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    self.after.append(message)
                    break
                body += message.get("body", b"")
                more = message.get("more_body", False)
            else:
                self.after.append(await receive())
            self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": list(self.headers)})
        await send({"type": "http.response.body", "body": b"hello"})


@dataclass
class Answer:
    """What came back."""

    messages: list = field(default_factory=list)

    @property
    def start(self):
        (start,) = [message for message in self.messages if message["type"].endswith("response.start")]
        return start

    @property
    def status(self):
        return self.start["status"]

    @property
    def body(self):
        return b"".join(message.get("body", b"") for message in self.messages if message["type"].endswith("response.body"))

    @property
    def problem(self):
        assert self.header("content-type") == "application/problem+json"
        assert self.header("cache-control") == "no-store"
        assert int(self.header("content-length")) == len(self.body)
        problem = json.loads(self.body)
        assert problem["status"] == self.status
        return problem

    @property
    def code(self):
        return self.problem["code"]

    def all(self, name):
        return [value.decode() for known, value in self.start["headers"] if known == name.encode()]

    def header(self, name):
        values = self.all(name)
        assert len(values) < 2, f"{name} twice"
        return values[0] if values else None


def bearer(text):
    return (b"authorization", b"Bearer " + text.encode())


async def knock(
    gate, *headers, body=b"", chunks=None, announced=True, cut=False, before_chunk=None, extensions=None, **changes
):
    """Send a request and give the ``Answer``.

    ``chunks`` is the body piece by piece, chunked. ``announced`` False sends no header that frames it. ``cut`` ends in a
    disconnect instead of the last piece. ``before_chunk`` is called before each piece is given.
    """
    framed = list(headers)
    if announced and chunks is not None:
        framed.append((b"transfer-encoding", b"chunked"))
    elif announced and body and b"content-length" not in dict(headers):
        framed.append((b"content-length", b"%d" % len(body)))
    pieces = list(chunks) if chunks is not None else [body]
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "https",
        "path": "/api/plans",
        "query_string": b"",
        "headers": framed,
        "extensions": extensions or {},
    } | changes
    at = 0

    async def receive():
        nonlocal at
        if scope["type"] == "websocket":
            return {"type": "websocket.connect"}
        if scope["type"] == "lifespan":
            return {"type": "lifespan.startup"}
        if at >= len(pieces) or (cut and at == len(pieces) - 1):
            return {"type": "http.disconnect"}
        if before_chunk is not None:
            await before_chunk()
        at += 1
        return {"type": "http.request", "body": pieces[at - 1], "more_body": at < len(pieces)}

    answer = Answer()

    async def send(message):
        answer.messages.append(message)

    given = dict(scope)
    await gate(scope, receive, send)
    assert scope == given, "the scope belongs to whoever called the gate"
    return answer


class Book:
    """An issuer's records, in memory and honest: what it knows under a name is a ``Grant``, or why there is none."""

    def __init__(self):
        self.keys, self.tokens, self.sessions = {}, {}, {}
        self.issuers = set()
        self.changes = []
        self.told = -1
        self.asked = []
        self.forget = lambda kind, subject: None
        self.fault = None
        self.before_answer = None

    def change(self, kind, subject):
        self.changes.append((kind, subject))

    def is_current(self):
        return self.told == len(self.changes)

    async def catch_up(self):
        if self.fault is not None:
            raise self.fault
        for kind, subject in self.changes[max(self.told, 0) :]:
            self.forget(kind, subject)
        self.told = len(self.changes)

    async def is_own_issuer(self, issuer):
        return issuer in self.issuers

    async def find_session(self, claimed):
        return await self._answer("session", self.sessions.get(claimed.session, InvalidCredential))

    async def find_token(self, claimed, digest):
        known, grant = self.tokens.get(claimed.token_id, (digest, InvalidCredential))
        return await self._answer("token", grant if known == digest else InvalidCredential)

    async def find_key(self, text):
        return await self._answer("key", self.keys.get(text, InvalidCredential))

    async def _answer(self, sort, found):
        self.asked.append(sort)
        if self.before_answer is not None:
            await self.before_answer()
        if self.fault is not None:
            raise self.fault
        if isinstance(found, type):
            raise found
        return found


def caller(credential="api-key", **changes):
    """A caller as the records tell of one."""
    names = {
        "api-key": ("k3yk3yk3yk3y", None, None),
        "access-token": ("at-1", None, "at-1"),
        "session": ("k3yk3yk3yk3y", "5e55", "jti-1"),
    }
    credential_id, session, token_id = names[credential]
    told = {
        "partner": "acme-motors",
        "company": None,
        "kind": "partner",
        "tier": "starter",
        "scopes": frozenset({"api"}),
        "credential": credential,
        "credential_id": credential_id,
        "session": session,
        "token_id": token_id,
        "environment": "uat",
        "expires_at": None,
    }
    return Caller(**(told | changes))


def a_grant(of, ends_at=FOREVER, reason=InvalidCredential):
    return Grant(of, ends_at, reason)


def digest(text):
    return hashlib.sha256(text.encode()).digest()


class Down(Unavailable):
    """A store that is down."""
