"""Revocations for those outside: the feed that offline verifiers follow, and how far a revocation has got with them.

What happens when a session JWT must be refused by a service that asks nobody:

1. The verb that revokes something appends a step to the change sequence (``store/trail.py``); the bell rings, and on every node
   the ``ChangeFollower`` tells ``Revocations.hear``, which wakes those who wait in ``http/revocations.py``.
2. ``Revocations.read`` reads the steps behind the one that a verifier knows, each with what its subject has come to by now
   (``store/revocations.py``), and says when no JWT can be left that it concerns.
3. The verifier's next request names the step that it has applied, and so acknowledges it. ``Revocations.reach`` counts.

Somebody who knows nothing begins: with what older steps have left behind, then with every step since the oldest JWT that can
still be good was issued. So does one whose step is not there any more: a backup was restored. A step is known by its number and
by a mark made of all that it says, since after a restore the same numbers are given out again.
"""

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, Self

from gatelodge.errors import CredentialRevoked, InvalidCredential, PartnerSuspended, Rejected, Unavailable
from gatelodge_server.core.credentials import END_REASONS
from gatelodge_server.core.following import ChangeFollower
from gatelodge_server.core.model import DAY, HOUR, SECOND, Change, Clock, Duration, EndCause, Instant, PartnerStatus
from gatelodge_server.core.ports import Acknowledgement, Reach, Refused, Revocation, RevocationStore, Tail, TrailStore
from gatelodge_server.core.refusals import StepNotFound, TooManyRequests

VERIFIERS_MAX: Final = 1_000
"""So many may follow by name; those who do not say theirs are not counted. One more takes the place of one that is away."""
AWAY_FOR: Final[Duration] = HOUR
"""A verifier that was not seen for so long is forgotten. It refuses everything long since."""
PAGE: Final = 200
"""Revocations in one answer: less than 64 KiB."""
_MARGIN: Final[Duration] = HOUR
"""By so much may the clocks of the nodes and of the verifiers differ."""
_TOO_OLD: Final[Duration] = DAY
"""Whoever is further behind begins anew: that is less to read."""
_GLANCE: Final = 0.05
"""Seconds between two looks at the bell while somebody waits. It is memory, and no query."""
_PAUSE: Final = 0.5
"""Seconds until the store is asked again after it did not answer."""
_COUNT_AGAIN: Final = 0.1
"""Seconds between two countings of acknowledgements, for whoever waits for them."""

_NO_STEP: Final = "0" * 16
_POSITION: Final = re.compile(
    r"(0|[1-9][0-9]{0,17})(?:\.([0-9a-f]{16}))?(?:~(credential|partner)~([A-Za-z0-9-]{1,64}))?", re.ASCII
)


class Position(NamedTuple):
    """How far somebody has read: behind which step, and, while the beginning is read, after which subject of it."""

    sequence: int
    mark: str = ""
    """What the step said, in short. Empty: the number has to do."""
    restated: tuple[str, str] | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """A position as it was given out, or just a number. Raises ``ValueError``."""
        match = _POSITION.fullmatch(text)
        if match is None:
            raise ValueError("must be the `position` or the `sequence` of an earlier answer")
        number, mark, kind, subject = match.groups()
        return cls(int(number), mark or "", (kind, subject) if kind else None)

    @classmethod
    def behind(cls, step: Change | None) -> Self:
        """Behind this step; behind none, before the first."""
        return cls(0, _NO_STEP) if step is None else cls(step.sequence, mark_of(step))

    def __str__(self) -> str:
        return f"{self.sequence}.{self.mark}" + ("" if self.restated is None else "~{}~{}".format(*self.restated))

    def holds(self, step: Change | None) -> bool:
        """Whether ``step``, the one with this number in the database, is the one that was meant."""
        if step is None:
            return self.sequence == 0
        return self.mark in {"", mark_of(step)}


def mark_of(step: Change) -> str:
    """What a step says, in short: no step of another history has the same."""
    said = f"{step.sequence}\n{step.kind}\n{step.subject}\n{step.at}"
    return hashlib.sha256(said.encode()).hexdigest()[:16]


# --- Judging: what a session JWT of a subject is refused with, and from when on; as `judge_standing` has it ---------------


