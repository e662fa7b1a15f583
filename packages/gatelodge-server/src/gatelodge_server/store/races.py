"""What two nodes may do at once on a database that has more than one writer."""

from collections.abc import Mapping

from sqlalchemy import Connection, Table, insert
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
