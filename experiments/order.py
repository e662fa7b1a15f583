"""P1, power loss: before an answer leaves, what it acknowledges has been synced to the disk.

``kill -9`` cannot show this, because the page cache survives it. So strace shows it. One client sends one request after the
other over one connection, so that on this socket the server reads, writes, reads, writes: the n-th exchange is the n-th
request, whatever TLS makes of the bytes. Between an exchange's first read and its first write, for every request that changed
something (and for a refused reuse, which ends a session), another thread has

1. written to the write-ahead log, and after the last such write
2. called ``fdatasync`` on it, which returned 0

before the first byte of the answer is handed to the kernel. strace stops threads at both ends of a call, so the order of its
lines is the order of the calls. The controls run with ``synchronous`` NORMAL, and OFF.
"""

import asyncio
import sqlite3
from contextlib import closing
from itertools import groupby
from pathlib import Path

from experiments.client import Answer, Caller
from experiments.ground import Experiment, Ground, Site, Verdict, bounded
from experiments.trace import Strace, Syscall

_READS = ("read", "recvfrom", "recvmsg")
_WRITES = ("write", "writev", "sendto", "sendmsg")
_DISK = ("pwrite64", "pwritev", "fdatasync", "fsync")


async def _mails_are_sent(data: Path) -> None:
    """Wait until nothing is written but for requests: the owner of a reused token is sent a mail, and that is written down."""
    with closing(sqlite3.connect(f"file:{data / 'gatelodge.db'}?mode=ro", uri=True)) as database:
        while database.execute("SELECT count(*) FROM outbox WHERE ended_at IS NULL").fetchone() != (0,):
            await asyncio.sleep(0.02)


async def _requests(caller: Caller, key: str, rounds: int, data: Path) -> list[tuple[str, bool]]:
    """Send requests one by one: what each was, and whether its answer says that something has changed."""
    sent: list[tuple[str, bool]] = []

    def token(what: str, answer: Answer | None) -> str:
        assert answer is not None, what
        sent.append((what, answer.status < 300))
        return str(answer.body.get("refreshToken") or answer.body.get("apiKey"))

    for number in range(rounds):
        first = token("login", await caller.log_in(key))
        second = token("refresh", await caller.refresh(first))
        third = token("refresh", await caller.refresh(second, f"retry-{number}"))
        await caller.refresh(second, f"retry-{number}")
        sent.append(("repeated refresh", False))
        await caller.get("/healthz", key)
        sent.append(("health", False))
        token("logout", await caller.log_out(third))
        made = await caller.create_company(key, f"DE{number:09}", f"create-{number}")
        company_key = token("create", made)
        assert made is not None
        token("rotate", await caller.rotate_company(key, made.body["companyId"], company_key))
        fourth = token("login", await caller.log_in(key))
        token("refresh", await caller.refresh(fourth))
        verdict = await caller.refresh(fourth)
        sent.append(("reuse", verdict is not None and verdict.status == 401))
        await _mails_are_sent(data)
    return sent


def _exchanges(calls: list[Syscall]) -> list[list[Syscall]]:
    """The reads and writes on the client's socket, cut into requests with their answers."""
    on_sockets = [call for call in calls if call.file.startswith(("socket:", "TCP")) and call.result and call.result > 0]
    runs = [list(run) for _, run in groupby(on_sockets, key=lambda call: call.name in _READS)]
    if runs and runs[0][0].name not in _READS:
        runs = runs[1:]
    return [reads + writes for reads, writes in zip(runs[::2], runs[1::2], strict=False)]


def _unsynced(exchange: list[Syscall], calls: list[Syscall]) -> str | None:
    """What is wrong with an exchange that should have been durable before its answer."""
    asked = exchange[0].begun
    answer = next(call for call in exchange if call.name in _WRITES)
    on_log = [
        call
        for call in calls
        if call.file.endswith("-wal") and call.good and asked < call.begun and call.thread != answer.thread
    ]
    written = [call for call in on_log if call.name.startswith("pwrite") and call.begun < answer.begun]
    if not written:
        return "nothing was written to the log before its answer"
    synced = [
        call
        for call in on_log
        if call.name in {"fdatasync", "fsync"}
        and call.begun > max(write.ended or write.begun for write in written)
        and call.ended is not None
        and call.ended <= answer.begun
    ]
    return None if synced else "its answer left before the log was synced"


async def _trace(site: Site, rounds: int) -> Verdict:
    await site.start()
    key = await asyncio.to_thread(site.partner)
    caller = site.caller()
    await caller.log_in(key)  # the connection and the store's threads are there before strace is
    assert site.server.process is not None
    output = site.server.data.with_name("trace.txt")
    with Strace(site.server.process.pid, output, watch=(*_READS, *_WRITES, *_DISK)) as strace:
        sent = await _requests(caller, key, rounds, site.server.data)
    caller.close()
    calls = strace.calls()
    exchanges = _exchanges(calls)
    faults = []
    if len(exchanges) != len(sent):
        faults.append(f"the trace shows {len(exchanges)} exchanges, and {len(sent)} requests were sent")
    must = [(what, exchange) for (what, changed), exchange in zip(sent, exchanges, strict=False) if changed]
    for number, (what, exchange) in enumerate(must):
        says = _unsynced(exchange, calls)
        if says is not None:
            faults.append(f"unsynced: {what} (durable answer {number}): {says}")
    await site.kill()
    syncs = sum(call.name == "fdatasync" and call.file.endswith("-wal") and call.good for call in calls)
    return Verdict(f"{len(sent)} requests, {len(must)} answers to be durable, {syncs} syncs of the log", faults)


def run(ground: Ground) -> Verdict:
    """Watch the product."""
    return bounded(_trace(ground.site("order"), ground.scale(60, 5)), seconds=180)


def control(ground: Ground) -> Verdict:
    """Watch servers that sync less."""
    verdicts = [
        bounded(_trace(ground.site(f"order-{variant}", variant=variant), 2), seconds=60)
        for variant in ("sync-normal", "sync-off")
    ]
    harmless = [verdict for verdict in verdicts if verdict.holds]
    counts = "; ".join(verdict.counts for verdict in verdicts)
    # Both must be caught; one that is not leaves no fault behind, and so the control does not fail.
    return Verdict(counts, [] if harmless else [fault for verdict in verdicts for fault in verdict.faults])


EXPERIMENT = Experiment(
    name="order",
    promise="P1: the log is synced before the answer leaves",
    run=run,
    control=control,
    control_says="servers with synchronous NORMAL, and OFF",
    finds="unsynced: ",
)
