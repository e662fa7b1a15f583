"""What experiments on revocation share: nodes and offline verifiers, credentials to be revoked, and who still lets them in.

A `Victim` is something that can be revoked, with all the credentials that die with it. A `Door` is whoever lets credentials
in: a node (``NodeDoor``, whose sample API is called) or an outsider. `Scene` puts them together; ``watch`` asks a door every
20 ms until it refuses.
"""

import asyncio
import base64
import itertools
import json
import os
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from experiments.client import Answer, Down, Link, Lost, key_id
from experiments.ground import dice
from experiments.outsider import ACCEPTED, Outsider
from experiments.servers import Node, Nodes
from gatelodge_server.app import Lodge, assemble
from gatelodge_server.core.partners import NewPartner
from gatelodge_server.deployment import MASTER_KEY_VARIABLE, load_master_keys
from gatelodge_server.settings import load_settings
from gatelodge_server.vault import Vault, system_entropy

ISSUER: Final = "https://localhost:8443"
PACE: Final = 0.02
"""Seconds between two questions at one door."""
BY: Final = "experiment"
UNDECIDED: Final = "undecided"
"""Neither let in nor refused for what it is: 503, or no answer."""
_PLANS: Final = "/api/v2/Partners/PlansSearchAsync/VIN"
_VEHICLE: Final = {"searchCriteria": {"vin": "1HGBH41JXMN109186", "mileage": 55555, "stateShortName": "TX"}}
_PATIENCE: Final = 30.0
_IDLE_MAX: Final = 45.0
"""Seconds for which a connection is kept: a node keeps it for longer."""
_UNDECIDED: Final = frozenset({"revocations_unavailable", "keys_unavailable", "unavailable"})


class Door(Protocol):
    """Whoever lets credentials in."""

    name: str

    async def ask(self, credential: str) -> str:
        """``ACCEPTED``, ``UNDECIDED``, or the code of a refusal."""
        ...


class NodeDoor:
    """A node: its sample API is called over connections that are kept."""

    def __init__(self, name: str, node: Node) -> None:
        self.name = name
        self.node = node
        self._context: ssl.SSLContext = node.tls()
        self._idle: list[tuple[Link, float]] = []

    async def ask(self, credential: str) -> str:
        """Call the API behind the gate."""
        try:
            answer = await self.call("POST", _PLANS, _VEHICLE, credential=credential)
        except (Down, Lost):
            return UNDECIDED
        if answer.status == 200:
            return ACCEPTED
        return UNDECIDED if answer.status == 503 else str(answer.body["code"])

    async def call(self, method: str, path: str, body: object = None, *, credential: str | None = None) -> Answer:
        """Send a request. Raises ``Down`` or ``Lost``."""
        link = self._kept() or await Link.open(self.node.port, self._context)
        more = {"Authorization": f"Bearer {credential}"} if credential is not None else {}
        answer = await link.call(method, path, body, **more)
        if answer.headers.get("connection") == "close":
            link.close()
        else:
            self._idle.append((link, time.monotonic()))
        return answer

    def _kept(self) -> Link | None:
        """The connection that was used last, unless the node may be about to hang up: then so were all others before."""
        if self._idle and self._idle[-1][1] > time.monotonic() - _IDLE_MAX:
            return self._idle.pop()[0]
        self.close()
        return None

    def close(self) -> None:
        """Hang up."""
        for link, _ in self._idle:
            link.close()
        self._idle.clear()


class OutsiderDoor:
    """An offline verifier. It knows session JWTs only."""

    def __init__(self, name: str, outsider: Outsider) -> None:
        self.name = name
        self.outsider = outsider

    async def ask(self, credential: str) -> str:
        """Have it verify a JWT."""
        said = await self.outsider.ask(credential)
        return UNDECIDED if said in _UNDECIDED else said


@dataclass(slots=True)
class Victim:
    """Something that can be revoked."""

    kind: str
    code: str
    """What its credentials are refused with afterwards."""
    revoke: Callable[["Scene", str], Awaitable[Answer | int]]
    """Revoke it; the text is put behind the path of a request (`?wait=5`)."""
    id: str = ""
    """How the change sequence names it, where that is asked for."""
    session: str | None = None
    """A session JWT, which offline verifiers know too."""
    others: Sequence[str] = ()
    """API keys and access tokens."""

    @property
    def credentials(self) -> Sequence[str]:
        """All of them."""
        return [*([self.session] if self.session else []), *self.others]

    def at(self, doors: Sequence[Door]) -> list[tuple[Door, str]]:
        """Every question that can be asked about it."""
        return [
            (door, credential)
            for door in doors
            for credential in self.credentials
            if isinstance(door, NodeDoor) or credential == self.session
        ]


