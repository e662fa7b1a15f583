"""Quotas: of what a tier allows in an hour and a day (by UTC), no more is let in than that, on any number of nodes.

How a request is counted:

1. The gate calls ``Quotas.take``. While this process holds a slice that it has leased for the present windows, the request is
   taken from that, in memory and without a pause.
2. Otherwise it waits for ``Quotas.count``, which asks the store for another slice: ``store/quotas.py`` ``lease_quotas``
   locks the partner's row and lets ``judge_ask`` decide. What is leased is taken, whoever uses it, so nodes together can never
   let in more than the limit.
3. What is not used is given back: when the windows end, after a quarter of a second without use, after a change of tier and
   when the process ends. Slices grow with the traffic and shrink as the limit nears; what a crash takes along is one slice.

Which hour it is says the store's clock alone, for the clocks of nodes differ. A lease tells the store's time, and so how long
its windows last. For so long it may be used, by the node's monotonic clock, and reckoned from before it was asked for. The
node's wall clock, put right by what it was wrong by at the last lease, may end it earlier (a monotonic clock can stand still
while a machine sleeps), but never later.

Whenever it is not known whether the store has heard something, the outcome is that fewer are let in, never more.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NamedTuple

from gatelodge.errors import InvalidCredential, QuotaExceeded, Unavailable
from gatelodge.rates import Header, RateForm, RateWindow, rate_headers, seconds_left
from gatelodge_server.core.following import RESTORED
from gatelodge_server.core.model import DAY, HOUR, SECOND, Clock, Duration, Instant, Tier
from gatelodge_server.core.ports import UNHEARD, Lease, QuotaAsk, QuotaStore, Unheard
from gatelodge_server.core.refusals import PartnerNotFound
from gatelodge_server.core.tiers import LARGEST_LIMIT
from gatelodge_server.core.usage import UsageLedger, UseKind

BUSY: Final = 0.5
"""Seconds: a slice that is used up within them was too small."""
EXHAUSTED_KEPT: Final = 0.1
"""Seconds for which "nothing is left" is believed: another node may give something back."""
IDLE: Final = 0.25
"""Seconds without a request after which a slice is given back."""
SLICES: Final = 8
"""No slice is larger than this part of what is left."""
STEADY: Final = 0.999
"""A monotonic clock may lose this much on the store's: each of the two is slewed by at most a two-thousandth."""
_TICK: Final = 0.1
_FLUSH: Final = 1.0
_NEVER: Final = float("-inf")
_HOUR_SECONDS: Final = HOUR // SECOND
_DAY_SECONDS: Final = DAY // SECOND


# --- the decision ---------------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """A partner's hour or day as the store has it: when it began, how much of it is leased, and the one before it.

    The one before is another in time, too, if a clock was wrong: then it may be returned to.
    """

    starts_at: Instant
    taken: int
    left_at: Instant = 0
    left_taken: int = 0

    def at(self, now: Instant, length: Duration) -> "Window":
        """The window that counts at ``now``, which is this one unless a later one has begun.

        A clock that has stepped back is counted here if this is the next window. One further ahead was opened by a clock that
        was wrong: the present window takes its place with what is known of it, and what the wrong one let in counts in it.
        """
        present = now - now % length
        if present <= self.starts_at <= now + length:
            return self
        taken = self.left_taken if self.left_at == present else 0
        if self.starts_at > present:
            taken = min(taken + self.taken, LARGEST_LIMIT)
        return Window(present, taken, self.starts_at, self.taken)


class Windows(NamedTuple):
    """Both of a partner's windows."""

    hour: Window
    day: Window


UNOPENED: Final = Windows(Window(0, 0), Window(0, 0))
"""Of a partner who has never asked."""


def judge_ask(before: Windows, ask: QuotaAsk, tier: Tier, now: Instant) -> tuple[Windows, Lease]:
    """What an ask gets at ``now``, by the store's clock, and how the windows stand then.

    What comes back unused counts for the window that it was taken from, if that is still the present one.
    """
    hour, day = before.hour.at(now, HOUR), before.day.at(now, DAY)
    hour_taken = max(0, hour.taken - (ask.unused if ask.unused_hour_at == hour.starts_at else 0))
    day_taken = max(0, day.taken - (ask.unused if ask.unused_day_at == day.starts_at else 0))
    granted = max(0, min(ask.want, tier.requests_per_hour - hour_taken, tier.requests_per_day - day_taken))
    after = Windows(hour._replace(taken=hour_taken + granted), day._replace(taken=day_taken + granted))
    return after, Lease(granted, tier, *after.hour[:2], *after.day[:2], now)


