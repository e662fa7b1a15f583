"""P7: while its database is away the service refuses, and when that is back it is back too.

Two nodes on one PostgreSQL: one is the product; the other has no turnstile, so that whoever its gate knows is let in. Clients
log in, refresh with an Idempotency-Key and make gated calls with API keys, at a fixed pace. PostgreSQL is stopped for half a
minute and started, then frozen for half a minute and thawed.

Just before, while the other node can hear nothing (its wire is frozen), a company's key is rotated at the first node; the old
key is then presented at both, all the time. What is looked at:

- every answer during the outage is a 503 with Retry-After, or lets in a credential that the node remembers, and that no longer
  than the maximum staleness; the rotated key is never let in by the node that rotated it, nor by the other after that;
- the slowest answer but one in a hundred is given within the driver's patience;
- five seconds after the end of the outage as much is answered as before, and no node has been restarted or has grown;
- nothing that was acknowledged is lost: the checker decides.

The control takes no answer for no news, and goes on believing what it remembers.
"""

import asyncio
import functools
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

import psutil

from experiments.client import Answer, Caller, Down, Link, Lost
from experiments.fleet import Fleet, fleet_on, in_parallel
from experiments.ground import Experiment, Ground, Verdict, bounded
from experiments.servers import Cut, Node
from experiments.variants import program
from gatelodge_server.core.following import MAX_STALENESS
from gatelodge_server.store.postgres import PATIENCE

_PLANS: Final = "/api/v2/Partners/PlansSearchAsync/VIN"
_VEHICLE: Final = {"searchCriteria": {"vin": "1HGBH41JXMN109186", "mileage": 55555, "stateShortName": "TX"}}
_TICK: Final = 0.2
"""Seconds between two requests of a client."""
_CLIENTS: Final = 4
"""At each node: so many log in, so many refresh, so many call."""
_MARGIN: Final = 1.0
"""Seconds by which an answer may come later than the driver gives up, on a machine that has much to do."""
_SETTLED: Final = 5.0
"""Seconds after the end of an outage from which everything is as before."""
_WATCHED: Final = 5.0
"""Seconds for which the speed is measured, before and afterwards."""
_FULL: Final = 0.9
_GROWTH: Final = 64
"""MiB by which a node may grow from the first outage to the end of the last."""
_SLOW: Final = 300.0
"""Seconds that starts may take on a machine that has other things to do."""

Harm = Literal["stopped", "frozen"]


class Seen(NamedTuple):
    """A request as its client saw it. Status 0: no answer came."""

    node: str
    what: str
    t0: float
    t1: float
    status: int
    has_retry_after: bool

    def __str__(self) -> str:
        return f"a {self.what} at {self.node}"


@dataclass(slots=True)
class _Load:
    """What is asked of the nodes, and what comes of it."""

    fleet: Fleet
    partner: str
    key: str
    """Of a company that nothing happens to."""
    doomed: str
    """Of a company whose key is rotated just before an outage."""
    seen: list[Seen] = field(default_factory=list)
    over: bool = False
    numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))
    tokens: list[str] = field(default_factory=list)
    """Given out, and not used."""

    def clients(self) -> list["asyncio.Task[None]"]:
        """All who ask, begun."""
        works: list[Callable[[Node], Awaitable[None]]] = [self._log_in, self._refresh, self._call, self._present]
        counts = (_CLIENTS, _CLIENTS, _CLIENTS, 1)
        return [
            asyncio.create_task(work(node))
            for node in self.fleet.up
            for work, count in zip(works, counts, strict=True)
            for _ in range(count)
        ]

    async def _pace(self) -> AsyncIterator[None]:
        due = time.monotonic() + self.fleet.chance.random() * _TICK
        while not self.over:
            await asyncio.sleep(max(0.0, due - time.monotonic()))  # the pace of a client
            due = max(due + _TICK, time.monotonic())
            yield

    async def _log_in(self, node: Node) -> None:
        caller = self._caller(node)
        async for _ in self._pace():
            answer = await self._told(node, "login", functools.partial(caller.log_in, self.partner))
            if answer is not None and answer.status == 200:
                self.tokens.append(answer.body["refreshToken"])
        caller.close()

    async def _refresh(self, node: Node) -> None:
        caller = self._caller(node)
        token, retry = "", ""
        async for _ in self._pace():
            if not token:
                answer = await self._told(node, "login", functools.partial(caller.log_in, self.partner))
            else:
                answer = await self._told(node, "refresh", functools.partial(caller.refresh, token, retry))
            if answer is not None and answer.status == 200:
                token, retry = answer.body["refreshToken"], f"retry-{next(self.numbers)}"
            elif answer is not None and answer.status != 503:
                token = ""  # the checker says whether that was right
        self.tokens += [token] * bool(token)
        caller.close()

    async def _call(self, node: Node) -> None:
        await self._use(node, "call", lambda: self.key)

    async def _present(self, node: Node) -> None:
        await self._use(node, "doomed", lambda: self.doomed)

    async def _use(self, node: Node, what: str, key: Callable[[], str]) -> None:
        link: Link | None = None
        async for _ in self._pace():
            t0 = time.monotonic()
            try:
                link = link or await Link.open(node.port, node.tls())
                answer = await link.call("POST", _PLANS, _VEHICLE, Authorization=f"Bearer {key()}")
                self._note(node, what, t0, answer)
            except (Down, Lost):
                link = None
                self._note(node, what, t0, None)
        if link is not None:
            link.close()

    async def _told(self, node: Node, what: str, action: Callable[[], Awaitable[Answer | None]]) -> Answer | None:
        t0 = time.monotonic()
        try:
            answer = await action()
        except Down:
            answer = None
        self._note(node, what, t0, answer)
        return answer

    def _note(self, node: Node, what: str, t0: float, answer: Answer | None) -> None:
        status, comes_again = (0, False) if answer is None else (answer.status, "retry-after" in answer.headers)
        self.seen.append(Seen(_name(self.fleet, node), what, t0, time.monotonic(), status, comes_again))

    def _caller(self, node: Node) -> Caller:
        return Caller(node.port, node.tls(), self.fleet.book, node=_name(self.fleet, node))

    def answered(self, begin: float, end: float) -> int:
        """How many requests were answered with a 200 in a span of time, but for those with the rotated key."""
        return sum(begin <= one.t1 < end and one.status == 200 for one in self.seen if one.what != "doomed")


