"""The bell: eight bytes of memory that all processes on one machine share, so that a change is heard of without a query.

The file stands beside the database. Whoever commits a change writes a number that has not been there before, 64 random bits, so
a number that has not changed means that nobody has rung since. It is no part of the database, nor of its backups: a stale one
costs a reading that finds nothing. Should somebody take the file away, processes that were started before and after no longer
hear each other ring, and learn of changes by the readings that are done anyway.
"""

import mmap
import os
from pathlib import Path
from typing import Final

BELL_SIZE: Final = 8
"""In bytes."""


class Bell:
    """The bell of the database at ``path``. Raises ``OSError`` if its file cannot be made or opened."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(descriptor).st_size <= BELL_SIZE:
                # Written and not just extended: a page of a hole that the disk has no room for would be a SIGBUS. Written
                # behind the number: who makes the file at the same time may have rung it already.
                os.pwrite(descriptor, b"\0", BELL_SIZE)
            self._memory = mmap.mmap(descriptor, BELL_SIZE)
        finally:
            os.close(descriptor)
        self._number = memoryview(self._memory).cast("Q")

    def ring(self, number: int) -> None:
        """Let everybody hear that something is committed. One aligned store: nobody sees half a number."""
        self._number[0] = number

    def __call__(self) -> int:
        """What was rung last."""
        return self._number[0]

    def close(self) -> None:
        """Let go of the file."""
        self._number.release()
        self._memory.close()
