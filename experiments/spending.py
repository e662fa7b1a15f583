"""P2: a refresh token is spent at most once, over all workers, crashes and pauses; and who retries honestly stays logged in.

One node with three workers. Eight clients send every token two to four times at once, over connections of their own: half of
them with one Idempotency-Key for all copies, as honest clients do that retry too eagerly; half without, as thieves do.
Meanwhile a worker is killed every two seconds, one is stopped for five seconds, and now and then the whole group is killed. An
honest client may lose an answer, but never its session. The control forgets to look at the generation.
"""

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from experiments.client import Answer
from experiments.ground import Experiment, Ground, Site, Verdict, bounded, dice, signal_process
from experiments.history import UNKNOWN

_CLIENTS = 8
_WORKERS = 3
_PAUSE = 5.0
_PACE = 0.1
"""Seconds between two tries of who is told to come back."""


class Speaker(Protocol):
    """Who speaks for a client: to one server, or to any node."""

    async def log_in(self, key: str) -> Answer | None:
        """Log in; ``None`` if no answer came."""
        ...

    async def refresh(self, token: str, retry: str | None = None) -> Answer | None:
        """Refresh, with an Idempotency-Key if ``retry`` is one."""
        ...

    def close(self) -> None:
        """Hang up."""
        ...


class Place(Protocol):
    """Where clients go: one server, or several."""

    def caller(self) -> Speaker:
        """Who speaks for a client."""
        ...

    async def send(self, action: Callable[[], Awaitable[Answer | None]]) -> Answer | None:
        """What comes of a request that is sent as soon as somebody listens; ``None`` if no answer came."""
        ...


class Client:
    """Keeps one session going for as long as it can."""

    def __init__(self, site: Place, key: str, chance: random.Random, *, honest: bool) -> None:
        self._site = site
        self._key = key
        self._chance = chance
        self.honest = honest
        self._caller = site.caller()
        self.token: str | None = None
        self.sessions: list[list[str]] = []
        """The tokens of each session, the present one last."""

    async def go_on(self, over: asyncio.Event) -> None:
        """Log in where needed and refresh, until told to stop."""
        try:
            while not over.is_set():
                if self.token is None:
                    self.token = _token_of(await self._site.send(lambda: self._caller.log_in(self._key)))
                    if self.token is None:
                        await asyncio.sleep(_PACE)
                    else:
                        self.sessions.append([])
                else:
                    self.sessions[-1].append(self.token)
                    self.token = await (self._retry(self.token) if self.honest else self._steal(self.token))
        finally:
            self._caller.close()

    async def _retry(self, token: str) -> str | None:
        """Send copies that carry one Idempotency-Key, and again until one of them is answered."""
        retry = f"retry-{self._chance.getrandbits(64):x}"
        while True:
            answers = await self._copies(token, [retry] * self._chance.randint(2, 4))
            if any(answer is not None and answer.status != 503 for answer in answers):
                return next((found for found in map(_token_of, answers) if found), None)
            await asyncio.sleep(_PACE)

    async def _steal(self, token: str) -> str | None:
        """Send copies that nobody can tell from a thief's."""
        keys = [None, None, *(self._chance.choice([None, "own", "other"]) for _ in range(self._chance.randint(0, 2)))]
        answers = await self._copies(token, keys)
        return next((found for found in map(_token_of, answers) if found), None)

    async def _copies(self, token: str, retries: "list[str | None]") -> list[Answer | None]:
        async def copy(retry: str | None) -> Answer | None:
            return await self._site.send(lambda: self._caller.refresh(token, retry))

        # All of them are waited for: none may still be under way when the successor is used.
        return await asyncio.gather(*(copy(retry) for retry in retries))


def _token_of(answer: Answer | None) -> str | None:
    return answer.body.get("refreshToken") if answer is not None else None


async def _disturb(site: Site, chance: random.Random, seconds: float) -> str:
    """Kill and stop workers for so long."""
    killed = stopped = groups = 0
    until = time.monotonic() + seconds
    stop_next = time.monotonic() + seconds / 4
    group_next = time.monotonic() + seconds / 2
    while time.monotonic() < until:
        await asyncio.sleep(2)  # the pace of the killing
        if time.monotonic() >= group_next:
            await site.kill()
            await site.start()
            groups, group_next = groups + 1, time.monotonic() + 20
            continue
        workers = site.workers()
        if time.monotonic() >= stop_next and workers:
            victim = chance.choice(workers)
            signal_process(victim, signal.SIGSTOP)
            await asyncio.sleep(_PAUSE)
            signal_process(victim, signal.SIGCONT)
            stopped, stop_next = stopped + 1, time.monotonic() + 25
        elif workers:
            signal_process(chance.choice(workers), signal.SIGKILL)
            killed += 1
    return f"{killed} workers killed, {stopped} stopped for {_PAUSE:.0f} s, {groups} groups killed"


async def _race(site: Site, seconds: float, *, disturbed: bool) -> Verdict:
    await site.start()
    key, chance, over = await asyncio.to_thread(site.partner), dice(), asyncio.Event()
    clients = [Client(site, key, chance, honest=number % 2 == 0) for number in range(_CLIENTS)]
    tasks = [asyncio.create_task(client.go_on(over)) for client in clients]
    if disturbed:
        disturbances = await _disturb(site, chance, seconds)
    else:
        await asyncio.sleep(seconds)
        disturbances = "undisturbed"
    over.set()
    await asyncio.gather(*tasks)
    recovered_at = time.monotonic()
    caller = site.caller()
    for client in clients:
        if client.token is not None:
            await site.send(lambda token=client.token: caller.refresh(token))
    caller.close()
    faults = await asyncio.to_thread(site.judge, recovered_at=recovered_at)
    forced = sum(len(client.sessions) - 1 for client in clients[::2])
    if forced > 0:
        faults.append(f"honest clients had to log in again {forced} times")
    await site.kill()
    operations = site.book.operations
    won = sum(op.op == "refresh" and op.accepted for op in operations)
    reused = sum(op.reuse_verdict for op in operations)
    lost = sum(op.status == UNKNOWN for op in operations)
    busy = sum(op.status == 503 for op in operations)
    return Verdict(f"{won} refreshes won, {reused} reuses refused, {lost} unanswered, {busy} busy; {disturbances}", faults)


def run(ground: Ground) -> Verdict:
    """Race on the product."""
    seconds = ground.scale(120, 5)
    site = ground.site("spending", "--workers", str(_WORKERS))
    return bounded(_race(site, seconds, disturbed=True), seconds=4 * seconds + 120)


def control(ground: Ground) -> Verdict:
    """Race on a server that forgets the generation."""
    return bounded(_race(ground.site("spending-control", variant="forgetful"), 1, disturbed=False), seconds=60)


EXPERIMENT = Experiment(
    name="spending",
    promise="P2: a refresh token is spent at most once, and honest retries never cost a session",
    run=run,
    control=control,
    control_says="a server that forgets to look at the generation",
    finds="spent-once: ",
)