def _name(fleet: Fleet, node: Node) -> str:
    return f"n{fleet.nodes.all.index(node)}"


@dataclass(slots=True)
class _Outage:
    """One outage, and when what happened in it. All by the monotonic clock."""

    harm: Harm
    revoked_at: float
    begun: float
    ended: float
    """When the database was told to come back,"""
    back_at: float
    """and when it had."""


async def _break(load: _Load, wire: Cut, company: str, harm: Harm, seconds: float) -> tuple[_Outage, str]:
    """Rotate a key where only the first node hears of it, take the database away, and give it back. With the new key."""
    fleet, server = load.fleet, load.fleet.server
    caller = Caller(fleet.up[0].port, fleet.up[0].tls(), fleet.book, node="n0")
    await asyncio.to_thread(wire.freeze)
    answer = await caller.rotate_company(load.partner, company, load.doomed)
    assert answer is not None, "no answer to the rotation"
    assert answer.status == 200, answer.body
    revoked_at = time.monotonic()
    caller.close()
    await asyncio.to_thread(server.stop if harm == "stopped" else server.freeze)
    begun = time.monotonic()
    if harm == "stopped":
        await asyncio.to_thread(wire.heal)  # so that the other node sees it too; one that is frozen tells nobody
    await asyncio.sleep(seconds)  # the outage
    ended = time.monotonic()
    await asyncio.to_thread(wire.heal)
    await asyncio.to_thread(server.start if harm == "stopped" else server.thaw)
    return _Outage(harm, revoked_at, begun, ended, time.monotonic()), str(answer.body["apiKey"])


def _judge(load: _Load, outage: _Outage, before: int) -> Verdict:
    """What was counted of one outage, and what speaks against the promise."""
    during = [one for one in load.seen if outage.begun < one.t0 < outage.ended]
    answered = [one for one in during if one.t1 < outage.ended]
    faults = [fault for one in answered for fault in _faults_of(one, one.t0 - outage.begun)]
    faults += [
        f"believed: the rotated key was let in by {one.node} {one.t0 - outage.revoked_at:.1f} s after its end was acknowledged"
        for one in load.seen
        if one.what == "doomed" and one.status == 200 and one.t0 > outage.revoked_at + (one.node != "n0") * MAX_STALENESS
    ]
    taken = sorted(one.t1 - one.t0 for one in during)
    p99 = taken[int(len(taken) * 0.99)]
    if p99 > PATIENCE + _MARGIN:
        faults.append(f"slow: one answer in a hundred took longer than {p99:.1f} s")
    settled = outage.back_at + _SETTLED
    after = load.answered(settled, settled + _WATCHED)
    if after < _FULL * before:
        faults.append(f"speed: {after} answers in {_WATCHED:.0f} s, and {before} before the outage")
    first = min((one.t1 - outage.back_at for one in load.seen if _wrote(one) and one.t1 > outage.ended), default=float("inf"))
    let_in = [one.t0 - outage.begun for one in answered if one.status == 200]
    return Verdict(
        f"{outage.harm}: {len(answered)} answers, {len(let_in)} from memory until {max(let_in, default=0):.1f} s, "
        f"p99 {p99:.2f} s, slowest {taken[-1]:.1f} s, back after {first:.1f} s, {after} answers where there were {before}",
        faults,
    )


