"""P8: a failover keeps what was acknowledged, and never yields two winners.

Two nodes on a PostgreSQL of three members under Patroni, in synchronous mode. Clients log in, refresh and add companies with
an Idempotency-Key, and log out; what is not decided they ask again at the other node. Meanwhile the leader is, one after the
other, killed (with its Patroni), cut off from everybody, frozen and thawed when another leads, and killed after its standbys
have heard nothing of it for a while. Afterwards everything that was given out and not used is used. No node is started anew.

The control does the last of these to a cluster that does not wait for its standbys.
"""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final, Self
from urllib.parse import urlsplit

from experiments.client import Answer, Book, Caller, Down
from experiments.ground import Experiment, Ground, Verdict, bounded
from experiments.history import UNKNOWN, check
from experiments.servers import Cut, Member, Node, Nodes, PatroniCluster, wait_for

_CLIENTS: Final = 6
_REFRESHES: Final = 3
_PACE: Final = 0.04
"""Seconds between two requests of a client. It is failovers that are looked at, not a load."""
_GRACE: Final = 5.0
"""Seconds after a leader is there by which every node writes again."""
_UNHEARD: Final = 3.0
"""Seconds for which standbys hear nothing of their leader. Shorter than the patience of a commit, and so than a failed one."""

Ask = Callable[[Caller], Awaitable[Answer | None]]


@dataclass(slots=True)
class _Load:
    """What the clients do, and what came of it."""

    key: str
    callers: list[Caller]
    book: Book
    over: bool = False
    faults: list[str] = field(default_factory=list)
    spare_tokens: list[str] = field(default_factory=list)
    """Given out, and not to be used before the end."""
    spare_keys: list[str] = field(default_factory=list)
    numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    @property
    def answered(self) -> int:
        """How many requests were acknowledged."""
        return sum(operation.accepted for operation in self.book.operations)

    async def insist(self, turn: int, ask: Ask) -> Answer:
        """What comes of a request that is repeated at the other node until it is decided."""
        for at in itertools.count(turn):
            try:
                answer = await ask(self.callers[at % len(self.callers)])
            except Down:
                answer = None
            if answer is not None and answer.status != 503:
                return answer
            await asyncio.sleep(_PACE)
        raise AssertionError

    async def client(self, turn: int) -> None:
        """Be a partner until told to stop."""
        while not self.over:
            opened = await self.insist(turn, lambda caller: caller.log_in(self.key))
            token = await self._go_on(turn, str(opened.body.get("refreshToken", "")))
            number = next(self.numbers)
            if token is not None and number % 2:
                await self._leave(turn, token)
            elif token is not None:
                self.spare_tokens.append(token)
            if number % 3 == 0:
                await self._add_company(turn, number)
            turn += 1

    async def _go_on(self, turn: int, token: str) -> str | None:
        for _ in range(_REFRESHES):
            await asyncio.sleep(_PACE)
            retry = f"retry-{next(self.numbers)}"
            answer = await self.insist(turn, lambda caller, token=token, retry=retry: caller.refresh(token, retry))  # type: ignore[misc]
            if answer.status != 200:
                self.faults.append(f"login: an honest client has to log in again ({answer.body.get('code')})")
                return None
            token = str(answer.body["refreshToken"])
        return token

    async def _leave(self, turn: int, token: str) -> None:
        """End a session at one node, and see it ended at the other."""
        await self.insist(turn, lambda caller: caller.log_out(token))
        await self.insist(turn + 1, lambda caller: caller.refresh(token))

    async def _add_company(self, turn: int, number: int) -> None:
        retry = f"company-{number}"
        answer = await self.insist(turn, lambda caller: caller.create_company(self.key, str(number), retry))
        if answer.status == 201:
            self.spare_keys.append(str(answer.body["apiKey"]))
        else:
            self.faults.append(
                f"company: it was refused, and was asked for with one Idempotency-Key ({answer.body.get('code')})"
            )

    async def use_all(self) -> None:
        """Use everything that was kept, each once; from when."""
        for caller in itertools.cycle(self.callers):
            if self.spare_tokens:
                token = self.spare_tokens.pop()
                await self.insist(0, lambda _, caller=caller, token=token: caller.refresh(token))  # type: ignore[misc]
            elif self.spare_keys:
                key = self.spare_keys.pop()
                await self.insist(0, lambda _, caller=caller, key=key: caller.log_in(key))  # type: ignore[misc]
            else:
                return


