"""What two nodes may do at once on a database that has more than one writer."""

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from sqlalchemy import ColumnElement, Connection, Insert, Table, func, select, tuple_
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler


class _UnlessThere(Insert):
    """An insert that does nothing if there is a row with its primary key: one form for what both databases say alike."""

    inherit_cache = True


@compiles(_UnlessThere)
def _say_unless_there(new: _UnlessThere, compiler: SQLCompiler, **options: Any) -> str:  # noqa: ANN401 - SQLAlchemy's signature
    table = new.table
    key = ", ".join(map(compiler.preparer.format_column, table.primary_key))
    inserting = compiler.visit_insert(new, **options)  # type: ignore[no-untyped-call]  # SQLAlchemy has no types for it
    return f"{inserting} ON CONFLICT ({key}) DO NOTHING"


def insert_unless_there(connection: Connection, table: Table, row: Mapping[str, object]) -> None:
    """Insert a row, unless there is one with its primary key.

    If another node is about to insert that, its commit is waited for. The row can be read afterwards, by any other statement:
    each sees what was committed before it began. Whatever else is wrong with a row is a fault, as ever.
    """
    connection.execute(_UnlessThere(table), row)


class Turn(IntEnum):
    """What is done by one node at a time, though there is no row to lock."""

    APPENDING = 0x6761_7465_0002
    """To the change sequence. Else a reader could see a step, go on behind it, and never see the one before, which was
    committed later. To be asked for when all rows are locked, so that whoever waits holds up nobody whom it waits for."""
    COUNTING_MAILS = 0x6761_7465_0003
    """Mails are counted, and one more is queued. To be asked for before anything is locked."""
    COUNTING_VERIFIERS = 0x6761_7465_0004
    """Verifiers are counted, and some more are let in."""


def wait_for_turn(connection: Connection, turn: Turn) -> None:
    """From here to its commit nobody else has this turn. SQLite has one writer anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(turn.value)))


def take_turn(connection: Connection, turn: Turn) -> bool:
    """The same for whoever does not wait: whether the turn is had."""
    if connection.dialect.name == "postgresql":
        return bool(connection.execute(select(func.pg_try_advisory_xact_lock(turn.value))).scalar_one())
    return True


def unheld(table: Table, *which: ColumnElement[bool]) -> ColumnElement[bool]:
    """Of the rows that ``which`` says, those that nobody else holds; they are locked.

    For what can be done to the others another time. Who waits for no row is in no circle, in whatever order rows are found.
    """
    key = list(table.primary_key.columns)
    free = select(*key).where(*which).with_for_update(skip_locked=True)
    return (key[0] if len(key) == 1 else tuple_(*key)).in_(free)