@dataclass(slots=True)
class Scene:
    """A deployment: nodes, outsiders, and a partner manager beside them who works as the commands do."""

    nodes: Sequence[NodeDoor]
    outsiders: Sequence[OutsiderDoor]
    manager: Lodge
    owner: str = ""
    """The API key of a partner that stands; the companies are its."""
    living: str = ""
    """A session JWT of that partner."""
    chance: random.Random = field(default_factory=dice)
    _numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    @property
    def doors(self) -> Sequence[Door]:
        """All of them."""
        return [*self.nodes, *self.outsiders]

    def somewhere(self) -> NodeDoor:
        """Any node."""
        return self.chance.choice(self.nodes)

    async def log_in(self, key: str) -> str:
        """A session JWT."""
        answer = await self.somewhere().call("POST", "/auth/login", {"apiKey": key})
        assert answer.status == 200, (answer.status, answer.body.get("code"))
        return str(answer.body["jwt"])

    async def add_partner(self) -> tuple[str, str]:
        """A partner; its id and its key."""
        new = NewPartner(f"Partner {next(self._numbers)}", "dev@partner.example")
        partner, issued = await self.manager.partners.add(new, by=BY)
        return partner.id, issued.text.reveal()

    async def add_company(self) -> tuple[str, str]:
        """A company of the partner that stands; its id and its key."""
        body = {"companyName": "Example", "country": "DE", "taxNumber": f"T{next(self._numbers)}"}
        answer = await self.somewhere().call("POST", "/companies", body, credential=self.owner)
        assert answer.status == 201, answer.status
        return str(answer.body["companyId"]), str(answer.body["apiKey"])

    async def add_token(self, partner: str) -> tuple[str, str]:
        """An access token; its id and its text."""
        issued = await self.manager.access_tokens.issue(partner, label="", by=BY)
        return issued.token.id, issued.text.reveal()

    async def victim(self, kind: str) -> Victim:
        """One that stands."""
        return await KINDS[kind](self)

    async def warm(self, victim: Victim) -> None:
        """Have it let in everywhere, so that every door remembers it."""
        asked = victim.at(self.doors)
        answers = await asyncio.gather(*(_decided(door, text) for door, text in asked))
        for (door, _), said in zip(asked, answers, strict=True):
            assert said == ACCEPTED, f"a {victim.kind} that stands is answered with {said} by {door.name}"

    def close(self) -> None:
        """Hang up."""
        for node in self.nodes:
            node.close()


# --- what can be revoked --------------------------------------------------------------------------------------------------


async def _partner_key(scene: Scene) -> Victim:
    _, key = await scene.add_partner()
    revoke = lambda at, _: at.manager.credentials.revoke(key_id(key), by=BY)
    return Victim("key", "credential_revoked", revoke, id=key_id(key), session=await scene.log_in(key), others=[key])


async def _company_key(scene: Scene) -> Victim:
    _, key = await scene.add_company()
    revoke = lambda at, _: at.manager.credentials.revoke(key_id(key), by=BY)
    return Victim("key", "credential_revoked", revoke, id=key_id(key), session=await scene.log_in(key), others=[key])


async def _token(scene: Scene) -> Victim:
    partner, _ = await scene.add_partner()
    token_id, text = await scene.add_token(partner)
    revoke = lambda at, _: at.manager.access_tokens.revoke(token_id, by=BY)
    return Victim("access token", "credential_revoked", revoke, others=[text])


async def _session(scene: Scene) -> Victim:
    jwt = await scene.log_in(scene.owner)
    revoke = lambda at, query: _told(at, "POST", f"/auth/logout{query}", jwt)
    return Victim("session", "credential_revoked", revoke, id=session_of(jwt), session=jwt)


async def _partner(scene: Scene) -> Victim:
    partner, key = await scene.add_partner()
    _, token = await scene.add_token(partner)
    revoke = lambda at, _: at.manager.partners.suspend(partner, by=BY)
    return Victim("partner", "partner_suspended", revoke, id=partner, session=await scene.log_in(key), others=[key, token])


async def _company(scene: Scene) -> Victim:
    company, key = await scene.add_company()
    revoke = lambda at, query: _told(at, "DELETE", f"/companies/{company}{query}", at.owner)
    return Victim("company", "credential_revoked", revoke, id=company, session=await scene.log_in(key), others=[key])


