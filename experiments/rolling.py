"""P12: a rolling restart loses no request.

Three nodes on one database stand behind HAProxy, which ends TLS and asks each for its readiness. Clients log in, refresh with
an Idempotency-Key and call the API behind the gate, over connections that they keep, one request after the other, none twice.
Meanwhile each node is told to stop (SIGTERM), ends, and is started again on its port; the next one goes when the proxy has
taken that one back. Whatever is not answered with 200 is a fault. The control kills its nodes, and loses what was under way.
"""

import asyncio
import itertools
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import trustme

from experiments.client import Answer, Down, Link, Lost
from experiments.ground import Experiment, Ground, Verdict, bounded
from experiments.servers import HaProxy, Node, Nodes, postgres_server, wait_for

_NODES: Final = 3
_CLIENTS: Final = 9
_DRAIN: Final = "1s"
"""Ten times what the proxy needs to notice."""
_PLANS: Final = "/api/v2/Partners/PlansSearchAsync/VIN"
_VEHICLE: Final = {"searchCriteria": {"vin": "1HGBH41JXMN109186", "mileage": 55555, "stateShortName": "TX"}}

Stop = Callable[[Node], object]


@dataclass(slots=True)
class _Load:
    """What the clients do, what was answered, and what was not."""

    port: int
    context: ssl.SSLContext
    key: str
    answered: int = 0
    faults: list[str] = field(default_factory=list)
    over: bool = False
    numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    async def client(self) -> None:
        """Be a partner until told to stop: log in, refresh a few times, and call the API all the while."""
        line = _Line(self)
        while not self.over:
            session = await line.ask("login", "/auth/login", {"apiKey": self.key})
            for _ in range(5):
                if session is None:
                    break
                bearer = f"Bearer {session.body['jwt']}"
                for _ in range(3):
                    await line.ask("gated call", _PLANS, _VEHICLE, Authorization=bearer)
                body = {"refreshToken": session.body["refreshToken"]}
                session = await line.ask("refresh", "/auth/refresh", body, Idempotency_Key=f"retry-{next(self.numbers)}")
        line.close()


class _Line:
    """A client's connection, which is kept for as long as it can be."""

    def __init__(self, load: _Load) -> None:
        self._load = load
        self._link: Link | None = None

    async def ask(self, what: str, path: str, body: object, **headers: str) -> Answer | None:
        """Send a request, once. Whatever comes of it but a 200 is a fault."""
        try:
            if self._link is None:
                self._link = await Link.open(self._load.port, self._load.context)
            answer = await self._link.call("POST", path, body, **headers)
        except (Down, Lost) as fault:
            self._link = None
            self._load.faults.append(f"failed: a {what} got no answer ({type(fault).__name__})")
            return None
        if answer.headers.get("connection") == "close":
            self.close()
        if answer.status != 200:
            self._load.faults.append(f"failed: a {what} was answered with {answer.status}")
            return None
        self._load.answered += 1
        return answer

    def close(self) -> None:
        """Hang up."""
        if self._link is not None:
            self._link.close()
            self._link = None


def _restart(node: Node, name: str, proxy: HaProxy, load: _Load, stop: Stop) -> None:
    """Stop one node and start it again, under load before, meanwhile and afterwards."""
    ups, downs = (proxy.log().count(f"Server nodes/{name} is {word}") for word in ("UP", "DOWN"))
    _let_pass(load, 50)
    stop(node)
    wait_for(f"{name} is missed", lambda: proxy.log().count(f"Server nodes/{name} is DOWN") > downs)
    _let_pass(load, 50)
    node.start()
    wait_for(f"{name} is taken back", lambda: proxy.log().count(f"Server nodes/{name} is UP") > ups)


def _let_pass(load: _Load, count: int) -> None:
    goal = load.answered + count
    wait_for(f"{count} requests", lambda: load.answered >= goal)


async def _roll(ground: Ground, name: str, rounds: int, stop: Stop) -> Verdict:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    root = ground.root / name
    root.mkdir()
    chain, key = root / "chain.pem", root / "key.pem"
    issued.cert_chain_pems[0].write_to_path(chain)
    issued.private_key_pem.write_to_path(key)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with postgres_server() as database, Nodes(root, database.create("gatelodge"), environ={"GATELODGE_DRAIN": _DRAIN}) as nodes:
        nodes.run("tier", "set", "starter", "--per-hour", "10000000", "--per-day", "100000000")
        api_key = nodes.run("partner", "add", "Acme Motors", "--email", "dev@acme.example")["apiKey"]
        running = await asyncio.to_thread(nodes.start, _NODES, "--sample-api", "--behind-proxy", "127.0.0.0/8")
        with HaProxy([node.backend for node in running], certificate=chain, key=key) as proxy:
            load = _Load(proxy.port, context, str(api_key))
            clients = [asyncio.create_task(load.client()) for _ in range(_CLIENTS)]
            for _ in range(rounds):
                for number, node in enumerate(running):
                    await asyncio.to_thread(_restart, node, f"n{number}", proxy, load, stop)
            load.over = True
            await asyncio.gather(*clients)
    return Verdict(f"{rounds * _NODES} restarts, {load.answered} answered, {len(load.faults)} failed requests", load.faults)


def run(ground: Ground) -> Verdict:
    """Restart them as an operator does."""
    rounds = ground.scale(5, 1)
    return bounded(_roll(ground, "rolling", rounds, Node.stop), seconds=120 + 60 * rounds)


def control(ground: Ground) -> Verdict:
    """Kill them."""
    return bounded(_roll(ground, "rolling-control", 1, Node.kill), seconds=180)


EXPERIMENT = Experiment(
    name="rolling",
    promise="P12: a rolling restart of three nodes loses no request",
    run=run,
    control=control,
    control_says="nodes that are killed",
    finds="failed: ",
)
