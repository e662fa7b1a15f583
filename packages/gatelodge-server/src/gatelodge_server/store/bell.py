"""The bell: eight bytes of memory that all processes on one machine share, so that a change is heard of without a query.

The file stands beside the database. Its number is the last step of the change sequence that its committer has told; each
committer writes a number that nobody else writes, so a number that has not changed means that nobody has rung since. It is no
part of the database: a stale one costs a reading that finds nothing. Should somebody take the file away, processes that were
started before and after no longer hear each other ring, and learn of changes by the readings that are done anyway.
"""

import mmap
import os
from pathlib import Path

_SIZE = 8


class Bell:
    """The bell of the database at ``path``. Raises ``OSError`` if its file cannot be made or opened."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(descriptor).st_size <= _SIZE:
                # Written and not just extended: a page of a hole that the disk has no room for would be a SIGBUS. Written
                # behind the number: who makes the file at the same time may have rung it already.
                os.pwrite(descriptor, b"\0", _SIZE)
            self._memory = mmap.mmap(descriptor, _SIZE)
        finally:
            os.close(descriptor)
        self._number = memoryview(self._memory).cast("Q")

    def ring(self, sequence: int) -> None:
        """Let everybody hear that this step is committed. One aligned store: nobody sees half a number."""
        self._number[0] = sequence

    def __call__(self) -> int:
        """What was rung last."""
        return self._number[0]

    def close(self) -> None:
        """Let go of the file."""
        self._number.release()
        self._memory.close()