# --- how a partner stands -------------------------------------------------------------------------------------------------


class WindowUse(NamedTuple):
    """How much of a window is used. What this process holds and has not used counts as remaining."""

    limit: int
    used: int
    remaining: int
    resets_at: Instant


class QuotaStatus(NamedTuple):
    """How a partner stands."""

    tier: Tier
    hour: WindowUse
    day: WindowUse
    now: Instant
    """When it was so, by the store's clock as far as this process knows it."""

    def windows(self) -> tuple[RateWindow, RateWindow]:
        """The same, for ``gatelodge.rates.rate_headers``."""
        return (
            RateWindow("hour", self.hour.limit, _HOUR_SECONDS, self.hour.resets_at, self.hour.remaining),
            RateWindow("day", self.day.limit, _DAY_SECONDS, self.day.resets_at, self.day.remaining),
        )


class Taken(NamedTuple):
    """The windows that a lease is of: when they began, and how much of each is leased."""

    hour_starts_at: Instant
    hour_taken: int
    day_starts_at: Instant
    day_taken: int

    @classmethod
    def of(cls, lease: Lease) -> "Taken":
        """As the store has just said."""
        return cls(*lease[2:6])


def _status_of(taken: Taken, tier: Tier, held: int, now: Instant) -> QuotaStatus:
    hour, day = taken.hour_taken - held, taken.day_taken - held
    # A tier can have been lowered to below what is used already.
    return QuotaStatus(
        tier,
        WindowUse(tier.requests_per_hour, hour, max(0, tier.requests_per_hour - hour), taken.hour_starts_at + HOUR),
        WindowUse(tier.requests_per_day, day, max(0, tier.requests_per_day - day), taken.day_starts_at + DAY),
        now,
    )


# --- this process's side --------------------------------------------------------------------------------------------------

_NOTHING: Final = Taken(0, 0, 0, 0)


