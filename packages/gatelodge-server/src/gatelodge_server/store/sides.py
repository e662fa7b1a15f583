"""The two databases of ``database copy``, seen alike: short transactions, and one long look at a moment of each.

A side belongs to the thread that has made it. All that it does is done when its call returns.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import AbstractContextManager, aclosing, closing, contextmanager, suppress
from typing import Any, Final, Protocol, TypeVar

from sqlalchemy import Connection, Engine, Select, Table, event
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.schema import AddConstraint, CreateIndex, DropConstraint, DropIndex

from gatelodge_server.store.address import Address, PostgresAddress, SqliteAddress
from gatelodge_server.store.faults import DatabaseFault, UnfitRow
from gatelodge_server.store.relocation import COPIED
from gatelodge_server.store.sqlite import UPGRADE_TIMEOUT, sqlite_engine
from gatelodge_server.store.tables import AnyRow

Result = TypeVar("Result")
Verb = Callable[[Connection], Result]

_PATIENCE: Final = 60.0
"""Seconds after which a server that does not answer is taken to be gone."""
_LONG_PATIENCE: Final = 3600.0
"""The same while it makes indexes and looks whether all that is referred to is there."""
_CLOSE_PATIENCE: Final = 3.0
_READ_AHEAD: Final = 1000
"""Rows."""


class Snapshot(Protocol):
    """One moment of a database."""

    dialect: str

    def rows(self, query: Select[Any]) -> Generator[AnyRow, None, None]:
        """The rows of a query, a few at a time. Raises ``DatabaseFault``."""
        ...


class Side(Protocol):
    """One of the two databases. Everything here raises ``DatabaseFault``."""

    dialect: str

    def read(self, verb: Verb[Result]) -> Result:
        """Run ``verb``, which only reads, in a transaction."""
        ...

    def write(self, verb: Verb[Result], *, long: bool = False) -> Result:
        """Run ``verb`` in a transaction; it is durable when this returns. ``long``: it may take an hour."""
        ...

    def snapshot(self) -> AbstractContextManager[Snapshot]:
        """One moment, for as long as it is looked at."""
        ...

    def close(self) -> None:
        """Let go of the database."""
        ...


def side_of(address: Address) -> Side:
    """The database at an address, which is there."""
    if isinstance(address, SqliteAddress):
        return _SqliteSide(address)
    return _PostgresSide(address)


def loosen(connection: Connection) -> None:
    """Let rows come in any order: nothing that they refer to need be there yet, and what is unique may be there twice.

    Rows are copied while the old database changes them, so that they fit together only when it has ended to.
    """
    for table in COPIED:
        for index in table.indexes:
            if index.unique:
                connection.execute(DropIndex(index, if_exists=True))
        if connection.dialect.name == "postgresql":
            for constraint in table.foreign_key_constraints:
                connection.execute(DropConstraint(constraint, if_exists=True))


def tighten(connection: Connection) -> None:
    """Take the rules back into force, which looks whether they are kept. Raises ``UnfitRow`` if not."""
    loosen(connection)  # where they are in force already
    try:
        _restore_rules(connection)
    except IntegrityError as fault:
        raise UnfitRow(str(fault.orig).partition("\n")[0]) from fault
    if connection.dialect.name == "sqlite" and (found := connection.exec_driver_sql("PRAGMA foreign_key_check").first()):
        raise UnfitRow(f"{found[0]} has rows that refer to others which are not there")


def _restore_rules(connection: Connection) -> None:
    for table in COPIED:
        for index in table.indexes:
            if index.unique:
                connection.execute(CreateIndex(index))
        if connection.dialect.name == "postgresql":
            for constraint in table.foreign_key_constraints:
                connection.execute(AddConstraint(constraint, isolate_from_table=False))


def high_water(connection: Connection, table: Table) -> int:
    """The largest number that a table has ever given to a row of its own."""
    if connection.dialect.name == "postgresql":
        name = connection.exec_driver_sql(f"SELECT pg_get_serial_sequence('\"{table.name}\"', 'sequence')").scalar_one()
        last, is_called = connection.exec_driver_sql(f"SELECT last_value, is_called FROM {name}").one()  # noqa: S608 - its own name
        return int(last) if is_called else 0
    found = connection.exec_driver_sql("SELECT seq FROM sqlite_sequence WHERE name = ?", (table.name,)).scalar_one_or_none()
    return int(found or 0)


def raise_water(connection: Connection, table: Table, number: int) -> None:
    """Let a table number its next row after ``number``."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(
            f"SELECT setval(pg_get_serial_sequence('\"{table.name}\"', 'sequence'), $1, $2)", (max(number, 1), number > 0)
        )
        return
    connection.exec_driver_sql("DELETE FROM sqlite_sequence WHERE name = ?", (table.name,))
    connection.exec_driver_sql("INSERT INTO sqlite_sequence (name, seq) VALUES (?, ?)", (table.name, number))


