"""What two nodes may do at once on a database that has more than one writer."""

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from sqlalchemy import (
    ClauseElement,
    Column,
    ColumnElement,
    Connection,
    Index,
    Insert,
    PrimaryKeyConstraint,
    Table,
    func,
    insert,
    select,
    tuple_,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import SyntaxExtension
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.visitors import InternalTraversal


class _UnlessThere(SyntaxExtension, ClauseElement):
    """Lets an insert do nothing if another row keeps it from holding one rule: one form for what both databases say alike.

    Or it adds its ``counts`` to those of that row.
    """

    _traverse_internals = [  # noqa: RUF012 - as SQLAlchemy declares it
        ("rule", InternalTraversal.dp_plain_obj),
        ("counts", InternalTraversal.dp_plain_obj),
    ]

    def __init__(self, rule: PrimaryKeyConstraint | Index, counts: tuple[Column[int], ...] = ()) -> None:
        self.rule = rule
        self.counts = counts

    def apply_to_insert(self, insert_stmt: Insert) -> None:
        insert_stmt.apply_syntax_extension_point(lambda _: [self], "post_values")


@compiles(_UnlessThere)
def _say_unless_there(unless: _UnlessThere, compiler: SQLCompiler, **_: Any) -> str:  # noqa: ANN401 - SQLAlchemy's signature
    say = compiler.preparer.format_column
    target = f"({', '.join(map(say, unless.rule.columns))})"
    where = None
    if isinstance(unless.rule, Index):
        where = unless.rule.dialect_options[compiler.dialect.name]["where"]
    if where is not None:  # the index is of some rows only, and found by saying of which
        target += f" WHERE {compiler.process(where, include_table=False, literal_binds=True)}"
    if unless.counts:
        sums = [(say(count), say(count, use_table=True)) for count in unless.counts]
        return f"ON CONFLICT {target} DO UPDATE SET " + ", ".join(f"{new} = {old} + excluded.{new}" for new, old in sums)
    return f"ON CONFLICT {target} DO NOTHING"


def insert_unless_there(connection: Connection, table: Table, row: Mapping[str, object], *, rule: Index | None = None) -> bool:
    """Insert a row, unless there is one with its primary key, or that has what the unique index ``rule`` lets one row have.

    Whether it was inserted. If another node is about to insert the other one, its commit is waited for. That row can be read
    afterwards, by any other statement: each sees what was committed before it began. Whatever else is wrong with a row is a
    fault, as ever: also what must be unique by another rule than the one that is meant.
    """
    new = insert(table).ext(_UnlessThere(rule or table.primary_key))
    return connection.execute(new, row, execution_options={"preserve_rowcount": True}).rowcount == 1


def insert_or_add(table: Table, *counts: Column[int]) -> Insert:
    """Inserts rows, or adds their ``counts`` to those of the rows that have their primary keys already.

    Each row is locked from then on. Whoever gives several gives them in the order of their keys.
    """
    return insert(table).ext(_UnlessThere(table.primary_key, counts))


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
