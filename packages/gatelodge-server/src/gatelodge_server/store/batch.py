"""Micro-batching: one transaction, and so one fsync, serves every caller that came while the one before was under way.

There is no timer. A lone request is flushed at once; under load the batches grow by themselves, because a flush takes as long
as it takes and the others collect meanwhile. Nobody stands behind two that fail: when a flush has waited for the database in
vain, those who collected meanwhile are told so as well, and none of theirs was begun.

A server of its own can work at one flush while this process makes the next, and wait for two disks' worth of commits at once.
For such a one those who wait are spread over several flushes.

Nobody waits for what only another one needs. A row may be held by somebody else, even by a node that is frozen: the verb
answers who needs it with ``BUSY``, and that request comes again in a later flush.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, TypeVar

from gatelodge.errors import Unavailable

Request = TypeVar("Request")
Outcome = TypeVar("Outcome")

_WORTHWHILE: Final = 16
"""So many at least are in each of several flushes: another one for fewer would cost more than it saves."""
_FIRST_PAUSE: Final = 0.002
_LONGEST_PAUSE: Final = 0.1
"""Seconds after which a request that was ``Busy`` comes again: twice as many each time."""


class Busy:
    """What a request needs is held by somebody else, and nothing of it was done."""


BUSY: Final = Busy()


class UnheardError(Exception):
    """All was done but for the commit, and whether that was done nobody knows."""


class Batch(Generic[Request, Outcome]):
    """One verb's queue. Each caller gets its own outcome, in the order of arrival, and never another caller's exception.

    ``run`` is given one to ``largest`` requests and returns as many outcomes; so many flushes run ``at_once``, and no more.
    More than ``backlog`` callers are not kept waiting: the next hears ``Unavailable``. So do those who came before a flush was
    found to be ``Unavailable`` after ``vain`` seconds or more; what fails sooner is tried again for them. So does, at last,
    who has been told ``Busy`` for ``patience`` seconds.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Request]], Awaitable[Sequence[Outcome | Busy]]],
        *,
        at_once: int = 1,
        largest: int = 256,
        backlog: int = 4096,
        vain: float = 1.0,
        patience: float = 4.0,
    ) -> None:
        self._run = run
        self._at_once = at_once
        self._largest = largest
        self._backlog = backlog
        self._vain = vain
        self._patience = patience
        self._waiting: list[tuple[Request, asyncio.Future[Outcome | Busy]]] = []
        self._drains: set[asyncio.Task[None] | None] = set()
        self._under_way = 0

    async def __call__(self, request: Request) -> Outcome:
        """The outcome of ``request``, once the batch that it was in is committed.

        Raises ``Unavailable``, and ``UnheardError`` if ``run`` tells the two apart.
        """
        loop = asyncio.get_running_loop()
        pause, deadline = _FIRST_PAUSE, loop.time() + self._patience
        while isinstance(outcome := await self._ask(request), Busy):
            if loop.time() + pause >= deadline:
                raise Unavailable
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return outcome

    async def _ask(self, request: Request) -> Outcome | Busy:
        if len(self._waiting) >= self._backlog:
            raise Unavailable
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Outcome | Busy] = loop.create_future()
        self._waiting.append((request, future))
        if len(self._drains) < self._at_once:
            # The task starts in the loop's next round: what the sockets deliver in this one comes along.
            self._drains.add(loop.create_task(self._drain()))
        return await future

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                taken, begun = self._take(), loop.time()
                self._under_way += 1
                try:
                    was_there = await self._flush(taken)
                finally:
                    self._under_way -= 1
                if not was_there and loop.time() - begun >= self._vain:
                    behind, self._waiting = self._waiting, []
                    _refuse(behind)
        finally:
            # By itself, not when it is done: whoever comes between the two would be waited for by nobody.
            self._drains.remove(asyncio.current_task())

    def _take(self) -> list[tuple[Request, asyncio.Future[Outcome | Busy]]]:
        """Those who have waited longest: all of few, and of many the share of one of the flushes that may begin now."""
        many = len(self._waiting)
        flushes = min(self._at_once - self._under_way, max(1, many // _WORTHWHILE))
        size = min(-(-many // flushes), self._largest)
        taken, self._waiting = self._waiting[:size], self._waiting[size:]
        return taken

    async def _flush(self, taken: Sequence[tuple[Request, asyncio.Future[Outcome | Busy]]]) -> bool:
        """Run them and tell their callers; whether the database was there."""
        try:
            outcomes = await self._run([request for request, _ in taken])
        except (Unavailable, UnheardError) as fault:
            _refuse(taken, type(fault))
            return False
        except Exception as fault:  # noqa: BLE001 - whatever it is, it belongs to one of the callers
            if len(taken) == 1:
                _settle(taken[0][1], fault=fault)
                return True
            # Nothing was committed. One of them is poison: alone, each gets what is its own.
            for alone in taken:
                await self._flush([alone])
        else:
            for (_, future), outcome in zip(taken, outcomes, strict=True):
                if not future.done():  # its caller may have gone
                    future.set_result(outcome)
        return True


def _refuse(
    taken: Sequence[tuple[Request, asyncio.Future[Outcome | Busy]]], why: type[Unavailable | UnheardError] = Unavailable
) -> None:
    for _, future in taken:
        _settle(future, fault=why())


def _settle(future: asyncio.Future[Outcome | Busy], *, fault: Exception) -> None:
    if not future.done():
        future.set_exception(fault)