def key_end(
    ends_at: Instant | None, cause: EndCause | None, rotated_at: Instant | None
) -> tuple[type[Rejected] | None, Instant | None]:
    """Of an API key."""
    if cause is EndCause.REVOKED:
        return CredentialRevoked, None
    if ends_at is None:
        return None, None
    reason = END_REASONS[cause or EndCause.REVOKED]
    has_overlap = cause is not EndCause.ROTATED or rotated_at is None or ends_at > rotated_at
    return reason, ends_at if has_overlap else None


def company_end(deleted_at: Instant | None) -> type[Rejected] | None:
    """Of a company."""
    return None if deleted_at is None else CredentialRevoked


def partner_end(status: PartnerStatus) -> type[Rejected] | None:
    """Of a partner. That its sessions of earlier epochs have ended is said by the epoch."""
    return {PartnerStatus.SUSPENDED: PartnerSuspended, PartnerStatus.DEACTIVATED: CredentialRevoked}.get(status)


def signing_key_end(gone_at: Instant) -> tuple[type[Rejected], Instant]:
    """Of a key that signs: what it has signed is nobody's from then on."""
    return InvalidCredential, gone_at


# --- The feed -------------------------------------------------------------------------------------------------------------


class Told(NamedTuple):
    """A revocation as it is told."""

    revocation: Revocation
    until: Instant | None
    """From then on no session JWT can be left that it concerns; ``None``: for as long as nothing else is told."""


@dataclass(frozen=True, slots=True)
class Page:
    """An answer of the feed."""

    position: Position
    """To be named in the next request."""
    revocations: Sequence[Told]
    is_reset: bool
    """Whether all that was told before is to be forgotten."""
    has_more: bool
    """Whether there is more at once. Only who has read all knows how things stand."""
    is_news: bool
    """Whether anything has changed since the position that was asked with."""


class FeedStore(RevocationStore, TrailStore, Protocol):
    """What the feed needs of a store."""