async def _rotated(scene: Scene) -> Victim:
    company, key = await scene.add_company()
    revoke = lambda at, _: _told(at, "POST", f"/companies/{company}/key", at.owner)
    return Victim("rotated key", "credential_rotated", revoke, session=await scene.log_in(key), others=[key])


def session_of(jwt: str) -> str:
    """The id of a JWT's session."""
    claims = jwt.split(".")[1]
    return str(json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))["sid"])


async def _told(scene: Scene, method: str, path: str, credential: str) -> Answer:
    answer = await scene.somewhere().call(method, path, credential=credential)
    assert answer.status in {200, 204}, (path, answer.status, answer.body.get("code"))
    return answer


KINDS: Final[dict[str, Callable[[Scene], Awaitable[Victim]]]] = {
    "partner's key": _partner_key,
    "company's key": _company_key,
    "access token": _token,
    "session": _session,
    "partner": _partner,
    "company": _company,
    "rotated key": _rotated,
}
HEARD_OUTSIDE: Final = tuple(kind for kind in KINDS if kind != "access token")
"""Those that an offline verifier can judge."""
BY_HTTP: Final = ("session", "company")
"""Those whose revocation is a request that says how far it has got."""


# --- watching -------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Watch:
    """What became of a revoked credential at one door."""

    door: Door
    last_in: float = 0.0
    """Seconds after the answer to the revocation at which it was let in for the last time; 0: never again."""
    undecided: int = 0
    code: str = ""
    """With what it was refused; empty if it never was."""


async def watch(door: Door, credential: str, *, since: float, until: float) -> Watch:
    """Ask until it is refused, or until ``until``. ``since`` is when the revocation was answered; both monotonic."""
    found = Watch(door)
    while not found.code:
        begun = time.monotonic()
        if begun > until:
            break
        said = await door.ask(credential)
        if said == ACCEPTED:
            found.last_in = time.monotonic() - since
        elif said == UNDECIDED:
            found.undecided += 1
        else:
            found.code = said
        if not found.code:
            await asyncio.sleep(max(0.0, begun + PACE - time.monotonic()))  # the pace of the questions
    return found


async def _decided(door: Door, credential: str) -> str:
    """What is said once something is: who does not know may refuse for a moment."""
    async with asyncio.timeout(_PATIENCE):
        while (said := await door.ask(credential)) == UNDECIDED:
            await asyncio.sleep(PACE)  # a pace
    return said


# --- a scene --------------------------------------------------------------------------------------------------------------


class Deployment(Nodes):
    """Nodes with the sample API, and a partner manager who has their master key."""

    def __init__(self, root: Path, database: str) -> None:
        key = base64.urlsafe_b64encode(os.urandom(32)).decode().rstrip("=")
        self._known = {MASTER_KEY_VARIABLE: key, "GATELODGE_PUBLIC_URL": ISSUER, "GATELODGE_SAMPLE_API": "on"}
        super().__init__(root, database, environ=self._known)

    def manager(self) -> Lodge:
        """What a command has in its hands. The nodes have been started."""
        environ = {**self._known, "GATELODGE_DATABASE": self.database}
        settings = load_settings({"data": str(self.root / "manager")}, environ)
        return assemble(settings, Vault(load_master_keys(settings, environ), system_entropy))


@asynccontextmanager
async def scene_on(
    nodes: Deployment,
    running: Sequence[Node],
    *,
    ports: Sequence[int] = (),
    max_staleness: float = 10.0,
    looks_at_age: bool = True,
) -> AsyncIterator[Scene]:
    """A scene on nodes that run, with outsiders that follow those behind ``ports``, and a partner that stands."""
    await asyncio.to_thread(nodes.run, "tier", "set", "starter", "--per-hour", "10000000", "--per-day", "100000000")
    async with AsyncExitStack() as stack:
        manager = nodes.manager()
        stack.push_async_callback(manager.close)
        await manager.signing_keys.establish()
        await manager.access_keys.establish()
        outsiders = []
        for number, port in enumerate(ports):
            outsider = await Outsider.start(
                port, running[number].authority, issuer=ISSUER, max_staleness=max_staleness, looks_at_age=looks_at_age
            )
            stack.push_async_callback(outsider.end)
            outsiders.append(OutsiderDoor(f"verifier {number}", outsider))
        scene = Scene([NodeDoor(f"node {number}", node) for number, node in enumerate(running)], outsiders, manager)
        stack.callback(scene.close)
        _, scene.owner = await scene.add_partner()
        scene.living = await scene.log_in(scene.owner)
        yield scene
