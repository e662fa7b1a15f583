"""A service of somebody else's that lets session JWTs in and asks nobody: a process with an offline ``Verifier``.

`Outsider` is its handle. The process reads lines of `NUMBER JWT` and answers each with `NUMBER WORD`: `accepted`, or the code
of a refusal. It follows the feed of revocations of one node. It ends when its standard input does.
"""

import argparse
import asyncio
import contextlib
import itertools
import logging
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

from gatelodge import Rejected, RemoteKeys, RemoteRevocations, TokenRules, Unavailable, Verifier, https_fetch

ACCEPTED: Final = "accepted"
AUDIENCE: Final = "partner-api-uat"
_TIMEOUT: Final = 5.0
_LINE_MAX: Final = 1 << 17


class Outsider:
    """A verifier in a process of its own. Belongs to the event loop in which it was started."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[str]] = {}
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, port: int, authority: Path, *, issuer: str, max_staleness: float, looks_at_age: bool = True) -> Self:
        """Start one that follows the node behind ``port``."""
        command = [sys.executable, "-m", "experiments.outsider", f"https://localhost:{port}", str(authority), issuer]
        command += [str(max_staleness)] + ([] if looks_at_age else ["--ageless"])
        pipe = asyncio.subprocess.PIPE
        return cls(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=_LINE_MAX))

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def ask(self, jwt: str) -> str:
        """What it says of a JWT: ``ACCEPTED``, or the code of its refusal."""
        if self._reading.done():
            raise EOFError("the verifier has ended")
        number = next(self._numbers)
        said: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting[number] = said
        assert self._process.stdin is not None
        self._process.stdin.write(f"{number} {jwt}\n".encode("ascii"))
        return await said

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            number, word = line.decode("ascii").split()
            said = self._waiting.pop(int(number))
            if not said.done():  # whoever asked may have gone away
                said.set_result(word)
        for said in self._waiting.values():
            if not said.done():
                said.set_exception(EOFError("the verifier has ended"))

    async def end(self) -> None:
        """End it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        await self._reading


def since_boot() -> float:
    """Seconds since this machine was started, those included in which it slept."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _verifier(url: str, authority: str, issuer: str, max_staleness: float, clock: Callable[[], float]) -> Verifier:
    fetch = https_fetch(timeout=_TIMEOUT, context=ssl.create_default_context(cafile=authority))
    revocations = RemoteRevocations(
        f"{url}/auth/revocations", max_staleness=max_staleness, timeout=_TIMEOUT, name="outsider", fetch=fetch, clock=clock
    )
    keys = RemoteKeys(f"{url}/.well-known/jwks.json", fetch=fetch)
    return Verifier(keys, TokenRules.for_sessions(issuer=issuer, audience=AUDIENCE), revocations=revocations)


async def _judge(verifier: Verifier, number: str, jwt: str) -> None:
    try:
        await verifier.verify_async(jwt)
    except (Rejected, Unavailable) as refusal:
        word = refusal.code
    else:
        word = ACCEPTED
    sys.stdout.write(f"{number} {word}\n")
    sys.stdout.flush()


async def _answer(verifier: Verifier) -> None:
    reader = asyncio.StreamReader(limit=_LINE_MAX)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with asyncio.TaskGroup() as group:
        while line := await reader.readline():
            number, jwt = line.decode("ascii").split()
            group.create_task(_judge(verifier, number, jwt))


def main() -> None:
    """Answer until nobody asks any more."""
    parser = argparse.ArgumentParser(prog="experiments.outsider")
    parser.add_argument("url")
    parser.add_argument("authority")
    parser.add_argument("issuer")
    parser.add_argument("max_staleness", type=float)
    parser.add_argument("--ageless", action="store_true", help="it never looks at the age of what it knows")
    given = parser.parse_args()
    logging.getLogger("gatelodge").setLevel(logging.ERROR)  # that a wire is cut is meant
    clock = (lambda: 0.0) if given.ageless else since_boot
    asyncio.run(_answer(_verifier(given.url, given.authority, given.issuer, given.max_staleness, clock)))


if __name__ == "__main__":
    main()
