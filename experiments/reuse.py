"""P4: a reuse ends the session for good. P11: a retry after a lost answer gives the same answer, and does nothing twice.

P4: a chain of refreshes, then one of its spent tokens is presented again: that is the reuse. From then on every token of the
chain is refused: at once, after ``kill -9``, with the clock an hour back, an hour ahead and far beyond every lifetime. The
control refuses the reuse and leaves the session alive.

P11: a proxy passes a request on and throws the answer away. The same request, sent again with its Idempotency-Key, gets the
same successor, or the same company with the same key; the audit trail tells of one event. The control does not hear of the key.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Self

from experiments.client import Answer, Caller
from experiments.ground import Experiment, Ground, Site, Verdict, bounded
from experiments.variants import OFFSET_FILE

_CHAIN = 5
_HOUR = 3_600_000
_SHIFTS = (0, -_HOUR, _HOUR, 24 * _HOUR, 31 * 24 * _HOUR)


async def _chain(caller: Caller, key: str, length: int) -> list[str]:
    """The tokens of a session, the living one last."""
    answer = await caller.log_in(key)
    tokens = []
    for _ in range(length):
        tokens.append(_token(answer))
        answer = await caller.refresh(tokens[-1])
    return [*tokens, _token(answer)]


def _token(answer: Answer | None) -> str:
    assert answer is not None, "no answer"
    assert answer.status == 200, answer.body
    return str(answer.body["refreshToken"])


async def _reuse(site: Site, shifts: Sequence[int]) -> Verdict:
    await site.start()
    key = await asyncio.to_thread(site.partner)
    caller = site.caller()
    chains = [await _chain(caller, key, _CHAIN) for _ in range(_CHAIN)]
    for number, chain in enumerate(chains):
        await caller.refresh(chain[number])  # each chain by another of its spent tokens
        await caller.refresh(chain[-1])
    for shift in shifts:
        caller.close()
        await site.kill()
        (site.server.data / OFFSET_FILE).write_text(str(shift))
        await site.start()
        caller = site.caller()
        for token in (token for chain in chains for token in reversed(chain)):
            await caller.refresh(token)
    caller.close()
    faults = await asyncio.to_thread(site.judge)
    await site.kill()
    refused = sum(op.status == 401 for op in site.book.operations)
    return Verdict(f"{len(chains)} sessions ended by reuse, {len(shifts)} restarts and clock steps, {refused} refusals", faults)


class LossyProxy:
    """Passes bytes on in both directions, until it is armed: then it swallows the next answer and hangs up."""

    def __init__(self, port: int) -> None:
        self._upstream = port
        self.port = 0
        self.armed = False
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        for task in (
            asyncio.create_task(self._pass(reader, up_writer)),
            asyncio.create_task(self._answer(up_reader, writer, up_writer)),
        ):
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, upstream: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if self.armed:
                    self.armed = False
                    break
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
        upstream.transport.abort()


async def _retry(site: Site, rounds: int) -> Verdict:
    await site.start()
    key = await asyncio.to_thread(site.partner)
    faults: list[str] = []
    async with LossyProxy(site.server.port) as proxy:
        for number in range(rounds):
            direct = site.caller()
            behind = Caller(proxy.port, site.server.tls(), site.book, node="behind the proxy")
            faults += await _one_of_each(direct, behind, proxy, key, number)
            direct.close()
            behind.close()
    faults += await asyncio.to_thread(site.judge)
    await site.kill()
    return Verdict(f"{4 * rounds} answers lost behind a proxy, each asked for again", faults)


async def _one_of_each(direct: Caller, behind: Caller, proxy: LossyProxy, key: str, number: int) -> list[str]:
    faults = []

    async def lose(action: Callable[[], Awaitable[Answer | None]]) -> None:
        # An answer on this very connection first: what comes next is the answer that is to be lost, and no handshake.
        await behind.get("/healthz", key)
        proxy.armed = True
        if await action() is not None:
            faults.append("the proxy let an answer through")

    # A refresh: the same successor, as often as it is asked for, and it works.
    token, retry = _token(await direct.log_in(key)), f"refresh-{number}"
    await lose(lambda: behind.refresh(token, retry))
    answers = [await direct.refresh(token, retry) for _ in range(2)]
    if len({answer.body.get("refreshToken", answer.body.get("code")) for answer in answers if answer}) != 1:
        faults.append("retry: a refresh asked for again has two answers")
    if answers[1] is None or answers[1].status != 200:
        faults.append(f"retry: a refresh asked for again is answered with {answers[1]}")
    else:
        await direct.refresh(_token(answers[1]), f"refresh-{number}-next")

    # A company: the same company and the same key.
    tax, retry = f"DE{number:09}", f"create-{number}"
    await lose(lambda: behind.create_company(key, tax, retry))
    first, second = [await direct.create_company(key, tax, retry) for _ in range(2)]
    if first is None or second is None or first.status != 201 or first.body != second.body:
        return [
            *faults,
            f"retry: a company asked for again has two answers: {first and first.status} {second and second.status}",
        ]

    # A new key for it: the same key, and it works.
    company, old = first.body["companyId"], first.body["apiKey"]
    await lose(lambda: behind.rotate_company(key, company, old, f"rotate-{number}"))
    first, second = [await direct.rotate_company(key, company, old, f"rotate-{number}") for _ in range(2)]
    if first is None or second is None or first.status != 200 or first.body != second.body or first.body["apiKey"] == old:
        return [*faults, f"retry: a key asked for again has two answers: {first and first.status} {second and second.status}"]
    _token(await direct.log_in(first.body["apiKey"]))

    # A logout needs no Idempotency-Key: it says what it said before.
    last = _token(await direct.log_in(key))
    await lose(lambda: behind.log_out(last))
    answer = await direct.log_out(last)
    if answer is None or answer.status != 204:
        faults.append("retry: a logout asked for again is refused")
    return faults


def run_reuse(ground: Ground) -> Verdict:
    """Reuse tokens of the product."""
    return bounded(_reuse(ground.site("reuse", variant="clock"), _SHIFTS[: ground.scale(5, 2)]), seconds=180)


def control_reuse(ground: Ground) -> Verdict:
    """Reuse tokens of a server that is lenient."""
    return bounded(_reuse(ground.site("reuse-control", variant="lenient"), _SHIFTS[:1]), seconds=180)


def run_retry(ground: Ground) -> Verdict:
    """Lose answers of the product."""
    return bounded(_retry(ground.site("retry"), ground.scale(25, 3)), seconds=120)


def control_retry(ground: Ground) -> Verdict:
    """Lose answers of a server that is deaf to Idempotency-Keys."""
    return bounded(_retry(ground.site("retry-control", variant="deaf"), 1), seconds=60)


REUSE = Experiment(
    name="reuse",
    promise="P4: a reuse ends the session, for good",
    run=run_reuse,
    control=control_reuse,
    control_says="a server that refuses the reuse and spares the session",
    finds="reuse: ",
)
RETRY = Experiment(
    name="retry",
    promise="P11: a retry gives the lost answer again, and does nothing twice",
    run=run_retry,
    control=control_retry,
    control_says="a server that does not hear of Idempotency-Keys",
    finds="retry: ",
)
