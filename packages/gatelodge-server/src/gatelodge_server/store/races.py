"""What two nodes may do at once on a database that has more than one writer."""

from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Final

from sqlalchemy import ColumnElement, Connection, Table, func, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite

_INSERT: Final[Mapping[str, Callable[[Table], postgresql.Insert | sqlite.Insert]]] = {
    "postgresql": postgresql.insert,
    "sqlite": sqlite.insert,
}


def insert_unless_there(connection: Connection, table: Table, row: Mapping[str, object]) -> None:
    """Insert a row, unless there is one with its primary key.

    If another node is about to insert that, its commit is waited for. The row can be read afterwards, by any other statement:
    each sees what was committed before it began. Whatever else is wrong with a row is a fault, as ever.
    """
    new = _INSERT[connection.dialect.name](table).values(dict(row))
    connection.execute(new.on_conflict_do_nothing(index_elements=table.primary_key.columns))


class Turn(IntEnum):
    """What is done by one node at a time, though there is no row to lock."""

    APPENDING = 0x6761_7465_0002
    """To the change sequence. Else a reader could see a step, go on behind it, and never see the one before, which was
    committed later. To be asked for when all rows are locked, so that whoever waits holds up nobody whom it waits for."""
    COUNTING_MAILS = 0x6761_7465_0003
    """Mails are counted, and one more is queued. To be asked for before anything is locked."""
    COUNTING_VERIFIERS = 0x6761_7465_0004
    """Verifiers are counted, and one more is let in. To be asked for before anything is locked."""


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
