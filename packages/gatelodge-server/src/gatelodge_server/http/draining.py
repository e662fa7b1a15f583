"""That this process is about to stop. Whoever keeps a caller waiting, or is asked whether the process is ready, must know."""

import asyncio


class Draining:
    """Begins once and never ends.

    A handler that waits for something to happen waits for this too, answers with what it has, and so frees its caller to ask
    a process that stays::

        async with asyncio.timeout(seconds):
            await first_of(something, draining.wait())
    """

    def __init__(self) -> None:
        self._begun = asyncio.Event()

    @property
    def has_begun(self) -> bool:
        """Whether the process is about to stop."""
        return self._begun.is_set()

    def begin(self) -> None:
        """Let everybody know. To be called in the event loop."""
        self._begun.set()

    async def wait(self) -> None:
        """Return once it has begun."""
        await self._begun.wait()
