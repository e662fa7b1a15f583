"""The databases that a deployment can be kept in, for whoever needs one outside the running service: starts, commands."""

from collections.abc import Callable
from typing import Protocol, TypeVar

from sqlalchemy import Connection

from gatelodge_server.store.address import Address, SqliteAddress
from gatelodge_server.store.sqlite import SqliteDatabase
from gatelodge_server.store.store import Driver

Result = TypeVar("Result")


class Database(Protocol):
    """A database that is known by its address; it need not be there yet."""

    def make_room(self) -> None:
        """Make what a database is made in, if that is missing. Raises ``OSError``."""
        ...

    def is_new(self) -> bool:
        """Whether nothing of ours is there. Raises ``DatabaseFault``."""
        ...

    def read(self, verb: Callable[[Connection], Result]) -> Result:
        """Run ``verb``, which only reads. Raises ``DatabaseFault``, and what ``verb`` raises."""
        ...

    def upgrade(self, verb: Callable[[Connection], Result]) -> Result:
        """Run ``verb`` in one transaction, which may take long, while nobody else upgrades. Raises as ``read`` does.

        If it raises, nothing is committed.
        """
        ...

    def driver(self, *, on_fault: Callable[[str], None]) -> Driver:
        """What a store runs its verbs on. ``on_fault`` is told why the database could not be used."""
        ...


def database_at(address: Address, *, pool: int = 8) -> Database:
    """The database at an address. ``pool`` is how many connections to a server a driver keeps at most."""
    if isinstance(address, SqliteAddress):
        return SqliteDatabase(address.path)
    # Imported by those who use it: it takes longer than all else that a command needs.
    from gatelodge_server.store.postgres import PostgresDatabase  # noqa: PLC0415

    return PostgresDatabase(address, pool=pool)
