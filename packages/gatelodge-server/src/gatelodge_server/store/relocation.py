"""A deployment moves into another database: what stands in the two of them, so that never both are in use.

The old database (``Role.SOURCE``) and the new one (``Role.TARGET``) each have one row:

====================  ===================  ==================================================================================
old                   new                  what is so
====================  ===================  ==================================================================================
copying               copying              the old one is in use as ever; nobody starts on the new one
closed                copying              the old one takes no writes: nothing changes any more
gone                  copying              the old one is not read either, nor will it be unless the new one is given up
gone                  complete             the new one is in use, for good
gone                  abandoned            the new one is of no use to anybody; the old one is about to be opened again
====================  ===================  ==================================================================================

From ``closed`` the way back needs the old database only: the new one cannot become complete while the old one is not gone. From
``gone`` it leads over the new one, whose row says which of the two came first: complete, or abandoned.

What closes the old database is no check in the verbs but triggers that refuse every write. Before there are any, they cost
nothing; they are there from one commit on, for every node, whatever version of the program it runs; and whoever wrote before
has committed before.
"""

import shlex
from enum import StrEnum
from typing import Final, NamedTuple

from sqlalchemy import Connection, Table, delete, insert, inspect, select, update

from gatelodge.errors import Unavailable
from gatelodge_server.core.model import Instant
from gatelodge_server.store.tables import metadata, relocation, tier

_THE_ONE: Final = 1
COPIED: Final = tuple(table for table in metadata.sorted_tables if table is not relocation)
"""All that is moved, what is referred to first."""
_REFUSAL: Final = "the deployment has moved to another database, or is about to"
_FUNCTION: Final = "gatelodge_refuse_write"
_TRIGGER: Final = "gatelodge_moved"
_READ_ONLY: Final = "25006"
"""SQLSTATE read_only_sql_transaction: the driver knows it, from a server that another has taken the place of."""
_SQLITE_WRITES: Final = ("INSERT", "UPDATE", "DELETE")


class Role(StrEnum):
    """Which of the two databases it is."""

    SOURCE = "source"
    TARGET = "target"


class State(StrEnum):
    """How far the move has come, as this database knows it."""

    COPYING = "copying"
    CLOSED = "closed"
    GONE = "gone"
    COMPLETE = "complete"
    ABANDONED = "abandoned"


class Relocation(NamedTuple):
    """The row. ``other`` is an address without a password, ``progress`` the copier's own."""

    move: bytes
    role: Role
    state: State
    other: str
    progress: str | None = None


class Overtaken(Exception):
    """The row does not say what it must: somebody else goes on with the move, or has given it up."""


def find_relocation(connection: Connection) -> Relocation | None:
    """The row, if the database is one of two."""
    found = select(relocation.c.move, relocation.c.role, relocation.c.state, relocation.c.other, relocation.c.progress)
    row = connection.execute(found).one_or_none()
    return None if row is None else Relocation(row.move, Role(row.role), State(row.state), row.other, row.progress)


def why_not_used(connection: Connection) -> str | None:
    """Why nobody may start on this database, and what to do; ``None`` if nothing speaks against it."""
    if not inspect(connection).has_table(relocation.name):
        return None
    found = find_relocation(connection)
    if found is None:
        return None
    why = _WHY_NOT.get((found.role, found.state), "")
    # What is to be pasted is quoted: an address may have an `&`.
    return why.replace("OTHER`", f"{shlex.quote(found.other)}`").replace("OTHER", found.other) or None


_GIVE_UP: Final = "`gatelodge database copy --abandon`"
_GO_ON: Final = "run `gatelodge database copy --to OTHER` again to finish that"
_WHY_NOT: Final = {
    (Role.SOURCE, State.CLOSED): f"is being moved to OTHER and takes no writes: {_GO_ON}, or {_GIVE_UP} to stay here",
    (Role.SOURCE, State.GONE): f"has been moved: start with `--database OTHER`. If that is refused as incomplete, {_GO_ON}",
    (Role.TARGET, State.COPYING): "is an incomplete copy of OTHER: run `gatelodge database copy` there again to finish it",
    (Role.TARGET, State.ABANDONED): "is a copy of OTHER that was given up: start there, and drop this one",
}


def refuse_gone(connection: Connection) -> None:
    """Raise ``Unavailable`` if this database is not read any more. Asked by whoever follows changes: none will come.

    Without this a node that was left running on the old database would never hear what is revoked on the new one.
    """
    state = connection.execute(select(relocation.c.state).where(relocation.c.id == _THE_ONE)).scalar_one_or_none()
    if state == State.GONE:
        raise Unavailable


# --- the old database -----------------------------------------------------------------------------------------------------


def begin_move(connection: Connection, move: bytes, other: str, *, now: Instant) -> None:
    """Write down that this database is copied. Raises ``Overtaken`` if it is closed for a move already."""
    found = find_relocation(connection)
    if found is not None and found.role is Role.SOURCE and found.state is not State.COPYING:
        raise Overtaken
    _put(connection, {"move": move, "role": Role.SOURCE, "state": State.COPYING, "other": other, "changed_at": now})