def _faults_of(one: Seen, after: float) -> list[str]:
    """What is wrong with an answer that was given so many seconds after an outage began, and before it ended."""
    if one.status == 503:
        return [] if one.has_retry_after else [f"answer: {one} got a 503 that does not say when to come back"]
    if one.status == 200 and not _wrote(one):
        return [f"believed: {one} was let in {after:.1f} s after the outage began"] if after > MAX_STALENESS else []
    if one.status == 401 and one.what == "doomed":
        return []
    return [f"answer: {one} was answered with {one.status}"]


def _wrote(one: Seen) -> bool:
    return one.status == 200 and one.what in {"login", "refresh"}


async def _go_through(ground: Ground, name: str, harms: Sequence[Harm], seconds: float, *, other: str) -> Verdict:
    environ = {"GATELODGE_SAMPLE_API": "on"}
    with fleet_on(ground, name, environ=environ) as fleet, Cut(fleet.server.port) as wire:
        nodes, server = fleet.nodes, fleet.server
        nodes.run("tier", "set", "starter", "--per-hour", "10000000", "--per-day", "100000000")
        partner = await asyncio.to_thread(fleet.partner)
        await fleet.revive(nodes.add())
        around = server.url("gatelodge").replace(f":{server.port}/", f":{wire.port}/")
        await fleet.revive(nodes.add(database=around, program=program(other)))
        return await _watch(fleet, partner, wire, harms, seconds)


async def _watch(fleet: Fleet, partner: str, wire: Cut, harms: Sequence[Harm], seconds: float) -> Verdict:
    node = fleet.up[0]
    caller = Caller(node.port, node.tls(), fleet.book, node="n0")
    companies = [await caller.create_company(partner, f"DE{number:09}") for number in range(1 + len(harms))]
    caller.close()
    made = [(str(answer.body["companyId"]), str(answer.body["apiKey"])) for answer in companies if answer is not None]
    load = _Load(fleet, partner, key=made[0][1], doomed=made[1][1])
    clients = load.clients()
    verdicts, sizes, keys = list[Verdict](), list[list[int]](), [load.key]
    for harm, (company, load.doomed) in zip(harms, made[1:], strict=True):
        await asyncio.sleep(_SETTLED + _WATCHED)
        before = load.answered(time.monotonic() - _WATCHED, time.monotonic())
        sizes.append(_sizes(fleet))
        outage, key = await _break(load, wire, company, harm, seconds)
        keys.append(key)
        await asyncio.sleep(_SETTLED + _WATCHED)
        sizes.append(_sizes(fleet))
        verdicts.append(_judge(load, outage, before))
    load.over = True
    await asyncio.gather(*clients)
    faults = [fault for verdict in verdicts for fault in verdict.faults]
    if any(last - first > _GROWTH for first, last in zip(sizes[0], sizes[-1], strict=True)):
        faults.append(f"size: the nodes have grown from {sizes[0]} to {sizes[-1]} MiB")
    recovered_at = time.monotonic()
    caller = fleet.caller()
    works = [functools.partial(fleet.insist, functools.partial(caller.refresh, token)) for token in load.tokens]
    works += [functools.partial(fleet.insist, functools.partial(caller.log_in, key)) for key in keys]
    await in_parallel(works, 2 * _CLIENTS)
    caller.close()
    faults += await asyncio.to_thread(functools.partial(fleet.judge, recovered_at=recovered_at))
    counts = [
        *(verdict.counts for verdict in verdicts),
        f"nodes of {sizes[0]} MiB, then {sizes[-1]}",
        f"{len(load.tokens)} kept",
    ]
    return Verdict("; ".join(counts), faults)


def _sizes(fleet: Fleet) -> list[int]:
    """What each node takes of the memory, in MiB."""
    return [psutil.Process(node.pid).memory_info().rss >> 20 for node in fleet.up]


def run(ground: Ground) -> Verdict:
    """Take the database away from the product."""
    seconds = ground.scale(30, 14)
    return bounded(
        _go_through(ground, "outage", ("stopped", "frozen"), seconds, other="uncounted"), seconds=2 * seconds + _SLOW
    )


def control(ground: Ground) -> Verdict:
    """Take the database away from a node that takes no answer for no news."""
    return bounded(_go_through(ground, "outage-control", ("stopped",), 14, other="no-news"), seconds=_SLOW)


EXPERIMENT: Final = Experiment(
    name="outage",
    promise="P7: without its database the service refuses, lets nobody in who has been shut out, and comes back by itself",
    run=run,
    control=control,
    control_says="a node that takes no answer for no news",
    finds="believed: ",
)