class _Book:
    """What this process holds of a partner's quota, and who waits for more. One ask is under way at a time, or none."""

    __slots__ = (
        "asking",
        "counts",
        "ends_at",
        "epoch",
        "exhausted_until",
        "form",
        "idle_since",
        "leased_at",
        "left",
        "looks",
        "noted",
        "partner_id",
        "refused",
        "room",
        "seen",
        "served",
        "slice",
        "taken",
        "tier",
        "told_at",
        "unused",
        "usable_until",
    )

    def __init__(self, partner_id: str, at: float) -> None:
        self.partner_id = partner_id
        self.tier = Tier("", 0, 0)
        self.taken = _NOTHING
        self.ends_at = 0
        """When the lease that ``taken`` came with must not be used any more: by the store's clock,"""
        self.usable_until = _NEVER
        """and by the monotonic one of this process. Whichever says so first."""
        self.form = RateForm(())
        self.room = (0, 0)
        """What nobody has leased of the hour and the day."""
        self.left = 0
        """May be let in: of the lease that ``taken`` came with."""
        self.unused = 0
        """Not to be used any more, but to be given back: of the same lease."""
        self.slice = 1
        self.leased_at = self.exhausted_until = _NEVER
        self.served = self.refused = 0
        self.noted = (0, 0)
        """How much of ``served`` and ``refused`` the ledger has."""
        self.told_at = _NEVER
        """When an ask last took the counts along."""
        self.epoch = 0
        """Counts how often it was told to forget: what was asked for before is not used after."""
        self.counts: deque[asyncio.Future[QuotaStatus]] = deque()
        self.looks: list[asyncio.Future[QuotaStatus]] = []
        self.asking: asyncio.Task[None] | None = None
        self.seen, self.idle_since = 0, at

    def is_over(self, now: Instant, at: float) -> bool:
        """Whether the windows may have ended, so that what is held or was refused in them counts no more."""
        return now >= self.ends_at or at > self.usable_until

    def status(self, now: Instant) -> QuotaStatus:
        return _status_of(self.taken, self.tier, self.left + self.unused, now)

    def let_in(self) -> None:
        """Take one from what is left."""
        self.left -= 1
        self.served += 1

    def refuse(self, now: Instant) -> QuotaExceeded:
        self.refused += 1
        windows = self.status(now).windows()
        used_up = [window for window in windows if not window.remaining]
        longest = max(seconds_left(window, now) for window in used_up)
        return QuotaExceeded([window.name for window in used_up], longest, rate_headers(windows, now))

    def set_aside(self) -> None:
        """Use nothing of what is held any more: it is to be given back."""
        self.unused += self.left
        self.left = 0

    def next_ask(self, clock_at: Instant, now: Instant, at: float) -> QuotaAsk:
        """The ask that answers all who wait. It gives back whatever is held, unless it is to look only.

        ``clock_at`` is what the clock of this process says, ``now`` what it takes the store's to say.
        """
        if not self.counts and not self.unused:
            return QuotaAsk(self.partner_id, 0, clock_at)
        want = self._next_slice(now, at) if self.counts else 0
        self.set_aside()
        unused, self.unused = self.unused, 0
        return QuotaAsk(self.partner_id, want, clock_at, unused, self.taken.hour_starts_at, self.taken.day_starts_at)

    def _next_slice(self, now: Instant, at: float) -> int:
        if self.leased_at > _NEVER:
            used_up_at_once = not self.left and not self.unused and at - self.leased_at <= BUSY
            self.slice = self.slice * 2 if used_up_at_once else max(1, self.slice // 2)
        hour = self.taken.hour_taken if now < self.taken.hour_starts_at + HOUR else 0
        day = self.taken.day_taken if now < self.taken.day_starts_at + DAY else 0
        room = min(self.tier.requests_per_hour - hour, self.tier.requests_per_day - day)
        self.slice = min(max(self.slice, len(self.counts)), max(1, room // SLICES))
        return self.slice

    def settle(self, ledger: UsageLedger) -> None:
        """Enter what was counted since the last time."""
        served, refused = self.noted
        self.noted = (self.served, self.refused)
        ledger.note(self.partner_id, self.taken.hour_starts_at, self.served - served, self.refused - refused)

    def along(self, ask: QuotaAsk, at: float, ledger: UsageLedger) -> QuotaAsk:
        """The ask, and the counts with it if it is one that writes.

        A look does not, and hardly an ask after nothing was granted: whoever is refused again and again costs no more writes
        than the one a second that all share.
        """
        if not ask.unused and (not ask.want or self.exhausted_until > _NEVER):
            return ask
        self.told_at = at
        self.settle(ledger)
        return ask._replace(usage=ledger.take(self.partner_id))

    def adopt(self, lease: Lease, asked_at: float, now: Instant, ledger: UsageLedger) -> QuotaStatus:
        """From now on the windows are those of ``lease``. Whatever is held is of these windows, or nothing is held.

        ``asked_at`` is a reading of the monotonic clock from before it was asked for.
        """
        if self.taken.hour_starts_at != lease.hour_starts_at:
            self.settle(ledger)
        taken = Taken.of(lease)
        is_known = (self.tier, self.taken.hour_starts_at, self.taken.day_starts_at) == (lease.tier, taken[0], taken[2])
        self.tier, self.taken = lease.tier, taken
        self.ends_at = min(taken.hour_starts_at + HOUR, taken.day_starts_at + DAY)
        # The store's time is a whole number of milliseconds, and so may be up to one later than it says.
        self.usable_until = asked_at + (self.ends_at - lease.now - 1) / SECOND * STEADY
        self.room = (lease.tier.requests_per_hour - lease.hour_taken, lease.tier.requests_per_day - lease.day_taken)
        self.exhausted_until = _NEVER
        status = self.status(now)
        if not is_known:
            self.form = RateForm(status.windows())
        return status

    def look_at(self, lease: Lease, asked_at: float, now: Instant, ledger: UsageLedger) -> QuotaStatus:
        """How the partner stands by a lease of nothing, which has left what is held as it was."""
        held = self.left + self.unused
        is_present = self.taken.hour_starts_at == lease.hour_starts_at
        if not held or (is_present and lease.tier == self.tier):
            return self.adopt(lease, asked_at, now, ledger)
        # What is held is of another tier, or others are in later windows already: it is known by its own tier and windows
        # until it has been given back.
        self.set_aside()
        return _status_of(Taken.of(lease), lease.tier, held if is_present else 0, now)

    def fail(self, fault: type[Exception] | Exception) -> None:
        """Tell all who wait that it cannot be done."""
        for future in (*self.counts, *self.looks):
            if not future.done():
                future.set_exception(fault)
        self.counts.clear()
        self.looks.clear()


class Quotas:
    """What this process lets in of each partner. Belongs to one event loop.

    ``run`` must be running for what is not used to be given back; ``close`` gives everything back and ends ``run``.
    """

    def __init__(
        self,
        *,
        store: QuotaStore,
        clock: Clock,
        monotonic: Callable[[], float],
        on_mistake: Callable[[Exception], None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._monotonic = monotonic
        self._on_mistake = on_mistake
        self._skew = 0
        """What the store's clock was ahead of this process's at the last lease, or a little more."""
        self._books: dict[str, _Book] = {}
        self._ledger = UsageLedger(store)
        self._flushing = asyncio.Lock()
        self._flush_due = _NEVER
        self._closing = asyncio.Event()

    def take(self, partner_id: str, clock_at: Instant) -> list[Header] | None:
        """Let one request of a partner in at once; the rate headers. If nothing is held, ``count`` is to be asked.

        ``clock_at`` is the time of the request by the clock of this process.
        """
        book = self._books.get(partner_id)
        now = clock_at + self._skew
        # As `book.is_over`, for every request: a process that was frozen wakes up with an old lease.
        if book is None or not book.left or now >= book.ends_at or self._monotonic() > book.usable_until:
            return None
        book.let_in()
        # As `book.status` reckons, without what that makes: while something is left, nothing is unused.
        hour, day = book.room
        return book.form.headers((hour + book.left, day + book.left), now)

    async def count(self, partner_id: str, clock_at: Instant) -> QuotaStatus:
        """Let one request of a partner in. Raises ``QuotaExceeded``, or ``Unavailable`` when the store cannot be asked."""
        book, now, at = self._books.get(partner_id), clock_at + self._skew, self._monotonic()
        if book is not None and not book.is_over(now, at):
            if book.left:
                book.let_in()
                return book.status(now)
            if at < book.exhausted_until:
                raise book.refuse(now)
        book = book or self._open(partner_id)
        future: asyncio.Future[QuotaStatus] = asyncio.get_running_loop().create_future()
        book.counts.append(future)
        self._wake(book)
        return await future

    async def status(self, partner_id: str) -> QuotaStatus:
        """How a partner stands at this moment, on all nodes. Raises ``PartnerNotFound`` or ``Unavailable``."""
        book = self._books.get(partner_id) or self._open(partner_id)
        future: asyncio.Future[QuotaStatus] = asyncio.get_running_loop().create_future()
        book.looks.append(future)
        self._wake(book)
        try:
            return await future
        except InvalidCredential:
            raise PartnerNotFound from None

    def note_use(self, kind: UseKind, credential_id: str, address: str, now: Instant) -> None:
        """A credential is being used from ``address``: to be remembered as its last use."""
        self._ledger.note_use(kind, credential_id, address, now)

    def hear(self, kind: str, subject: str) -> None:
        """Heed a change (``following.Forget``): of a partner's tier, or of what a tier allows."""
        if kind == "partner":
            self.forget(subject)
        elif kind in {"tier", RESTORED}:
            self.forget_all()

    def forget(self, partner_id: str) -> None:
        """The partner may have another tier: ask the store before the next request is let in, and give back what is held."""
        book = self._books.get(partner_id)
        if book is not None:
            book.epoch += 1
            book.exhausted_until = _NEVER
            book.set_aside()
            if book.unused:
                self._wake(book)

    def forget_all(self) -> None:
        """As ``forget``, for every partner."""
        for partner_id in tuple(self._books):
            self.forget(partner_id)

    async def run(self) -> None:
        """Give back what is not used and tell the store what was counted, until closed."""
        while not self._closing.is_set():
            try:
                await self.go_round()
            except Unavailable:
                pass  # the store has said so already
            except Exception as mistake:  # noqa: BLE001 - whatever it is, the next round may do without it
                self._on_mistake(mistake)
            with suppress(TimeoutError):
                async with asyncio.timeout(_TICK):
                    await self._closing.wait()

    async def go_round(self) -> None:
        """Give back what is idle or of an ended window; about once a second, tell what was counted. Raises ``Unavailable``."""
        now, at = self._now(), self._monotonic()
        for book in tuple(self._books.values()):
            counted = book.served + book.refused
            if counted != book.seen:
                book.seen, book.idle_since = counted, at
            is_idle = at - book.idle_since >= IDLE
            if book.left and (is_idle or book.is_over(now, at)):
                book.set_aside()
                self._wake(book)
            elif is_idle and book.asking is None and not book.left:
                book.settle(self._ledger)
                del self._books[book.partner_id]
        await self._wait_for_asks()
        if at >= self._flush_due:
            self._flush_due = at + _FLUSH
            await self._flush(but_since=at - _FLUSH)

    async def close(self) -> None:
        """Give back everything and tell what was counted. What the store does not hear now is lost: fewer are let in."""
        self._closing.set()
        while held := [book for book in self._books.values() if book.left or book.unused or book.asking]:
            for book in held:
                book.set_aside()
                self._wake(book)
            await self._wait_for_asks()
        with suppress(Unavailable):  # the store has said so already
            await self._flush()

    def _open(self, partner_id: str) -> _Book:
        book = self._books[partner_id] = _Book(partner_id, self._monotonic())
        return book

    async def _flush(self, *, but_since: float = float("inf")) -> None:
        """Tell what is left, but for partners whose counts went along after ``but_since``: they will again."""
        async with self._flushing:
            for book in self._books.values():
                if book.told_at <= but_since:
                    book.settle(self._ledger)
            await self._ledger.flush()

    async def _wait_for_asks(self) -> None:
        asks = [book.asking for book in self._books.values() if book.asking is not None]
        if asks:
            await asyncio.wait(asks)

    def _wake(self, book: _Book) -> None:
        if book.asking is None:
            book.asking = asyncio.get_running_loop().create_task(self._ask_for_all(book))

    async def _ask_for_all(self, book: _Book) -> None:
        """Ask until nobody waits and nothing is to be given back. It goes on although those who wait may have gone away."""
        try:
            while book.counts or book.looks or book.unused:
                await self._ask(book)
        except Exception as mistake:  # noqa: BLE001 - all who wait hear of it
            book.fail(mistake)
            self._on_mistake(mistake)
        finally:
            book.asking = None

    def _now(self) -> Instant:
        """The time by the store's clock, as far as this process knows it."""
        return self._clock() + self._skew

    async def _ask(self, book: _Book) -> None:
        # First the monotonic clock: whatever happens between these lines and the store's decision, the lease ends no later.
        at = self._monotonic()
        clock_at = self._clock()
        epoch, ask = book.epoch, book.along(book.next_ask(clock_at, clock_at + self._skew, at), at, self._ledger)
        looks, book.looks = book.looks, []
        try:
            lease = await self._store.lease_quota(ask)
        except Unavailable:
            self._ledger.keep(ask.usage)
            lease = UNHEARD
        except Exception:
            self._ledger.keep(ask.usage)  # a mistake: nothing was written
            raise
        if isinstance(lease, Unheard):
            # What was given back with this ask is not given back again, and what it was granted is not used: whether that was
            # done is not always known, and so at most fewer are let in.
            book.looks += looks
            book.fail(Unavailable)
            return
        if lease is None:
            book.looks += looks
            book.fail(InvalidCredential)
            return
        self._skew = lease.now - clock_at
        is_look = not ask.want and not ask.unused
        status = (book.look_at if is_look else book.adopt)(lease, at, self._now(), self._ledger)
        if ask.want:
            self._hand_out(book, lease.granted, is_late=book.epoch != epoch)
            status = book.status(self._now())
        for future in looks:
            if not future.done():
                future.set_result(status)

    def _hand_out(self, book: _Book, granted: int, *, is_late: bool) -> None:
        at, now = self._monotonic(), self._now()
        if is_late or book.is_over(now, at):
            # The tier may have changed. Or the windows have ended, and some of those who wait came after that. What was granted
            # goes back, and the store is asked anew for all who wait.
            book.unused = granted
            return
        if granted:
            book.left, book.leased_at = granted, at
        else:
            book.exhausted_until = at + EXHAUSTED_KEPT
        while book.counts and (book.left or not granted):
            future = book.counts.popleft()
            if future.done():  # its caller has gone
                continue
            if granted:
                book.let_in()
                future.set_result(book.status(now))
            else:
                future.set_exception(book.refuse(now))
