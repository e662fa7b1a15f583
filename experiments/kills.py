"""P1: what was acknowledged survives ``kill -9``.

Clients log in, refresh, log out, create companies, rotate and revoke keys, over HTTP and with the command line, while the whole
process group is killed at a random moment and started again on the same data, over and over. In every third round there are two
workers, in every fourth a command is killed too. In the end each token that should be alive is presented, then each that was
spent; the checker decides. The control is a server that acknowledges a refresh before it commits it.
"""

import asyncio
import itertools
import json
import random
import signal
import subprocess
import time
from dataclasses import dataclass, field

from tests.harness import PROGRAM, clean_environment

from experiments.client import Caller, key_id
from experiments.ground import Experiment, Ground, Site, Verdict, bounded, dice
from experiments.history import UNKNOWN

_CLIENTS = 6
_MOST_SESSIONS = 120


@dataclass(slots=True)
class _Held:
    """A session as its client knows it."""

    token: str
    key: str
    spent: str | None = None


@dataclass(slots=True)
class _Load:
    """What the clients do, and what they hold meanwhile. A session or company is in one client's hands at a time."""

    site: Site
    partner_key: str
    chance: random.Random
    sessions: list[_Held] = field(default_factory=list)
    companies: list[tuple[str, str]] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    dead_keys: list[str] = field(default_factory=list)
    over: bool = False
    numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    def retry(self) -> str | None:
        """An Idempotency-Key, for every other request."""
        return f"retry-{next(self.numbers)}-{self.chance.getrandbits(64):x}" if self.chance.random() < 0.5 else None

    async def client(self) -> None:
        """Do one thing after the other until told to stop."""
        caller = self.site.caller()
        try:
            while not self.over:
                await self._something(caller)
        finally:
            caller.close()

    async def _something(self, caller: Caller) -> None:
        dice = self.chance.random()
        if len(self.sessions) < 8 or (dice < 0.2 and len(self.sessions) < _MOST_SESSIONS):
            await self._log_in(caller)
        elif dice < 0.8:
            await self._refresh(caller, self._take())
        elif dice < 0.88:
            held = self._take()
            await self.site.send(lambda: caller.log_out(held.token))
            self.ended.append(held.token)
        elif dice < 0.95 or not self.companies:
            await self._create(caller)
        else:
            await self._rotate(caller)

    def _take(self) -> _Held:
        return self.sessions.pop(self.chance.randrange(len(self.sessions)))

    async def _log_in(self, caller: Caller) -> None:
        keys = [self.partner_key, *(key for _, key in self.companies[-5:])]
        key = self.chance.choice(keys)
        answer = await self.site.send(lambda: caller.log_in(key))
        if answer is not None and answer.status == 200:
            self.sessions.append(_Held(answer.body["refreshToken"], key))

    async def _refresh(self, caller: Caller, held: _Held) -> None:
        retry = self.retry()
        action = lambda: caller.refresh(held.token, retry)
        answer = await (self.site.send(action) if retry is None else self.site.insist(action))
        if answer is not None and answer.status == 200:
            self.sessions.append(_Held(answer.body["refreshToken"], held.key, spent=held.token))

    async def _create(self, caller: Caller) -> None:
        tax, retry = f"DE{next(self.numbers):09}", self.retry()
        action = lambda: caller.create_company(self.partner_key, tax, retry)
        answer = await (self.site.send(action) if retry is None else self.site.insist(action))
        if answer is not None and answer.status == 201:
            self.companies.append((answer.body["companyId"], answer.body["apiKey"]))

    async def _rotate(self, caller: Caller) -> None:
        company, old = self.companies.pop(self.chance.randrange(len(self.companies)))
        retry = self.retry()
        action = lambda: caller.rotate_company(self.partner_key, company, old, retry)
        answer = await (self.site.send(action) if retry is None else self.site.insist(action))
        self._bury(old)
        if answer is not None and answer.status == 200:
            self.companies.append((company, answer.body["apiKey"]))

    def _bury(self, key: str) -> None:
        """Nothing of this key is used again until the end."""
        self.dead_keys.append(key)
        self.ended += [held.token for held in self.sessions if held.key == key]
        self.sessions = [held for held in self.sessions if held.key != key]

    async def command(self, verb: str, *, die: bool) -> None:
        """Revoke or rotate a company's key with the command line, which may be killed at a random moment."""
        if not self.companies:
            return
        company, old = self.companies.pop(0)
        arguments = ["key", verb, key_id(old), "--json", "--data", str(self.site.server.data)]
        t0 = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            *PROGRAM, *arguments, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        if die:
            await asyncio.sleep(self.chance.uniform(0.2, 2.5))
            if process.returncode is None:
                process.send_signal(signal.SIGKILL)
        out, _ = await process.communicate()
        status = {0: 200, 1: 409, -signal.SIGKILL: UNKNOWN}[process.returncode or 0]
        new = _api_key(out.decode()) if verb == "rotate" and status == 200 else None
        more = {"event": f"key.{verb}d" if verb == "rotate" else "key.revoked", "subject": key_id(old)}
        self.site.book.note(verb, t0, status, token_in=old, token_out=new, **more)
        self._bury(old)
        if new is not None:
            self.site.book.secrets.add(new)
            self.companies.append((company, new))
        elif status == 409:
            self.companies.append((company, old))


