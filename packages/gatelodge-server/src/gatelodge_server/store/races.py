"""What two nodes may do at once on a database that has more than one writer."""

from collections.abc import Mapping
from enum import IntEnum

from sqlalchemy import Connection, Table, func, insert, select
from sqlalchemy.exc import IntegrityError


def insert_unless_there(connection: Connection, table: Table, row: Mapping[str, object]) -> None:
    """Insert a row, unless another node has just done so: its commit has been waited for then, and the row can be read.

    Databases have a clause for this, each its own. A savepoint is known to all of them, and is needed once in a row's life.
    """
    try:
        with connection.begin_nested():
            connection.execute(insert(table), row)
    except IntegrityError:
        pass


class Turn(IntEnum):
    """What is done by one node at a time, though there is no row to lock."""

    APPENDING = 0x6761_7465_0002
    """To the change sequence. Else a reader could see a step, go on behind it, and never see the one before, which was
    committed later. To be asked for when all rows are locked, so that whoever waits holds up nobody whom it waits for."""
    COUNTING_MAILS = 0x6761_7465_0003
    """Mails are counted, and one more is queued. To be asked for before anything is locked."""


def wait_for_turn(connection: Connection, turn: Turn) -> None:
    """From here to its commit nobody else has this turn. SQLite has one writer anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(turn.value)))