class _Net:
    """The wires by which nodes reach the members: those of the cluster itself are for its members only."""

    def __init__(self, cluster: PatroniCluster) -> None:
        self._cluster = cluster
        self._wires = {member.name: Cut(member.port) for member in cluster.members}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for wire in self._wires.values():
            wire.close()

    def url(self, database: str) -> str:
        """The address of a database by these wires."""
        address = self._cluster.create(database)
        hosts = ",".join(f"127.0.0.1:{wire.port}" for wire in self._wires.values())
        return address.replace(urlsplit(address).netloc.rpartition("@")[2], hosts)

    def to(self, member: Member) -> Cut:
        """The wire to a member."""
        return self._wires[member.name]


def _kill(member: Member, net: _Net) -> None:
    member.kill()
    net.to(member).look()


def _cut_off(member: Member, net: _Net) -> None:
    member.partition()
    net.to(member).cut()


def _lose_packets(member: Member, net: _Net) -> None:
    member.partition(Cut.freeze)
    net.to(member).freeze()


def _reconnect(member: Member, net: _Net) -> None:
    for wire in (member.line, member.front, member.voice, net.to(member)):
        wire.cut()  # nobody waits for so long: what was held back is not delivered any more
    member.heal()
    net.to(member).heal()


def _kill_unheard(member: Member, net: _Net) -> None:
    """Let nobody hear of what it writes, for a while, and kill it. What was on its way to standbys stays there."""
    member.front.freeze()
    time.sleep(_UNHEARD)  # it is for so long that nobody hears of it
    _kill(member, net)


def _start_anew(member: Member, _: _Net) -> None:
    member.front.cut()
    member.front.heal()
    member.start()


@dataclass(frozen=True, slots=True)
class _Harm:
    """What is done to a leader, and how it comes back once another leads."""

    do: Callable[[Member, _Net], None]
    undo: Callable[[Member, _Net], None]


_HARMS: Final[Mapping[str, _Harm]] = {
    "killed": _Harm(_kill, _start_anew),
    "killed again": _Harm(_kill, _start_anew),
    "cut off": _Harm(_cut_off, _reconnect),
    "unreachable": _Harm(_lose_packets, _reconnect),
    "frozen": _Harm(lambda member, _: member.freeze(), lambda member, _: member.thaw()),
    "unheard": _Harm(_kill_unheard, _start_anew),
}
_QUICK: Final = ("killed", "frozen", "unheard")
_ASYNCHRONOUS: Final = {"synchronous_mode": False, "synchronous_mode_strict": False, "maximum_lag_on_failover": 1 << 30}


