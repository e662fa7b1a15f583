"""P10: no clock decides what a token is worth to whom.

The server's clock is a parameter of its assembly; here it adds an offset that it reads from a file at every look, so it can be
moved while the server runs. (libfaketime would do it from outside, but it also stretches the timers of the event loop, and what
failed then would be the loop.) The clock is set back an hour and ahead an hour, in steps, with the server running and across
restarts, and is stopped altogether. Every time: refreshes go on, a spent token presented again ends its session, and no token
of an ended session comes back, nor a revoked key, whatever the clock says. With the clock stopped a session is moved on twice
within one instant and its first token is presented again. The control knows a spent token by the time of the last refresh.
"""

import asyncio
import time

from tests.harness import ask

from experiments.client import Answer, key_id
from experiments.ground import Experiment, Ground, Site, Verdict, bounded
from experiments.variants import OFFSET_FILE
from gatelodge_server.deployment import system_clock

_HOUR = 3_600_000
_STEPS = (0, -_HOUR, _HOUR, -_HOUR, -2 * _HOUR, 0)


def _token(answer: Answer | None) -> str | None:
    return answer.body.get("refreshToken") if answer is not None else None


async def _shift(site: Site, restarts: int) -> Verdict:
    await site.start()
    key, faults = await asyncio.to_thread(site.partner), list[str]()
    clock = site.server.data / OFFSET_FILE
    caller = site.caller()
    revoked = await asyncio.to_thread(site.partner, "Gone Motors")
    living_then = _token(await caller.log_in(revoked))
    assert living_then is not None
    t0 = time.monotonic()
    await asyncio.to_thread(ask, "key", "revoke", key_id(revoked), data=site.server.data)
    site.book.note("revoke", t0, 200, token_in=revoked)
    living = [_token(await caller.log_in(key)) for _ in range(4)]
    ended: list[str] = []
    frozen = f"={system_clock()}"
    for number, step in enumerate([*map(str, _STEPS), frozen, str(_STEPS[-1]), frozen]):
        clock.write_text(step)
        if number % 2 and number < 2 * restarts:
            caller.close()
            await site.kill()
            await site.start()
            caller = site.caller()
        # Sessions from before the step go on.
        for index, token in enumerate(living):
            assert token is not None, faults
            living[index] = _token(answer := await caller.refresh(token))
            if living[index] is None:
                faults.append(f"clock: at {step} a living token is answered with {answer and answer.body.get('code')}")
                return Verdict("stopped early", faults)
        # A revoked key and its session stay dead.
        await caller.log_in(revoked)
        await caller.refresh(living_then)
        # Twice on within this instant, as far as the clock goes, then the first again.
        first = _token(await caller.log_in(key))
        assert first is not None
        second = _token(await caller.refresh(first))
        assert second is not None
        third = _token(await caller.refresh(second))
        assert third is not None
        await caller.refresh(first)
        # Nobody of that session comes back, now or later.
        ended += [first, second, third]
        for token in ended:
            await caller.refresh(token)
    caller.close()
    faults += await asyncio.to_thread(site.judge)
    await site.kill()
    operations = site.book.operations
    verdicts = sum(op.reuse_verdict for op in operations)
    return Verdict(f"{len(_STEPS) + 3} clock steps, {len(operations)} operations, {verdicts} reuses refused", faults)


def run(ground: Ground) -> Verdict:
    """Move the product's clock."""
    return bounded(_shift(ground.site("clocks", variant="clock"), ground.scale(4, 1)), seconds=120)


def control(ground: Ground) -> Verdict:
    """Move the clock of a server that knows spent tokens by the time."""
    return bounded(_shift(ground.site("clocks-control", variant="by-the-clock"), 0), seconds=120)


EXPERIMENT = Experiment(
    name="clocks",
    promise="P10: whatever the clock says, no token is spent twice and none comes back",
    run=run,
    control=control,
    control_says="a server that knows a spent token by the time of the last refresh",
    finds="spent-once: ",
)
