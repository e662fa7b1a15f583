"""The feed of revocations: `/auth/revocations`, as a long poll or as an event stream. What it tells: ``core/revocations.py``.

Whoever waits holds a connection and a few kilobytes, no thread and no query. Three things end the wait: news, the time that was
asked for, and that the process is about to stop; that the client has gone ends it without an answer.
"""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Annotated, Final

import msgspec

from gatelodge.errors import Unavailable
from gatelodge_server.core.refusals import StepNotFound, TooManyRequests
from gatelodge_server.core.revocations import Page, Position, Revocations, Told
from gatelodge_server.http.attempts import Names, bucket_of
from gatelodge_server.http.draining import Draining
from gatelodge_server.http.fields import ENCODER
from gatelodge_server.http.operation import (
    Answer,
    Call,
    Operation,
    Receive,
    Scope,
    Send,
    invalid_parameter,
    send_bytes,
    send_problem,
)
from gatelodge_server.http.problems import Refused
from gatelodge_server.http.reach import WAIT_MAX, wait_in
from gatelodge_server.http.sessions import rfc3339

PATH: Final = "/auth/revocations"
_WAITING_MAX: Final = 2_000
"""So many may wait on one process, however many processes there are."""
_WAITING_EACH: Final = 100
"""So many of them may come from one address: a network's verifiers, behind whatever hides their addresses."""
_NAMES_EACH: Final = 100
"""So many names may one address have in each maximum staleness, on one process. It cannot take all places in the store."""
_BEATS: Final = 3
"""An event stream says something so many times in each maximum staleness."""
_VERIFIER: Final = re.compile(r"[A-Za-z0-9._-]{8,64}", re.ASCII)
_EVENT_STREAM: Final = b"text/event-stream"
_NO_STORE: Final = (b"cache-control", b"no-store")


class RevocationAnswer(msgspec.Struct, rename="camel", frozen=True):
    """What session JWTs of a subject are refused with. It takes the place of whatever was told of the subject before."""

    sequence: int
    kind: str
    """`session`, `credential`, `company`, `partner` or `signing-key`; the claims `sid`, `client_id`, `company`, `partner`, and
    `kid` of the header name the subject. Kinds that are not known are to be passed over."""
    subject: str
    at: str | None
    """When it was done; `null` for what is only said again."""
    code: str | None
    """The refusal; `null`: none any more. One that is not known is as good as `credential_revoked`."""
    ends_at: str | None
    """From when on; `null`: at once."""
    epoch: int | None
    """Of a partner: JWTs whose claim `epoch` is lower are `credential_revoked`."""
    until: str | None
    """From then on no JWT can be left that it concerns, and it may be forgotten."""


class FeedAnswer(msgspec.Struct, rename="camel", frozen=True):
    """What is behind the step that was named. Pass `position` (or `sequence`) as `after` of the next request."""

    issuer: str
    """The `iss` of the JWTs that it tells of. About those of any other issuer nothing is to be believed."""
    environment: str
    """Their claim `env`."""
    sequence: int
    position: str
    reset: bool
    """Forget all that was told before: this is told to somebody who begins, or after a backup was restored."""
    more: bool
    """There is more: ask again at once. Until there is none, nothing is to be believed."""
    max_staleness: float
    """Seconds, from the sending of the last request that was answered, after which everything is to be refused."""
    revocations: list[RevocationAnswer]


class AcknowledgementBody(msgspec.Struct, rename="camel", frozen=True):
    """A verifier has applied all steps up to this one."""

    verifier: Annotated[str, msgspec.Meta(min_length=8, max_length=64, pattern=rf"^{_VERIFIER.pattern}$")]
    sequence: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Feed(Operation):
    """An operation that may take its time, and finds out when nobody waits for its answer any more."""

    routes: "RevocationRoutes" = field()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        call = Call(scope)
        try:
            await self.routes.answer(call, receive, send)
        except Refused as refused:
            await send_problem(refused, call, send)


