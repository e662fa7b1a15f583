"""The embedded database: one file, one writer thread, a few readers.

Everything that is particular to SQLite stands here, so that the verbs need not know it:

- a transaction that writes begins with ``BEGIN IMMEDIATE``: whoever has begun is alone, and what a verb has read stays true
  until it commits. Where other databases lock rows (``FOR UPDATE``), SQLAlchemy leaves the clause out here;
- WAL and ``synchronous=FULL``: a commit returns when its frames are on the disk;
- a transaction that has appended to the change sequence rings the bell (``store/bell.py``) before its caller hears of it;
- after any fault the connections are thrown away: what a failed fsync has left in a page cache is not to be trusted;
- a transaction begins within ``LOCK_TIMEOUT`` of being asked for, or never (``store/waiting.py``): each waits for the lock with
  what is left of its own time, so that those behind it in the line do not wait theirs one after the other.
"""

import asyncio
import contextlib
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Concatenate, Final, ParamSpec, TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, NotSupportedError, OperationalError, ProgrammingError
from sqlalchemy.pool import ConnectionPoolEntry

from gatelodge.errors import Unavailable
from gatelodge_server.core.model import Entropy
from gatelodge_server.store.bell import BELL_SIZE, Bell
from gatelodge_server.store.faults import DatabaseFault
from gatelodge_server.store.trail import LAST_CHANGE
from gatelodge_server.store.waiting import WaitingLine

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

LOCK_TIMEOUT: Final = 5.0
"""Seconds for which a transaction waits, in the line and for the writer of another process together."""
UPGRADE_TIMEOUT: Final = 60.0
"""The same, for whoever starts while others upgrade the schema."""
_JOURNAL_PAUSE: Final = 0.02
_READERS: Final = 2
_MISTAKES: Final = (DataError, IntegrityError, NotSupportedError, ProgrammingError)
_PRAGMAS: Final = (
    "PRAGMA synchronous = FULL",
    "PRAGMA foreign_keys = ON",
    # A checkpoint costs fsyncs of its own and its commit waits for it: rarer and larger is cheaper.
    "PRAGMA wal_autocheckpoint = 8000",
    "PRAGMA cache_size = -16000",
)


def sqlite_engine(
    path: Path, *, begin: str = "BEGIN IMMEDIATE", readers: int = 1, lock_timeout: float = LOCK_TIMEOUT
) -> Engine:
    """An engine over the file at ``path`` whose transactions begin with ``begin``. ``lock_timeout`` is in seconds."""
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        pool_size=readers,
        max_overflow=0,
        hide_parameters=True,  # no value of a row in an error or a log
        connect_args={"timeout": lock_timeout, "check_same_thread": False},
    )

    def on_connect(connection: sqlite3.Connection, _: ConnectionPoolEntry) -> None:
        connection.isolation_level = None  # begin and commit are said, by SQLAlchemy, and not guessed by the driver
        _write_ahead(connection, time.monotonic() + lock_timeout)
        for pragma in _PRAGMAS:
            connection.execute(pragma)

    def on_begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "begin", on_begin)
    event.listen(engine, "handle_error", _tell_closed)
    return engine


def _tell_closed(context: ExceptionContext) -> BaseException | None:
    """A database that is closed to writes (``store/relocation.py``) says so by a trigger, which is no violated constraint."""
    fault = context.original_exception
    if getattr(fault, "sqlite_errorcode", None) == sqlite3.SQLITE_CONSTRAINT_TRIGGER:
        return OperationalError(context.statement, None, fault, hide_parameters=True)
    return None


def _write_ahead(connection: sqlite3.Connection, deadline: float) -> None:
    """Have a write-ahead log. A database that is new gets it once, from one of those who open it at the same time."""
    while connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            # SQLite does not wait for this lock: whoever holds it is about to make the same change.
            if time.monotonic() >= deadline:
                raise
            time.sleep(_JOURNAL_PAUSE)


