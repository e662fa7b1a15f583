"""P1 and P9: every write to the disk made to fail, or to kill, in turn; none of them yields a false acknowledgement.

A small scenario goes through everything that is durable: logins, refreshes, a company and its new key, a logout, a reuse.
strace is attached to the server and tampers with the n-th ``fdatasync`` (then ``pwrite64``), for n = 1, 2, … until the scenario
gets through unharmed, so that each call has had its turn:

- ``signal=KILL``: the process dies in that call;
- ``error=EIO``, ``error=ENOSPC``, once (``when=n``) or from then on (``when=n+``): the answer is 503 with Retry-After, and once
  the fault is over the next request succeeds, without a restart.

After each the server is killed, started untampered, and asked for everything that it has acknowledged; the checker decides. The
start itself is swept likewise, on an empty directory and on one that has tables and no keys: it fails in one plain line or it
succeeds, and the next start is whole. The control takes no notice when a commit fails.
"""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from experiments.client import Answer, Caller, digest
from experiments.ground import Experiment, Ground, Site, Verdict, bounded
from experiments.history import check
from experiments.trace import Strace
from gatelodge_server.deployment import prepare
from gatelodge_server.settings import load_settings

_TRIES = 4


class _Stopped(Exception):
    """The scenario cannot go on: the server is dead, or every write fails."""


@dataclass
class _Walk:
    """One walk through the scenario, with what was given out on the way."""

    site: Site
    caller: Caller
    key: str
    name: str
    lasting: bool
    tokens: dict[str, None] = field(default_factory=dict)
    keys: dict[str, None] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    busy: int = 0
    pending: Callable[[], Awaitable[Answer | None]] | None = None

    async def go(self) -> None:
        """Walk as far as the server lets."""
        try:
            await self._through_everything()
        except _Stopped:
            return

    async def _through_everything(self) -> None:
        key, name, caller = self.key, self.name, self.caller
        first = await self._log_in(key)
        second = await self._refresh(first, None)
        await self._refresh(second, f"{name}-refresh")
        make = lambda: caller.create_company(key, name, f"{name}-create")
        made = await self._tell(make, again=True)
        company_key = str(made.body.get("apiKey"))
        self.keys[company_key] = None
        await self._log_in(company_key)
        rotate = lambda: caller.rotate_company(key, made.body["companyId"], company_key, f"{name}-rotate")
        self.keys[str((await self._tell(rotate, again=True)).body.get("apiKey"))] = None
        leaving = await self._log_in(key)
        await self._tell(lambda: caller.log_out(leaving))
        stolen = await self._log_in(key)
        await self._refresh(stolen, None)
        await self._tell(lambda: caller.refresh(stolen))

    async def _log_in(self, key: str) -> str:
        return self._given(await self._tell(lambda: self.caller.log_in(key)))

    async def _refresh(self, token: str, retry: str | None) -> str:
        return self._given(await self._tell(lambda: self.caller.refresh(token, retry), again=retry is not None))

    def _given(self, answer: Answer) -> str:
        if answer.status != 200:
            self.faults.append(f"refused: {self.name}: {answer.status} {answer.body.get('code')}")
            raise _Stopped
        token = str(answer.body["refreshToken"])
        self.tokens[token] = None
        return token

    async def _tell(self, action: Callable[[], Awaitable[Answer | None]], *, again: bool = False) -> Answer:
        for _ in range(_TRIES):
            answer = await action()
            if answer is not None and answer.status != 503:
                return answer
            if answer is not None:
                self.busy += 1
                if "retry-after" not in answer.headers:
                    self.faults.append(f"refused: {self.name}: a 503 without Retry-After")
            if answer is None or self.lasting:
                self.pending = action if again else None
                raise _Stopped
        self.faults.append(f"refused: {self.name}: still 503 after a fault that came once")
        raise _Stopped

    async def come_back(self, caller: Caller) -> None:
        """Send again what had no answer, then present everything that was given out and not presented yet."""
        self.caller = caller
        if self.pending is not None:
            again = await self.pending()
            self.pending = None
            if again is None or again.status not in {200, 201}:
                self.faults.append(f"refused: {self.name}: sent again with its Idempotency-Key: {again}")
        shown = {op.token_in for op in self.site.book.operations if op.op == "refresh"}
        for token in self.tokens:
            if digest(token) not in shown:
                await caller.refresh(token)
        for key in self.keys:
            await caller.log_in(key)


async def _one(site: Site, key: str, name: str, call: str, fault: str) -> tuple[bool, list[str], int]:
    """One walk with one fault: whether the fault came about, what speaks against the promise, how many 503 there were."""
    begins, lasting = len(site.book.operations), fault.endswith("+")
    caller = site.caller()
    await caller.get("/healthz", key)
    walk = _Walk(site, caller, key, name, lasting)
    assert site.server.process is not None
    with Strace(
        site.server.process.pid, site.server.data.with_name("sweep.txt"), watch=(call,), inject={call: fault}
    ) as strace:
        await walk.go()
        if lasting and walk.busy and (extra := await walk.caller.log_in(key)) is not None and extra.status != 503:
            walk.faults.append(f"refused: {name}: {extra.status} while every {call} fails")
    caller.close()
    died = site.server.process.poll() is not None
    hit = died or strace.injections() > 0
    recovered_at = time.monotonic()
    if hit and not died:
        caller = site.caller()
        first = await caller.log_in(key)
        if first is None or first.status != 200:
            walk.faults.append(f"refused: {name}: {first} after the fault was over, without a restart")
        await walk.come_back(caller)
        walk.tokens |= {str(first.body["refreshToken"]): None} if first is not None and first.status == 200 else {}
        caller.close()
    if hit:
        await site.kill()
        await site.start()
        caller = site.caller()
        await walk.come_back(caller)
        caller.close()
    findings = check(site.book.operations[begins:], recovered_at=recovered_at) if hit else []
    return hit, [*walk.faults, *(f"{finding} ({name})" for finding in findings)], walk.busy


