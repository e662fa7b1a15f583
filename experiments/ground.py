"""The ground that experiments stand on: their directory, the servers that they start, and what they report."""

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeAlias

import psutil
from tests.harness import PROGRAM, Server, ask

from experiments.client import Answer, Book, Caller, Down
from experiments.history import check
from experiments.variants import program

__all__ = ["Experiment", "Ground", "Site", "Verdict"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a run: what was counted, and every sentence that speaks against the promise."""

    counts: str
    faults: Sequence[str] = ()

    @property
    def holds(self) -> bool:
        """Whether the promise was kept."""
        return not self.faults


@dataclass(slots=True)
class Ground:
    """One run of experiments. Everything that servers leave behind stays under ``root`` until the end."""

    root: Path
    quick: bool
    sites: "list[Site]" = field(default_factory=list)
    books: list[Book] = field(default_factory=list)
    """Of clients of nodes that are no site. What these leave behind is under ``root`` too."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for site in self.sites:
            if site.server.process is not None:
                site.server.kill()

    def site(
        self,
        name: str,
        *args: str,
        variant: str | None = None,
        prefix: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
    ) -> "Site":
        """A place for one server, the product's own or a variant of it. The same name is the same directory."""
        command = PROGRAM if variant is None else program(variant)
        server = Server(self.root / name / "data", *args, prefix=prefix, program=command, environ=environ)
        self.sites.append(Site(server, Book()))
        return self.sites[-1]

    def scale(self, full: int, quick: int) -> int:
        """How many, in this run."""
        return quick if self.quick else full


Work: TypeAlias = Callable[[Ground], Verdict]


@dataclass(frozen=True, slots=True)
class Experiment:
    """A promise, how it is proven, and the same run on something broken, which must fail."""

    name: str
    promise: str
    run: Work
    control: Work
    control_says: str
    """What the control runs on."""
    finds: str | tuple[str, ...]
    """How a fault begins that the control must have, so that it fails for its own reason and not for another."""

    def control_fails(self, verdict: Verdict) -> bool:
        """Whether the control's verdict is the one that it is there for."""
        return any(fault.startswith(self.finds) for fault in verdict.faults)


class Site:
    """A server, the book in which its clients write, and whether it can be reached at the moment."""

    def __init__(self, server: Server, book: Book) -> None:
        self.server = server
        self.book = book
        self.up = asyncio.Event()

    async def start(self, *args: str) -> None:
        """Start the server on its old data and port, and let the clients at it. ``args`` are for this start only."""
        await asyncio.to_thread(self.server.start, *args)
        self.up.set()

    async def kill(self) -> None:
        """SIGKILL for the whole group."""
        self.up.clear()
        await asyncio.to_thread(self.server.kill)

    def partner(self, name: str = "Acme Motors") -> str:
        """Add a partner by the command line; its API key."""
        key = str(ask("partner", "add", name, "--email", "dev@acme.example", data=self.server.data)["apiKey"])
        self.book.secrets.add(key)
        return key

    def caller(self, node: str = "") -> Caller:
        """A client. The server has been started once, so that its certificate is there."""
        return Caller(self.server.port, self.server.tls(), self.book, node=node)

    async def send(self, action: Callable[[], Awaitable[Answer | None]]) -> Answer | None:
        """What comes of a request that is sent as soon as somebody listens; ``None`` if no answer came."""
        while True:
            await self.up.wait()
            try:
                return await action()
            except Down:
                await asyncio.sleep(0.01)  # a pace, not a wait for anything: ``up`` is what is waited for

    async def insist(self, action: Callable[[], Awaitable[Answer | None]]) -> Answer:
        """What comes of a request that is repeated until it is decided. For those that carry an Idempotency-Key."""
        while True:
            answer = await self.send(action)
            if answer is not None and answer.status != 503:
                return answer

    def audit(self) -> list[tuple[str, str]]:
        """The audit trail: actions and subjects."""
        return [(event["action"], event["subject"]) for event in ask("audit", data=self.server.data)]

    def judge(self, *, recovered_at: float | None = None, audited: bool = True) -> list[str]:
        """Every rule that the book says was broken."""
        audit = self.audit() if audited else None
        return [str(finding) for finding in check(self.book.operations, recovered_at=recovered_at, audit=audit)]

    def workers(self) -> list[psutil.Process]:
        """The processes that serve, of a server that has several."""
        assert self.server.process is not None
        children = psutil.Process(self.server.process.pid).children()
        return [child for child in children if "--multiprocessing-fork" in _arguments_of(child)]


def _arguments_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def signal_process(process: psutil.Process, sign: signal.Signals) -> None:
    """Send a signal to a process of ours that may be gone already."""
    try:
        process.send_signal(sign)
    except psutil.NoSuchProcess:
        return


def dice() -> random.Random:
    """Chance, differently in every run."""
    return random.Random(os.urandom(8))


def bounded(work: Coroutine[Any, Any, Verdict], seconds: float) -> Verdict:
    """Run an experiment that must be over by then."""

    async def run() -> Verdict:
        async with asyncio.timeout(seconds):
            return await work

    return asyncio.run(run())