class _SqliteSide:
    dialect = "sqlite"

    def __init__(self, address: SqliteAddress) -> None:
        self._reader = sqlite_engine(address.path, begin="BEGIN", readers=2)
        self._writer = sqlite_engine(address.path, lock_timeout=UPGRADE_TIMEOUT)
        event.listen(self._writer, "connect", _refer_to_anything)

    def read(self, verb: Verb[Result]) -> Result:
        return self._run(self._reader, verb)

    def write(self, verb: Verb[Result], *, long: bool = False) -> Result:
        del long  # nobody else keeps us waiting here
        return self._run(self._writer, verb)

    def _run(self, engine: Engine, verb: Verb[Result]) -> Result:
        with _telling(), engine.begin() as connection:
            return verb(connection)

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        with _telling(), self._reader.begin() as connection:
            yield _Looking(connection, lambda verb: verb(connection))

    def close(self) -> None:
        self._reader.dispose()
        self._writer.dispose()


def _refer_to_anything(connection: sqlite3.Connection, _: ConnectionPoolEntry) -> None:
    connection.execute("PRAGMA foreign_keys = OFF")


class _PostgresSide:
    dialect = "postgresql"

    def __init__(self, address: PostgresAddress) -> None:
        # Imported by those who use it, as in ``database_at``.
        from gatelodge_server.store.postgres import postgres_engine  # noqa: PLC0415

        self._loop = asyncio.Runner()
        self._engine = postgres_engine(address, pool=2)

    def read(self, verb: Verb[Result]) -> Result:
        return self._transact(verb, _PATIENCE)

    def write(self, verb: Verb[Result], *, long: bool = False) -> Result:
        return self._transact(verb, _LONG_PATIENCE if long else _PATIENCE)

    def _transact(self, verb: Verb[Result], patience: float) -> Result:
        from gatelodge_server.store.postgres import commit  # noqa: PLC0415

        async def run() -> Result:
            async with aclosing(await self._engine.connect()) as connection:
                async with asyncio.timeout(patience):
                    await connection.begin()
                    outcome = await connection.run_sync(verb)
                await commit(connection)
                return outcome

        with _telling():
            return self._loop.run(run())

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        async def begin() -> AsyncConnection:
            async with asyncio.timeout(_PATIENCE):
                connection = await self._engine.connect()
                await connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
                # The other side may take its time between two rows.
                await connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
                return connection

        async def ask(connection: AsyncConnection, verb: Verb[Any]) -> Any:  # noqa: ANN401 - whatever the verb answers
            async with asyncio.timeout(_PATIENCE):
                return await connection.run_sync(verb)

        with _telling():
            connection = self._loop.run(begin())
            try:
                sync = connection.sync_connection
                assert sync is not None  # noqa: S101 - it is open
                yield _Looking(sync, lambda verb: self._loop.run(ask(connection, verb)))
            finally:
                self._let_go(connection.close)

    def close(self) -> None:
        self._let_go(self._engine.dispose)
        self._loop.close()

    def _let_go(self, of: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async def run() -> None:
            async with asyncio.timeout(_CLOSE_PATIENCE):
                await of()

        with suppress(DatabaseFault), _telling():  # of a server that is gone already
            self._loop.run(run())


class _Looking:
    """A snapshot: what is done with its ``connection`` is done by ``run``."""

    def __init__(self, connection: Connection, run: Callable[[Verb[Any]], Any]) -> None:
        self.dialect = connection.dialect.name
        self._run = run

    def rows(self, query: Select[Any]) -> Generator[AnyRow, None, None]:
        ahead = {"stream_results": True, "max_row_buffer": _READ_AHEAD}
        result = self._run(lambda connection: connection.execute(query, execution_options=ahead))
        with closing(_Cursor(self._run, result)):
            while some := self._run(lambda _: result.fetchmany(_READ_AHEAD)):
                yield from some


class _Cursor:
    def __init__(self, run: Callable[[Verb[Any]], Any], result: Any) -> None:  # noqa: ANN401 - SQLAlchemy's
        self._run = run
        self._result = result

    def close(self) -> None:
        self._run(lambda _: self._result.close())


@contextmanager
def _telling() -> Iterator[None]:
    """Say what keeps a database from being used in a line that has no value of a row in it."""
    from gatelodge_server.store.postgres import FAULTS, say  # noqa: PLC0415

    try:
        yield
    except DBAPIError as fault:
        text = say(fault)
        # SQLite's says what it could not read.
        raise DatabaseFault("a text in it is no UTF-8" if "decode to UTF-8" in text else text) from fault
    except FAULTS as fault:
        raise DatabaseFault(say(fault)) from fault