def close(connection: Connection, move: bytes, *, now: Instant) -> None:
    """Take no writes any more, from anybody. Whoever writes at the moment is waited for. Raises ``Overtaken``."""
    if not _advance(connection, move, Role.SOURCE, (State.COPYING,), State.CLOSED, now):
        _hold(connection, move, Role.SOURCE, State.CLOSED)  # by an earlier run
        return
    quote = connection.dialect.identifier_preparer.format_table
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET LOCAL lock_timeout = '3s'")  # those who want to write wait behind us
        connection.exec_driver_sql(f"LOCK TABLE {', '.join(map(quote, COPIED))} IN SHARE ROW EXCLUSIVE MODE")
        connection.exec_driver_sql(
            f"CREATE OR REPLACE FUNCTION {_FUNCTION}() RETURNS trigger LANGUAGE plpgsql AS "
            f"'BEGIN RAISE EXCEPTION ''{_REFUSAL}'' USING ERRCODE = ''{_READ_ONLY}''; END'"
        )
        for table in COPIED:
            connection.exec_driver_sql(
                f"CREATE TRIGGER {_TRIGGER} BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON {quote(table)} "
                f"FOR EACH STATEMENT EXECUTE FUNCTION {_FUNCTION}()"
            )
        return
    for name, table, write in _sqlite_triggers():
        connection.exec_driver_sql(
            f"CREATE TRIGGER {name} BEFORE {write} ON {quote(table)} BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END"
        )


def reopen(connection: Connection, move: bytes, *, now: Instant) -> bool:
    """Take writes again, if it is closed and not gone; whether it was."""
    if not _advance(connection, move, Role.SOURCE, (State.CLOSED,), State.COPYING, now):
        return False
    _open(connection)
    return True


def leave(connection: Connection, move: bytes, *, now: Instant) -> None:
    """Be read no more. Raises ``Overtaken`` if it is open again."""
    if not _advance(connection, move, Role.SOURCE, (State.CLOSED, State.GONE), State.GONE, now):
        raise Overtaken


def stay(connection: Connection, move: bytes, states: tuple[State, ...]) -> None:
    """Be as if nobody had wanted to move. Raises ``Overtaken`` unless it is in one of these states."""
    gone = delete(relocation).where(relocation.c.move == move, relocation.c.role == Role.SOURCE, relocation.c.state.in_(states))
    if not connection.execute(gone).rowcount:
        raise Overtaken
    _open(connection)


def _open(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        quote = connection.dialect.identifier_preparer.format_table
        connection.exec_driver_sql("SET LOCAL lock_timeout = '3s'")
        for table in COPIED:
            connection.exec_driver_sql(f"DROP TRIGGER IF EXISTS {_TRIGGER} ON {quote(table)}")
        connection.exec_driver_sql(f"DROP FUNCTION IF EXISTS {_FUNCTION}()")
        return
    for name, _, _ in _sqlite_triggers():
        connection.exec_driver_sql(f"DROP TRIGGER IF EXISTS {name}")


def _sqlite_triggers() -> list[tuple[str, Table, str]]:
    return [(f"{_TRIGGER}_{table.name}_{write.lower()}", table, write) for table in COPIED for write in _SQLITE_WRITES]


# --- the new database -----------------------------------------------------------------------------------------------------


def begin_copy(connection: Connection, move: bytes, other: str, *, now: Instant) -> None:
    """Become a copy that nobody starts on. The database has nothing in it but what the migrations have put there."""
    connection.execute(delete(tier))
    _put(connection, {"move": move, "role": Role.TARGET, "state": State.COPYING, "other": other, "changed_at": now})


def take_over(connection: Connection, move: bytes, copier: bytes) -> Relocation:
    """Be the one who copies: others are overtaken. What the row says. Raises ``Overtaken`` if nobody may go on."""
    _hold(connection, move, Role.TARGET, State.COPYING)
    connection.execute(update(relocation).values(copier=copier))
    found = find_relocation(connection)
    assert found is not None  # noqa: S101 - it is locked
    return found


def hold_copy(connection: Connection, copier: bytes) -> None:
    """Be still the one who copies, until the commit. Raises ``Overtaken``."""
    if not connection.execute(
        update(relocation).where(relocation.c.copier == copier, relocation.c.state == State.COPYING).values(copier=copier)
    ).rowcount:
        raise Overtaken


def note_progress(connection: Connection, copier: bytes, progress: str) -> None:
    """The same, and write down how far it is. Raises ``Overtaken``."""
    if not connection.execute(
        update(relocation).where(relocation.c.copier == copier, relocation.c.state == State.COPYING).values(progress=progress)
    ).rowcount:
        raise Overtaken


def complete(connection: Connection, move: bytes, copier: bytes, *, now: Instant) -> None:
    """Be in use from now on. Raises ``Overtaken``."""
    hold_copy(connection, copier)
    if not _advance(connection, move, Role.TARGET, (State.COPYING,), State.COMPLETE, now):
        raise Overtaken


def abandon_copy(connection: Connection, move: bytes, *, now: Instant) -> bool:
    """Be of no use to anybody for good; ``False`` if it is in use already, or no copy of this move at all."""
    return _advance(connection, move, Role.TARGET, (State.COPYING, State.ABANDONED), State.ABANDONED, now)


# --- both -----------------------------------------------------------------------------------------------------------------


def _put(connection: Connection, row: dict[str, object]) -> None:
    connection.execute(delete(relocation))
    connection.execute(insert(relocation), {"id": _THE_ONE, **row})


def _advance(connection: Connection, move: bytes, role: Role, states: tuple[State, ...], state: State, now: Instant) -> bool:
    moved = update(relocation).where(relocation.c.move == move, relocation.c.role == role, relocation.c.state.in_(states))
    return connection.execute(moved.values(state=state, changed_at=now)).rowcount == 1


def _hold(connection: Connection, move: bytes, role: Role, state: State) -> None:
    """Lock the row. Raises ``Overtaken`` if it is another's, or in another state."""
    row = connection.execute(select(relocation).with_for_update()).one_or_none()
    if row is None or (row.move, row.role, row.state) != (move, role, state):
        raise Overtaken