class RevocationRoutes:
    """The handlers of `/auth/revocations`. ``issuer`` and ``environment`` are what session JWTs bear that are signed here."""

    def __init__(self, *, revocations: Revocations, draining: Draining, issuer: str, environment: str) -> None:
        self._revocations = revocations
        self._draining = draining
        self._issuer = issuer
        self._environment = environment
        self._waiting: Counter[str] = Counter()
        self._names = Names(each=_NAMES_EACH, kept=revocations.max_staleness)

    async def answer(self, call: Call, receive: Receive, send: Send) -> None:
        """Answer a reader, in the form that it asks for."""
        query = call.query()
        after = query.get("after")
        verifier = _verifier_of(query.get("verifier"))
        if _EVENT_STREAM in (call.header(b"accept") or b""):
            last = call.header(b"last-event-id")
            position = _position_of(last.decode("latin-1"), "Last-Event-ID") if last else _position_of(after, "after")
            with self._place(call, verifier):
                await self._stream(position, verifier, receive, send)
            return
        position, wait = _position_of(after, "after"), wait_in(call) or 0.0
        with self._place(call, verifier):
            async with _until_gone(receive) as (leave, is_gone):
                async with self._leaving(leave):
                    page = await self._revocations.follow(position, wait=wait, leave=leave, verifier=verifier)
                if not is_gone.is_set():
                    body = ENCODER.encode(self._answer_of(page))
                    await send_bytes(send, HTTPStatus.OK, body, [(b"content-type", b"application/json"), _NO_STORE])

    async def _stream(self, position: Position | None, verifier: str | None, receive: Receive, send: Send) -> None:
        # The first reading before the first byte: a store that is down is a 503 and not an empty stream. A verifier counts from
        # before that reading on, since it believes the first event before it can acknowledge any.
        page = await self._revocations.follow(position, wait=0.0, leave=asyncio.Event(), verifier=verifier)
        headers = [(b"content-type", _EVENT_STREAM), _NO_STORE, (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": HTTPStatus.OK, "headers": headers})
        beat = self._revocations.max_staleness / _BEATS
        async with _until_gone(receive) as (leave, is_gone), self._leaving(leave):
            with suppress(Unavailable):  # the stream ends, and whoever reads it comes back for a 503
                while not is_gone.is_set():
                    await send({"type": "http.response.body", "body": self._event_of(page), "more_body": True})
                    if leave.is_set():
                        break
                    wait = 0.0 if page.has_more else beat
                    page = await self._revocations.follow(page.position, wait=wait, leave=leave)
        await send({"type": "http.response.body", "body": b""})

    def _event_of(self, page: Page) -> bytes:
        return b"id: %b\nevent: revocations\ndata: %b\n\n" % (
            str(page.position).encode("ascii"),
            ENCODER.encode(self._answer_of(page)),
        )

    def _answer_of(self, page: Page) -> FeedAnswer:
        return FeedAnswer(
            issuer=self._issuer,
            environment=self._environment,
            sequence=page.position.sequence,
            position=str(page.position),
            reset=page.is_reset,
            more=page.has_more,
            max_staleness=self._revocations.max_staleness,
            revocations=[_revocation_answer(told) for told in page.revocations],
        )

    @asynccontextmanager
    async def _leaving(self, leave: asyncio.Event) -> AsyncIterator[None]:
        """Set ``leave`` when the process is about to stop."""

        async def watch() -> None:
            await self._draining.wait()
            leave.set()

        watching = asyncio.ensure_future(watch())
        try:
            yield
        finally:
            watching.cancel()

    @contextmanager
    def _place(self, call: Call, verifier: str | None) -> Iterator[None]:
        bucket = bucket_of(call.address)
        if self._waiting[bucket] >= _WAITING_EACH:
            raise TooManyRequests(1)
        if self._waiting.total() >= _WAITING_MAX:
            raise Unavailable
        if verifier is not None:
            self._names.hear(call.address, verifier)
        self._waiting[bucket] += 1
        try:
            yield
        finally:
            self._waiting[bucket] -= 1
            if not self._waiting[bucket]:
                del self._waiting[bucket]

    async def acknowledge(self, call: Call, body: AcknowledgementBody) -> Answer:
        """Note what the reader of an event stream has applied."""
        self._names.hear(call.address, body.verifier)
        await self._revocations.acknowledge(body.verifier, body.sequence)
        return Answer(HTTPStatus.NO_CONTENT)

    async def _read(self, _call: Call, _: None) -> Answer:
        raise NotImplementedError  # `_Feed` answers by itself

    def operations(self) -> Sequence[Operation]:
        """What is served here."""
        return [
            _Feed(
                method="GET",
                path=PATH,
                tag="Service",
                summary="The feed of revocations",
                description=(
                    "What an offline verifier of session JWTs has to refuse, as steps of one sequence. Without `after`, or if "
                    "that is not to be found any more, it begins with everything that JWTs which are still good may be refused "
                    "for (`reset`). Asked with `Accept: text/event-stream` it is an event stream; `id` is the position, and "
                    "`Last-Event-ID` is taken for `after`. Whoever has heard nothing for `maxStaleness` seconds, reckoned from "
                    "the sending of the last request that was answered, has to refuse everything: so wait for a third of that."
                ),
                handler=self._read,
                routes=self,
                answers={200: FeedAnswer},
                refusals=(TooManyRequests, Unavailable),
                parameters={
                    "after": "`position` of the answer before, or its `sequence`.",
                    "wait": f"Seconds to wait for news, 0 to {WAIT_MAX:.0f}; 0 unless told.",
                    "verifier": (
                        "Who asks: 8 to 64 letters, digits, `.`, `_` and `-`, chosen so that nobody guesses it. It has applied "
                        "everything up to `after`, and the answers to revocations count it. So do they with the reader of an "
                        "event stream, which then acknowledges."
                    ),
                },
            ),
            Operation(
                method="POST",
                path=PATH,
                tag="Service",
                summary="Acknowledge revocations",
                description=(
                    "For readers of the event stream: say that all steps up to `sequence` are applied. A verifier counts while "
                    "it says so again within `maxStaleness`."
                ),
                handler=self.acknowledge,
                body=AcknowledgementBody,
                answers={204: None},
                refusals=(StepNotFound, TooManyRequests, Unavailable),
            ),
        ]


@asynccontextmanager
async def _until_gone(receive: Receive) -> AsyncIterator[tuple[asyncio.Event, asyncio.Event]]:
    """Two events that are set when the client hangs up; the first one others may set too."""
    leave, is_gone = asyncio.Event(), asyncio.Event()

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone.set()
        leave.set()

    watching = asyncio.ensure_future(watch())
    try:
        yield leave, is_gone
    finally:
        watching.cancel()


def _revocation_answer(told: Told) -> RevocationAnswer:
    one = told.revocation
    return RevocationAnswer(
        sequence=one.sequence,
        kind=one.kind,
        subject=one.subject,
        at=None if one.at is None else rfc3339(one.at),
        code=None if one.reason is None else one.reason.code,
        ends_at=None if one.ends_at is None else rfc3339(one.ends_at),
        epoch=one.epoch,
        until=None if told.until is None else rfc3339(told.until),
    )


def _position_of(text: str | None, name: str) -> Position | None:
    if text is None:
        return None
    try:
        return Position.parse(text)
    except ValueError as fault:
        raise invalid_parameter(name, str(fault)) from fault


def _verifier_of(text: str | None) -> str | None:
    if text is not None and _VERIFIER.fullmatch(text) is None:
        raise invalid_parameter("verifier", "must be 8 to 64 letters, digits, dots, underscores and hyphens")
    return text