async def _sweep(site: Site, sweeps: list[tuple[str, str]], most: int) -> Verdict:
    await site.start()
    key = await asyncio.to_thread(site.partner)
    counts, faults, busy = [], list[str](), 0
    for call, fault in sweeps:
        for number in itertools.count(1):
            with_number = fault.replace("when=N", f"when={number}")
            hit, said, answered_503 = await _one(site, key, f"{call}-{with_number}", call, with_number)
            faults += said
            busy += answered_503
            if not hit or number == most:
                counts.append(f"{number if hit else number - 1} x {call}:{fault}")
                break
    faults += [
        f"audit: {finding}"
        for finding in check(site.book.operations, audit=await asyncio.to_thread(site.audit))
        if finding.rule == "audit"
    ]
    await site.kill()
    return Verdict(f"{', '.join(counts)}; {busy} answers were 503", faults)


async def _start_sweep(ground: Ground, fault: str, *, tables: bool, most: int) -> Verdict:
    calls, failed, faults = "fdatasync,fsync", 0, list[str]()
    for number in itertools.count(1):
        name = f"start-{'tables-' if tables else ''}{fault.split(':', maxsplit=1)[0].partition('=')[2]}-{number}"
        output = ground.root / f"{name}.txt"
        inject = f"inject={calls}:{fault.replace('when=N', f'when={number}')}"
        prefix = ["strace", "-f", "-qq", "-o", str(output), "-e", f"trace={calls}", "-e", inject]
        tampered = ground.site(name, prefix=prefix)
        if tables:
            prepare(load_settings({"data": str(tampered.server.data)}, {}), {})
        try:
            await tampered.start()
        except AssertionError:
            failed += 1
        await tampered.kill()
        log = tampered.server.log_path.read_text()
        hit = "(INJECTED)" in output.read_text() or "killed by SIGKILL" in output.read_text()
        if "Traceback" in log:
            faults.append(f"start: {name}: a traceback instead of a sentence: {log.splitlines()[-1]}")
        faults += await _starts_whole(ground.site(name), name)
        if not hit or number == most:
            where = "with tables" if tables else "empty"
            return Verdict(f"{number if hit else number - 1} x start ({where}) {fault}: {failed} did not start", faults)
    raise AssertionError


async def _starts_whole(site: Site, name: str) -> list[str]:
    """What is wrong when a server starts on what another has left behind."""
    faults = []
    try:
        await site.start()
        answer = await site.caller().log_in(await asyncio.to_thread(site.partner))
        if answer is None or answer.status != 200:
            faults.append(f"start: {name}: afterwards a login is answered with {answer}")
    except AssertionError as fault:
        faults.append(f"start: {name}: afterwards it cannot be started: {fault}")
    await site.kill()
    return faults


_KILL = "signal=KILL:when=N"
_SWEEPS = [
    ("fdatasync", _KILL),
    ("pwrite64", _KILL),
    ("fdatasync", "error=EIO:when=N"),
    ("fdatasync", "error=EIO:when=N+"),
    ("pwrite64", "error=ENOSPC:when=N"),
    ("pwrite64", "error=ENOSPC:when=N+"),
]


def run(ground: Ground) -> Verdict:
    """Tamper with the product's writes."""
    return bounded(_sweep(ground.site("faults"), _SWEEPS, ground.scale(1000, 1)), seconds=ground.scale(2400, 240))


def run_start(ground: Ground) -> Verdict:
    """Tamper with the product's start."""
    most = ground.scale(1000, 1)

    async def all_() -> Verdict:
        verdicts = [
            await _start_sweep(ground, fault, tables=tables, most=most)
            for fault in (_KILL, "error=EIO:when=N")
            for tables in (False, True)
        ]
        return Verdict("; ".join(verdict.counts for verdict in verdicts), [fault for v in verdicts for fault in v.faults])

    return bounded(all_(), seconds=ground.scale(1200, 120))


def control_start(ground: Ground) -> Verdict:
    """Start on a directory that is broken."""

    async def broken() -> Verdict:
        site = ground.site("start-broken")
        await site.start()
        await site.kill()
        site.server.data.joinpath("master.key").unlink()
        return Verdict("1 start", await _starts_whole(site, "without its master key"))

    return bounded(broken(), seconds=60)


def control(ground: Ground) -> Verdict:
    """Tamper with a server that takes no notice."""
    site = ground.site("faults-control", variant="careless")
    return bounded(_sweep(site, [("fdatasync", "error=EIO:when=N")], 3), seconds=120)


EXPERIMENT = Experiment(
    name="faults",
    promise="P1, P9: a write that fails or kills is never acknowledged",
    run=run,
    control=control,
    control_says="a server that takes no notice when a commit fails",
    finds="durable: ",
)
START = Experiment(
    name="start",
    promise="P9: a start whose writes fail or kill leaves nothing broken behind",
    run=run_start,
    control=control_start,
    control_says="the same search for a broken directory, on one that has lost its master key",
    finds="start: ",
)
