"""Rows from one database to another: in batches while they change, and then row by row until nothing is different.

Keys are compared as bytes on both sides (``COLLATE "C"``), as SQLite and Python do, so that two tables can be walked through
together. A batch goes by whatever order its own database has an index for.
"""

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any, Final, TypeAlias

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Integer,
    LargeBinary,
    Select,
    String,
    Table,
    and_,
    bindparam,
    delete,
    func,
    insert,
    literal,
    select,
    tuple_,
)

from gatelodge_server.store.faults import UnfitRow
from gatelodge_server.store.sides import Snapshot
from gatelodge_server.store.tables import NAMED_BY, AnyRow

Key: TypeAlias = tuple[Any, ...]
Difference: TypeAlias = tuple[AnyRow | None, AnyRow | None]
"""A row of the old database and one of the new: one of them is missing, or they have one key and are not equal."""
_INTEGER_BITS: Final = 31
_BIGINTEGER_BITS: Final = 63


def count_rows(connection: Connection, table: Table) -> int:
    """How many rows a table has."""
    return int(connection.execute(select(func.count()).select_from(table)).scalar_one())


def has_rows(connection: Connection, tables: Sequence[Table]) -> bool:
    """Whether there is anything in any of these tables."""
    return any(connection.execute(select(literal(1)).select_from(table).limit(1)).first() for table in tables)


# --- batches --------------------------------------------------------------------------------------------------------------


def read_batch(connection: Connection, table: Table, after: Key | None, limit: int) -> Sequence[AnyRow]:
    """The next rows of a table by its key."""
    columns = key_columns(table)
    query = select(table).order_by(*columns).limit(limit)
    if after is not None:
        begin = [literal(value, column.type) for value, column in zip(after, columns, strict=True)]
        query = query.where(columns[0] > begin[0] if len(columns) == 1 else tuple_(*columns) > tuple_(*begin))
    return connection.execute(query).all()


def write_rows(connection: Connection, table: Table, rows: Sequence[AnyRow]) -> None:
    """Insert rows."""
    if rows:
        connection.execute(insert(table), [dict(row._mapping) for row in rows])  # noqa: SLF001 - its name for the public


def drop_rows(connection: Connection, table: Table, rows: Sequence[AnyRow]) -> None:
    """Delete rows with the same keys."""
    if rows:
        columns = key_columns(table)
        named = delete(table).where(and_(*(column == bindparam(f"key_{column.name}", type_=column.type) for column in columns)))
        key_of = key_reader(table)
        names = [f"key_{column.name}" for column in columns]
        connection.execute(named, [dict(zip(names, key_of(row), strict=True)) for row in rows])


def key_columns(table: Table) -> Sequence[Column[Any]]:
    """The columns of the primary key, in the order of the table."""
    return list(table.primary_key.columns)


def key_reader(table: Table) -> Callable[[AnyRow], Key]:
    """What finds the key in a row."""
    places = [list(table.columns).index(column) for column in key_columns(table)]
    return lambda row: tuple(row[place] for place in places)


def write_key(table: Table, key: Key | None) -> str:
    """The table and a key in it, as text."""
    return json.dumps([table.name, None if key is None else [_as_text(value) for value in key]])


def read_key(text: str, tables: Sequence[Table]) -> tuple[int, Key | None]:
    """Which of the tables, and the key in it."""
    name, words = json.loads(text)
    (place,) = [place for place, table in enumerate(tables) if table.name == name]
    if words is None:
        return place, None
    columns = key_columns(tables[place])
    return place, tuple(
        bytes.fromhex(word) if isinstance(column.type, LargeBinary) else word
        for word, column in zip(words, columns, strict=True)
    )


def _as_text(value: Any) -> Any:  # noqa: ANN401 - of any column
    return value.hex() if isinstance(value, bytes) else value


# --- what PostgreSQL cannot hold ------------------------------------------------------------------------------------------


def inspector(table: Table, dialect: str) -> Callable[[Sequence[AnyRow]], None]:
    """What looks at rows before they are written. Raises ``UnfitRow``. SQLite holds whatever it is given."""
    if dialect != "postgresql":
        return lambda _: None
    checks = [_check_of(column) for column in table.columns]
    names = [column.name for column in table.columns]
    name_of = _namer(table)

    def look(rows: Sequence[AnyRow]) -> None:
        for row in rows:
            for name, check, value in zip(names, checks, row, strict=True):
                complaint = check(value) if value is not None else None
                if complaint is not None:
                    raise UnfitRow(f"{table.name} {name_of(row)}: {name} {complaint}")

    return look


def _namer(table: Table) -> Callable[[AnyRow], str]:
    """What names a row to whoever has to mend it: by its key, or by other columns if the key is somebody's address."""
    columns = table.info.get(NAMED_BY, ())
    places = [(name, list(table.columns.keys()).index(name)) for name in columns]
    if not places:
        key_of = key_reader(table)
        return lambda row: ascii(", ".join(str(_as_text(part)) for part in key_of(row)))[1:-1]
    # Numbers only. SQLite holds whatever it is given, so an address may stand there too.
    return lambda row: ", ".join(f"{name} = {row[at] if isinstance(row[at], int) else '?'}" for name, at in places)


def _check_of(column: Column[Any]) -> Callable[[Any], str | None]:
    kind = column.type
    if isinstance(kind, LargeBinary):
        return lambda value: None if isinstance(value, bytes) else "is no bytes"
    if isinstance(kind, Integer):
        bits = _BIGINTEGER_BITS if isinstance(kind, BigInteger) else _INTEGER_BITS
        return lambda value: _fault_of_number(value, bits)
    length = kind.length if isinstance(kind, String) else None
    return lambda value: _fault_of_text(value, length)


def _fault_of_number(value: object, bits: int) -> str | None:
    if not isinstance(value, int):
        return "is no whole number"
    return None if -(1 << bits) <= value < 1 << bits else "is too large a number"


def _fault_of_text(value: object, length: int | None) -> str | None:
    if not isinstance(value, str):
        return "is no text"
    if "\0" in value:
        return "has a NUL character, which PostgreSQL cannot store"
    return None if length is None or len(value) <= length else f"is longer than {length} characters"


# --- comparing ------------------------------------------------------------------------------------------------------------


def find_differences(
    table: Table, source: Snapshot, target: Snapshot, seen: Callable[[int], None]
) -> Generator[Difference, None, None]:
    """Every row that is not the same in both. ``seen`` is told how many rows of the source have been looked at since."""
    key_of = key_reader(table)
    # Closed in their order, whatever ends the walk: each is done with before its snapshot is.
    with (
        closing(source.rows(in_order(table, source.dialect))) as ours,
        closing(target.rows(in_order(table, target.dialect))) as theirs,
    ):
        other = next(theirs, None)
        for row in ours:
            key = key_of(row)
            while other is not None and key_of(other) < key:
                yield None, other
                other = next(theirs, None)
            if other is None or key_of(other) != key:
                yield row, None
            else:
                if tuple(other) != tuple(row):
                    yield row, other
                other = next(theirs, None)
            seen(1)
        while other is not None:
            yield None, other
            other = next(theirs, None)


def in_order(table: Table, dialect: str) -> Select[Any]:
    """All rows of a table, by the bytes of their keys."""

    def by_bytes(column: Column[Any]) -> Any:  # noqa: ANN401 - SQLAlchemy's
        is_text = isinstance(column.type, String)
        return column.collate("C") if is_text and dialect == "postgresql" else column

    return select(table).order_by(*map(by_bytes, key_columns(table)))