class _Run:
    """A cluster, nodes, clients; and what is done to them."""

    def __init__(self, cluster: PatroniCluster, net: _Net, load: _Load, running: "list[Node]") -> None:
        self._cluster = cluster
        self._net = net
        self._load = load
        self._nodes = running
        self.faults: list[str] = []
        self.took: list[str] = []

    def go_through(self, name: str) -> None:
        """One failover, under load before, meanwhile and afterwards."""
        harm, old = _HARMS[name], self._cluster.leader()
        self._let_pass(60)
        done_at = time.monotonic()
        harm.do(old, self._net)
        _, elected = self._cluster.wait_leader(other_than=old, timeout=120)
        led_at = time.monotonic()
        self._let_pass(60)
        harm.undo(old, self._net)
        self._cluster.wait_whole(timeout=180)
        self._let_pass(60)
        self._judge(name, done_at, led_at)
        print(f"    {old.name} was {name}: another leads after {elected:.1f} s, {self.took[-1]}", flush=True)

    def _let_pass(self, count: int) -> None:
        goal = self._load.answered + count
        wait_for(f"{count} requests", lambda: self._load.answered >= goal)

    def _judge(self, name: str, done_at: float, led_at: float) -> None:
        """Whether every node has written again soon enough, and has not stopped since."""
        since = [operation for operation in list(self._load.book.operations) if operation.t0 >= done_at]
        latest = 0.0
        for node in range(len(self._nodes)):
            failed = [operation.t0 - led_at for operation in since if operation.node == f"n{node}" and operation.uncertain]
            accepted = [operation for operation in since if operation.node == f"n{node}" and operation.accepted]
            latest = max([latest, *failed])
            if failed and failed[-1] > _GRACE:
                self.faults.append(f"late: n{node} has failed {failed[-1]:.1f} s after another leader was there ({name})")
            if not any(operation.t0 > led_at for operation in accepted):
                self.faults.append(f"late: n{node} has written nothing since the leader was {name}")
        self.took.append(f"{name} {led_at - done_at:.1f} s + {latest:.1f} s")


async def _fail_over(ground: Ground, name: str, harms: "tuple[str, ...]", *, synchronous: bool) -> Verdict:
    with ExitStack() as stack:
        # As it is shipped; or as many run it, with a standby that may be behind.
        cluster = PatroniCluster(agreed={} if synchronous else _ASYNCHRONOUS)
        await asyncio.to_thread(stack.enter_context, cluster)
        net = stack.enter_context(_Net(cluster))
        nodes = stack.enter_context(Nodes(ground.root / name, net.url("gatelodge")))
        key = (await asyncio.to_thread(nodes.run, "partner", "add", "Acme Motors", "--email", "dev@acme.example"))["apiKey"]
        running = list(await asyncio.to_thread(nodes.start, 2))
        book = Book()
        callers = [Caller(node.port, node.tls(), book, node=f"n{at}") for at, node in enumerate(running)]
        load = _Load(str(key), callers, book)
        run = _Run(cluster, net, load, running)
        clients = [asyncio.create_task(load.client(number)) for number in range(_CLIENTS)]
        for harm in harms:
            await asyncio.to_thread(run.go_through, harm)
        load.over = True
        await asyncio.gather(*clients)
        recovered_at = time.monotonic()
        await load.use_all()
        trail = await asyncio.to_thread(nodes.run, "audit")
        for caller in callers:
            caller.close()
        faults = load.faults + run.faults
        faults += [
            f"node: {node.data.name} has ended" for node in running if node.process is None or node.process.poll() is not None
        ]
    audit = [(event["action"], event["subject"]) for event in trail]
    faults = [str(finding) for finding in check(book.operations, recovered_at=recovered_at, audit=audit)] + faults
    unknown = sum(operation.status == UNKNOWN for operation in book.operations)
    refused = sum(operation.status == 503 for operation in book.operations)
    counts = f"{load.answered} acknowledged, {refused} refused with 503, {unknown} unanswered; elected + again good: "
    return Verdict(counts + ", ".join(run.took), faults)


def run(ground: Ground) -> Verdict:
    """Fail over in every way, on a cluster that waits for its standbys."""
    harms = _QUICK if ground.quick else tuple(_HARMS)
    return bounded(_fail_over(ground, "failover", harms, synchronous=True), seconds=120 + 120 * len(harms))


def control(ground: Ground) -> Verdict:
    """Fail over to a standby that has not heard the last."""
    return bounded(_fail_over(ground, "failover-control", ("unheard",), synchronous=False), seconds=240)


EXPERIMENT = Experiment(
    name="failover",
    promise="P8: a failover keeps every acknowledged write and yields no second winner, without a restart of a node",
    run=run,
    control=control,
    control_says="a cluster that does not wait for its standbys",
    finds="durable: ",
)