def _api_key(text: str) -> str:
    return str(json.loads(text)["apiKey"])


async def _probe(load: _Load) -> None:
    """Present what should be alive, then what should be dead."""
    site, caller = load.site, load.site.caller()
    for held in load.sessions:
        await site.send(lambda held=held: caller.refresh(held.token))
    for _, key in load.companies:
        await site.send(lambda key=key: caller.log_in(key))
    for held in load.sessions:
        if held.spent is not None:
            await site.send(lambda held=held: caller.refresh(held.spent))
    for token in load.ended:
        await site.send(lambda token=token: caller.refresh(token))
    for key in load.dead_keys:
        await site.send(lambda key=key: caller.log_in(key))
    caller.close()


async def _missing_companies(load: _Load) -> list[str]:
    """Companies whose creation was acknowledged and that the partner's list does not hold."""
    caller, listed, cursor = load.site.caller(), set[str](), ""
    while cursor is not None:
        page = await caller.get(f"/companies?limit=200{cursor and '&cursor=' + cursor}", load.partner_key)
        listed |= {company["companyId"] for company in page.body["companies"]}
        cursor = page.body["nextCursor"]
    caller.close()
    asked = [op for op in load.site.book.operations if op.op == "create" and op.accepted and op.subject]
    return [
        f"company {op.subject} was acknowledged (operation {op.id}) and is gone" for op in asked if op.subject not in listed
    ]


async def _kill_and_restart(site: Site, kills: int, *, alone: bool) -> Verdict:
    await site.start()
    load = _Load(site, await asyncio.to_thread(site.partner), dice())
    clients = [asyncio.create_task(load.client()) for _ in range(_CLIENTS)]
    commands: list[asyncio.Task[None]] = []
    for number in range(kills):
        if not alone and number % 4 == 1:
            verb = load.chance.choice(["revoke", "rotate"])
            commands.append(asyncio.create_task(load.command(verb, die=number % 8 == 1)))
        await asyncio.sleep(load.chance.uniform(0.02, 0.6))  # the random moment
        await site.kill()
        await site.start(*(["--workers", "2"] if not alone and number % 3 == 2 else []))
    load.over = True
    await asyncio.gather(*clients, *commands)
    recovered_at = time.monotonic()
    await _probe(load)
    missing = await _missing_companies(load)
    faults = [*missing, *await asyncio.to_thread(site.judge, recovered_at=recovered_at)]
    await site.kill()
    operations = site.book.operations
    unanswered = sum(op.status == UNKNOWN for op in operations)
    acknowledged = sum(op.accepted for op in operations)
    return Verdict(f"{kills} kills, {acknowledged} acknowledged, {unanswered} unanswered operations", faults)


def run(ground: Ground) -> Verdict:
    """Kill the product."""
    kills = ground.scale(200, 6)
    return bounded(_kill_and_restart(ground.site("kills"), kills, alone=False), seconds=60 + 6 * kills)


def control(ground: Ground) -> Verdict:
    """Kill a server that acknowledges before it commits."""
    return bounded(_kill_and_restart(ground.site("kills-control", variant="hasty"), 2, alone=True), seconds=90)


EXPERIMENT = Experiment(
    name="kills",
    promise="P1: what was acknowledged survives kill -9",
    run=run,
    control=control,
    control_says="a server that acknowledges before it commits",
    finds=("honest: ", "durable: "),  # what was lost is missed by whoever holds it, or by whoever looks afterwards
)