class Revocations:
    """The feed of one deployment, on one node. Belongs to one event loop.

    ``jwt_ttl`` is how long a session JWT is good for; ``max_staleness``, in seconds, how long a verifier believes what it has
    heard. ``pause`` sleeps so many seconds.
    """

    def __init__(
        self,
        *,
        store: FeedStore,
        follower: ChangeFollower,
        clock: Clock,
        monotonic: Callable[[], float],
        jwt_ttl: Duration,
        max_staleness: float,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._follower = follower
        self._clock = clock
        self._monotonic = monotonic
        self._kept = jwt_ttl + _MARGIN
        self.max_staleness = max_staleness
        self._within: Duration = int(max_staleness * SECOND)
        self._pause = pause
        self._news = asyncio.Event()
        self._waiting = 0
        self._somebody_waits = asyncio.Event()

    # the feed

    async def read(self, position: Position | None) -> Page:
        """What is behind ``position``; the beginning, if that is ``None`` or not to be found any more. Raises ``Unavailable``.

        What it says was so after this was asked.
        """
        now = self._clock()
        if position is None or position.restated is not None:
            return await self._begin(position, now)
        tail = await self._store.read_revocations(after=position.sequence, limit=PAGE)
        is_far_behind = tail.oldest is not None and tail.oldest.at <= now - self._kept - _TOO_OLD
        if is_far_behind or not position.holds(tail.step):
            return await self._begin(None, now)
        return self._page_of(tail, asked=position)

    async def _begin(self, position: Position | None, now: Instant) -> Page:
        restated = None if position is None else position.restated
        found = await self._store.begin_revocations(since=now - self._kept, after=restated, limit=PAGE)
        start = Position.behind(found.step) if position is None else Position(position.sequence, position.mark)
        told = self._tell(found.revocations)
        is_reset = position is None
        if found.next is not None:
            return Page(start._replace(restated=found.next), told, is_reset=is_reset, has_more=True, is_news=True)
        # What is left of the page is filled, so that a small deployment is told in one answer.
        tail = await self._store.read_revocations(after=start.sequence, limit=PAGE - len(told) + 1)
        if not start.holds(tail.step):
            return await self._begin(None, now)  # restored while it was read
        page = self._page_of(tail, asked=start)
        return Page(page.position, [*told, *page.revocations], is_reset=is_reset, has_more=page.has_more, is_news=True)

    def _page_of(self, tail: Tail, *, asked: Position) -> Page:
        position = asked if tail.last is None else Position.behind(tail.last)
        is_news = position.sequence != asked.sequence
        return Page(position, self._tell(tail.revocations), is_reset=False, has_more=tail.has_more, is_news=is_news)

    def _tell(self, revocations: Sequence[Revocation]) -> Sequence[Told]:
        return [Told(one, self._until(one)) for one in revocations]

    def _until(self, revocation: Revocation) -> Instant | None:
        instants = [at for at in (revocation.at, revocation.ends_at) if at is not None]
        if revocation.reason is PartnerSuspended or not instants:
            return None
        return max(instants) + self._kept

    # waiting for news

    def hear(self, _kind: str, _subject: str) -> None:
        """Something has changed: wake whoever waits. For the follower to call."""
        if self._waiting:
            news, self._news = self._news, asyncio.Event()
            news.set()

    async def follow(
        self, position: Position | None, *, wait: float, leave: asyncio.Event, verifier: str | None = None
    ) -> Page:
        """What is behind ``position`` once there is something, or after ``wait`` seconds, or once ``leave`` is set.

        What it says was so at the end. ``verifier`` has applied everything up to ``position``: that is noted first. Raises
        ``Unavailable``, or ``TooManyRequests`` if there is no room for one more verifier.
        """
        with self._place():
            if not self._follower.is_current():
                await self._follower.catch_up()  # a follower that has read nothing yet would not tell of the next change
            news = self._news
            page = await self.read(position)
            if verifier is not None:
                await self._note(verifier, position, page)
                if page.is_news or wait <= 0 or leave.is_set():
                    # It believes this answer before it is heard of again. It counts from now on only, if it was away or begins:
                    # what was revoked before has waited for nobody of its name, and so has to be told.
                    page = await self.read(position)
            until = self._monotonic() + wait
            while not page.is_news and not leave.is_set() and self._monotonic() < until:
                await _first_of(news, leave, seconds=until - self._monotonic())
                news = self._news
                page = await self.read(position)
            return page

    async def _note(self, verifier: str, position: Position | None, page: Page) -> None:
        """Note what a verifier has applied: nothing, if it begins. Whatever is revoked from then on waits for it."""
        has_begun = position is not None and position.restated is None and not page.is_reset
        with suppress(StepNotFound):  # restored this very moment: the next answer says so
            await self.acknowledge(verifier, position.sequence if has_begun and position is not None else 0)

    @contextmanager
    def _place(self) -> Iterator[None]:
        self._waiting += 1
        self._somebody_waits.set()
        try:
            yield
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._somebody_waits.clear()

    async def run(self) -> None:
        """Look at the bell while somebody waits, until cancelled: nothing else would before the follower's next reading."""
        while True:
            await self._somebody_waits.wait()
            try:
                if not self._follower.is_current():
                    await self._follower.catch_up()
            except Unavailable:
                await self._pause(_PAUSE)
            await self._pause(_GLANCE)

    # who has heard

    async def acknowledge(self, verifier: str, sequence: int) -> None:
        """``verifier`` has applied all steps up to this one. Raises ``StepNotFound`` or ``TooManyRequests``."""
        outcome = await self._store.acknowledge_step(Acknowledgement(verifier, sequence, self._clock(), self._within))
        if isinstance(outcome, Refused):
            raise TooManyRequests(int(self.max_staleness)) if outcome.reason is TooManyRequests else outcome.reason()

    async def reach(self, sequence: int | None, *, wait: float = 0.0, leave: Callable[[], bool] = lambda: False) -> Reach:
        """How many verifiers there are, and how many of them have applied a step; ``None``: the last one there is.

        Waits ``wait`` seconds for all, but no longer than until those that have not are refusing everything anyway, nor once
        ``leave`` says so.
        """
        if sequence is None:
            sequence = await self._store.last_change()
        until = self._monotonic() + min(wait, self.max_staleness + _COUNT_AGAIN)
        while True:
            reach = await self._store.count_reach(sequence, within=self._within, now=self._clock())
            if reach.acknowledged >= reach.verifiers or self._monotonic() >= until or leave():
                return reach
            await self._pause(_COUNT_AGAIN)


async def _first_of(*events: asyncio.Event, seconds: float) -> None:
    tasks = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