class SqliteDatabase:
    """The file at ``path``, for starts and commands."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def make_room(self) -> None:
        """Make its directory. Raises ``OSError``."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)

    def is_new(self) -> bool:
        """Whether there is no file yet."""
        return not self._path.exists()

    def read(self, verb: Callable[[Connection], Result]) -> Result:
        """Run ``verb``, which only reads. Raises ``DatabaseFault``."""
        return self._run(verb, sqlite_engine(self._path, begin="BEGIN"))

    def upgrade(self, verb: Callable[[Connection], Result]) -> Result:
        """Run ``verb`` in one transaction. Raises ``DatabaseFault``."""
        return self._run(verb, sqlite_engine(self._path, lock_timeout=UPGRADE_TIMEOUT))

    def _run(self, verb: Callable[[Connection], Result], engine: Engine) -> Result:
        try:
            with engine.begin() as connection:
                return verb(connection)
        except DBAPIError as fault:
            raise DatabaseFault(str(fault.orig)) from fault
        finally:
            engine.dispose()

    def driver(self, *, on_fault: Callable[[str], None]) -> "SqliteDriver":
        """What a store runs its verbs on."""
        return SqliteDriver(self._path, on_fault=on_fault)


class SqliteDriver:
    """Runs verbs on the file at ``path``: one that writes at a time, those that only read beside it."""

    at_once = 1
    """The work is done in this process: two transactions would only take turns."""

    def __init__(
        self,
        path: Path,
        *,
        on_fault: Callable[[str], None],
        bell_at: Callable[[Path], Bell] = Bell,
        entropy: Entropy = os.urandom,
    ) -> None:
        # By one name, whichever way leads to it: the bell and SQLite's own files stand beside the database itself.
        path = path.resolve()
        self._writer = sqlite_engine(path)
        self._reader = sqlite_engine(path, begin="BEGIN", readers=_READERS)
        self._writing = WaitingLine(1, name="store-write", patience=LOCK_TIMEOUT, on_late=self._tell_late)
        self._reading = WaitingLine(_READERS, name="store-read", patience=LOCK_TIMEOUT, on_late=self._tell_late)
        self._on_fault = on_fault
        self._bell_at = bell_at
        self._entropy = entropy
        self._bell_path = path.with_name(path.name + "-bell")
        self._bell: Bell | None = None
        self._hanging = threading.Lock()

    def bell(self) -> int:
        """What the bell rang last. Raises ``Unavailable``."""
        return (self._bell or self._hang_bell())()

    async def listen(self) -> None:
        """Wait until cancelled: the bell is heard by whoever looks at it."""
        await asyncio.Event().wait()

    def _hang_bell(self) -> Bell:
        with self._hanging:
            if self._bell is None:
                try:
                    self._bell = self._bell_at(self._bell_path)
                except OSError as fault:
                    self._on_fault(f"no bell: {fault.strerror}")
                    raise Unavailable from fault
            return self._bell

    async def write(
        self,
        verb: Callable[Concatenate[Connection, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """Run ``verb`` in a transaction; it is on the disk when this returns. Raises ``Unavailable``."""
        return await self._in_line(self._writing, self._writer, verb, *args, **kwargs)

    async def read(
        self,
        verb: Callable[Concatenate[Connection, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """Run ``verb``, which only reads, over one snapshot. Raises ``Unavailable``."""
        return await self._in_line(self._reading, self._reader, verb, *args, **kwargs)

    read_current = read
    """There is one file, and whoever reads it sees what was committed before."""

    def _tell_late(self) -> None:
        self._on_fault("no turn in time")

    async def _in_line(
        self,
        line: WaitingLine,
        engine: Engine,
        verb: Callable[Concatenate[Connection, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        def transaction(left: float) -> Result:
            bell = self._bell or self._hang_bell()  # before anything is done that nobody would hear of
            with self._faults(engine), engine.connect() as connection:
                connection.info.pop(LAST_CHANGE, None)
                # Past SQLAlchemy, which would begin for it.
                connection.connection.cursor().execute(f"PRAGMA busy_timeout = {math.ceil(left * 1000)}")
                with connection.begin():
                    outcome = verb(connection, *args, **kwargs)
                has_changed = connection.info.pop(LAST_CHANGE, None) is not None
            if has_changed:
                # Not the step's own number: where a backup has been restored the same step is taken a second time, and
                # whoever had heard of the first would not hear of the second.
                bell.ring(int.from_bytes(self._entropy(BELL_SIZE), "big"))
            return outcome

        return await line(transaction)

    @contextlib.contextmanager
    def _faults(self, engine: Engine) -> Iterator[None]:
        try:
            yield
        except _MISTAKES:
            raise  # in a verb, and so ours: no reason to tell the caller to try again
        except DBAPIError as fault:
            engine.dispose()
            self._on_fault(str(fault.orig))
            raise Unavailable from fault

    async def close(self) -> None:
        """Finish what has begun and let go of the file."""
        for line in (self._writing, self._reading):
            await line.close()
        for engine in (self._reader, self._writer):
            engine.dispose()
        if self._bell is not None:
            self._bell.close()
