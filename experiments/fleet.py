"""Nodes on one PostgreSQL as clients see them: somebody answers, and who that is does not matter to them."""

import asyncio
import contextlib
import random
import shutil
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from experiments.client import Answer, Book, Caller, Down
from experiments.ground import Ground, dice
from experiments.history import check
from experiments.servers import Node, Nodes, PostgresServer, postgres_server

_PACE: Final = 0.01
_STARTS: Final = 60
_BETWEEN_STARTS: Final = 0.5
_NONE: Final[Mapping[str, str]] = MappingProxyType({})


class Fleet:
    """Nodes, their database, the book in which their clients write, and who can be reached at the moment."""

    def __init__(self, nodes: Nodes, server: PostgresServer, chance: random.Random) -> None:
        self.nodes = nodes
        self.server = server
        self.book = Book()
        self.chance = chance
        self.up: list[Node] = []
        self._somebody = asyncio.Event()

    async def start(self, count: int) -> None:
        """Add nodes and start them, one after the other."""
        for _ in range(count):
            await self.revive(self.nodes.add())

    async def revive(self, node: Node) -> None:
        """Start a node. One that finds no database says so and ends, and is started again, as by any supervisor."""
        for _ in range(_STARTS):
            try:
                await asyncio.to_thread(node.start)
                break
            except AssertionError as fault:
                if "cannot be used" not in str(fault):
                    raise
            await asyncio.sleep(_BETWEEN_STARTS)
        else:
            raise AssertionError(f"a node does not start: {node.log_path.read_text(errors='replace')[-2000:]}")
        self.up.append(node)
        self._somebody.set()

    async def kill(self, node: Node) -> None:
        """SIGKILL for a node and its workers."""
        self.up.remove(node)
        if not self.up:
            self._somebody.clear()
        await asyncio.to_thread(node.kill)

    async def kill_all(self) -> None:
        """SIGKILL for every node that is up."""
        for node in list(self.up):
            await self.kill(node)

    def partner(self, name: str = "Acme Motors") -> str:
        """Add a partner by the command line; its API key."""
        key = str(self.nodes.run("partner", "add", name, "--email", "dev@acme.example")["apiKey"])
        self.book.secrets.add(key)
        return key

    def caller(self) -> "Roamer":
        """A client that goes to any node."""
        return Roamer(self)

    async def send(self, action: Callable[[], Awaitable[Answer | None]]) -> Answer | None:
        """What comes of a request that is sent as soon as somebody listens; ``None`` if no answer came."""
        while True:
            await self._somebody.wait()
            try:
                return await action()
            except Down:
                await asyncio.sleep(_PACE)  # a pace, not a wait for anything

    async def insist(self, action: Callable[[], Awaitable[Answer | None]]) -> Answer | None:
        """What comes of a request that is repeated for as long as it is told to come back; ``None`` if no answer came."""
        while True:
            answer = await self.send(action)
            if answer is None or answer.status != 503:
                return answer
            await asyncio.sleep(10 * _PACE)

    def audit(self) -> list[tuple[str, str]]:
        """The audit trail: actions and subjects."""
        return [(event["action"], event["subject"]) for event in self.nodes.run("audit")]

    def judge(self, *, recovered_at: float) -> list[str]:
        """Every rule that the book says was broken."""
        return [str(finding) for finding in check(self.book.operations, recovered_at=recovered_at, audit=self.audit())]


@contextlib.contextmanager
def fleet_on(ground: Ground, name: str, *, settings: Mapping[str, str] = _NONE, **nodes: Any) -> Iterator[Fleet]:
    """A fleet without nodes, on a PostgreSQL of its own. What that leaves behind is kept for the search for secrets."""
    with postgres_server(settings=settings) as server:
        with Nodes(ground.root / name, server.create("gatelodge"), **nodes) as all_:
            fleet = Fleet(all_, server, dice())
            ground.books.append(fleet.book)
            yield fleet
        server.stop()
        shutil.copytree(server.root, ground.root / name / "postgres")


class Roamer:
    """A client that sends each request to one of the nodes that are up, drawn by lot, over connections that it keeps."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._callers: dict[Node, Caller] = {}

    async def log_in(self, key: str) -> Answer | None:
        """Log in; ``None`` if no answer came. Raises ``Down``."""
        return await self._anybody().log_in(key)

    async def refresh(self, token: str, retry: str | None = None) -> Answer | None:
        """Refresh, with an Idempotency-Key if ``retry`` is one."""
        return await self._anybody().refresh(token, retry)

    def close(self) -> None:
        """Hang up everywhere."""
        for caller in self._callers.values():
            caller.close()

    def _anybody(self) -> Caller:
        if not self._fleet.up:
            raise Down
        return self.at(self._fleet.chance.choice(self._fleet.up))

    def at(self, node: Node) -> Caller:
        """The same client at a node that is named."""
        if node not in self._callers:
            name = f"n{self._fleet.nodes.all.index(node)}"
            self._callers[node] = Caller(node.port, node.tls(), self._fleet.book, node=name)
        return self._callers[node]


def counts_of(book: Book) -> str:
    """What a book holds, in a line."""
    operations = book.operations
    won = sum(op.op == "refresh" and op.accepted for op in operations)
    reused = sum(op.reuse_verdict for op in operations)
    lost = sum(op.status == "unknown" for op in operations)
    busy = sum(op.status == 503 for op in operations)
    return f"{won} refreshes won, {reused} reuses refused, {lost} unanswered, {busy} busy"


async def in_parallel(works: Sequence[Callable[[], Awaitable[object]]], width: int) -> None:
    """Do them all, so many at a time."""
    left = iter(works)

    async def go() -> None:
        for work in left:
            await work()

    await asyncio.gather(*(go() for _ in range(width)))
