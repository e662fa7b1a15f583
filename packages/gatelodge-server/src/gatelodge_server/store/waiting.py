"""A line of jobs before a few threads: nobody stands in it for longer than a while, and it is never too long.

What the threads wait for, such as a database that another process holds, all who stand behind wait for as well. So a job has
one deadline, from the moment at which it is queued: one that has not begun by then never begins, and one that begins is told
how much of its time is left. One that has begun is waited for however long it takes, since it may have been done.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from gatelodge.errors import Unavailable

Result = TypeVar("Result")

LONGEST: Final = 1024
"""How many jobs stand in a line at most."""


class WaitingLine:
    """Runs jobs on ``threads`` threads, in the order in which they are queued.

    ``patience`` is in seconds. ``on_late`` is told of each job whose time is over before it begins.
    """

    def __init__(
        self, threads: int, *, name: str, patience: float, on_late: Callable[[], None], longest: int = LONGEST
    ) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._patience = patience
        self._on_late = on_late
        self._longest = longest
        # Those that no thread has come to, also if nobody waits for them any more: their memory is still taken.
        self._waiting: set[threading.Lock] = set()

    async def __call__(self, job: Callable[[float], Result]) -> Result:
        """What ``job`` gives, which is told how many seconds it has. Raises ``Unavailable`` if it has not been begun."""
        if len(self._waiting) >= self._longest:
            raise Unavailable
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience
        # Whoever gets it, and it is let go by nobody, says what becomes of the job: the thread that begins it, or we, who go.
        turn = threading.Lock()

        def run() -> Result:
            self._waiting.discard(turn)
            left = deadline - loop.time()
            if left <= 0 or not turn.acquire(blocking=False):
                raise Unavailable
            return job(left)

        self._waiting.add(turn)
        running = loop.run_in_executor(self._pool, run)
        running.add_done_callback(_hear)
        try:
            await asyncio.wait((running,), timeout=self._patience)
        finally:
            has_not_begun = turn.acquire(blocking=False)
        if has_not_begun:
            self._on_late()
            raise Unavailable
        return await running

    async def close(self) -> None:
        """Let what stands in the line be done, and end the threads."""
        await asyncio.to_thread(self._pool.shutdown)


def _hear(running: "asyncio.Future[Result]") -> None:
    if not running.cancelled():
        running.exception()  # whoever still waits for it hears of it
