"""Nodes that count requests: several over one store, each with clocks of its own, and a line that can be cut."""

import asyncio
from dataclasses import dataclass, field

from given import Clock

from gatelodge.errors import QuotaExceeded, Unavailable
from gatelodge_server.core.ports import UNHEARD
from gatelodge_server.core.quotas import IDLE, Quotas, QuotaStatus

ACME = "acme-motors"
MOMENT = 0.001
"""Seconds."""


class Line:
    """A node's line to the store. It can be cut on the way there or on the way back, or be slow."""

    def __init__(self, store):
        self._store = store
        self.cut = None
        self.asks = []
        self.asked = []
        self.under_way = self.most_under_way = self.answered = 0
        self.slow = None

    def __getattr__(self, verb):
        ask = getattr(self._store, verb)

        async def over_the_line(*args, **kwargs):
            self.asked.append(verb)
            if verb == "lease_quota":
                self.asks.append(args[0])
            if self.cut == "there":
                raise Unavailable
            if self.cut == "mistaken":
                raise ZeroDivisionError
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
            answer = await ask(*args, **kwargs)
            self.answered += 1
            if self.slow is not None:
                await self.slow.wait()
            self.under_way -= 1
            if self.cut == "back" and verb == "lease_quota":
                return UNHEARD
            if self.cut == "back":
                raise Unavailable
            return answer

        return over_the_line


@dataclass
class Node:
    line: Line
    quotas: Quotas
    clock: Clock
    monotonic: Clock
    mistakes: list = field(default_factory=list)

    async def try_one(self, partner_id=ACME):
        try:
            return await self.quotas.count(partner_id, self.clock())
        except (QuotaExceeded, Unavailable) as refused:
            return refused

    async def let_in(self, times, partner_id=ACME):
        """How many of so many requests at once are let in."""
        return len(accepted(await asyncio.gather(*(self.try_one(partner_id) for _ in range(times)))))

    async def be_idle(self):
        await self.quotas.go_round()
        self.monotonic.forward(IDLE)
        await self.quotas.go_round()


def accepted(outcomes):
    return [outcome for outcome in outcomes if isinstance(outcome, QuotaStatus)]


def held(node, partner_id=ACME):
    """What a node has leased and not used."""
    book = node.quotas._books.get(partner_id)
    return book.left if book is not None else 0


def a_node(store, clock=None):
    """A node. It shares the store with the others, and the clock if it is given one."""
    line, clock, monotonic, mistakes = Line(store), clock or Clock(), Clock(0.0), []
    quotas = Quotas(store=line, clock=clock, monotonic=monotonic, on_mistake=mistakes.append)
    return Node(line, quotas, clock, monotonic, mistakes)
