"""Timing tells nobody whether a key id is known: a wrong secret for a known id takes as long as an unknown id.

Two kinds of keys, both well-formed with a right checksum: random ones, and ones with the id of a real key and another secret.
They are sent over one connection, in pairs whose order is drawn by lot, and the times to the answer are compared by rank
(Mann-Whitney, two-sided, with ties). The rule was fixed before the first run: 20 000 samples, one run decides, the promise is
kept if p > 0.01. So one run in a hundred fails by chance; that is the price of not choosing among runs. The control answers at
once when there is no key of that id.
"""

import asyncio
import math
import statistics
import time
from itertools import groupby

from experiments.client import Link
from experiments.ground import Experiment, Ground, Site, Verdict, bounded, dice
from gatelodge.wire import ApiKey
from gatelodge_server.core.ids import api_key
from gatelodge_server.vault import system_entropy

_LEVEL = 0.01
_KNOWN = 20


def mann_whitney(first: list[float], second: list[float]) -> float:
    """The probability of ranks as far apart as these, or farther, if both samples come from the same distribution."""
    n, m = len(first), len(second)
    pooled = sorted([(value, 0) for value in first] + [(value, 1) for value in second])
    rank_sum, ties, rank = 0.0, 0, 0
    for _, tied in groupby(pooled, key=lambda pair: pair[0]):
        group = list(tied)
        count = len(group)
        rank_sum += sum(1 for _, which in group if which == 0) * (rank + (count + 1) / 2)
        ties += count**3 - count
        rank += count
    mean = n * (n + m + 1) / 2
    variance = n * m / 12 * ((n + m + 1) - ties / ((n + m) * (n + m - 1)))
    return math.erfc(abs(rank_sum - mean) / math.sqrt(2 * variance)) if variance else 1.0


async def _measure(site: Site, samples: int) -> Verdict:
    await site.start()
    key, chance = await asyncio.to_thread(site.partner), dice()
    caller = site.caller()
    known = [key]
    for number in range(_KNOWN - 1):
        answer = await caller.create_company(key, f"DE{number:09}")
        assert answer is not None
        known.append(answer.body["apiKey"])
    caller.close()
    ids = [parsed.id for text in known if (parsed := ApiKey.parse(text)) is not None]
    link = await Link.open(site.server.port, site.server.tls())
    times: tuple[list[float], list[float]] = ([], [])
    faults = set()
    warm_up = samples // 20
    for number in range(samples // 2 + warm_up):
        for which in chance.sample([0, 1], 2):
            fresh = api_key("gatelodge", "uat", "pk", system_entropy)
            asked = (
                fresh if which == 0 else ApiKey(fresh.brand, fresh.environment, fresh.kind, chance.choice(ids), fresh.secret)
            )
            begun = time.perf_counter()
            answer = await link.call("POST", "/auth/login", {"apiKey": asked.text})
            taken = time.perf_counter() - begun
            if answer.status != 401 or answer.body["code"] != "invalid_credential":
                faults.add(f"answer: {answer.status} {answer.body.get('code')}")
            if number >= warm_up:
                times[which].append(taken)
    link.close()
    await site.kill()
    p = mann_whitney(*times)
    unknown, wrong = (statistics.median(sample) * 1e6 for sample in times)
    if p <= _LEVEL:
        faults.add(f"timing: p = {p:.2g}, medians {unknown:.1f} and {wrong:.1f} us")
    counts = f"{samples} samples, p = {p:.3g}, medians {unknown:.1f} us (unknown id), {wrong:.1f} us (wrong secret)"
    return Verdict(counts, sorted(faults))


_NO_LIMIT = {"GATELODGE_LOGIN_FAILURE_LIMIT": "1000000/second"}


def run(ground: Ground) -> Verdict:
    """Measure the product."""
    return bounded(_measure(ground.site("timing", environ=_NO_LIMIT), ground.scale(20_000, 2_000)), seconds=300)


def control(ground: Ground) -> Verdict:
    """Measure a server that answers at once when nobody has a key of this id."""
    site = ground.site("timing-control", variant="telling", environ=_NO_LIMIT)
    return bounded(_measure(site, ground.scale(20_000, 2_000)), seconds=300)


EXPERIMENT = Experiment(
    name="timing",
    promise="an unknown key id and a wrong secret take the same time",
    run=run,
    control=control,
    control_says="a server that answers at once when there is no key of that id",
    finds="timing: ",
)
