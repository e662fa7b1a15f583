"""A plugin of pytest: one more backend for the store's tests, which takes for granted what PostgreSQL has only since 17."""

from typing import Any

from backends import BACKENDS, PostgresBackend
from sqlalchemy import event
from sqlalchemy.engine.interfaces import DBAPIConnection

from gatelodge_server.store.address import PostgresAddress, parse_address
from gatelodge_server.store.postgres import PostgresDriver


class _NewerDriver(PostgresDriver):
    """Asks each of its connections for a setting of 17."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

        def ask(connection: DBAPIConnection, _: object) -> None:
            connection.cursor().execute("SET transaction_timeout = 0")

        event.listen(self._engine.sync_engine, "connect", ask)


class NewerBackend(PostgresBackend):  # type: ignore[misc]  # what only tests import has no types
    """PostgreSQL, and such nodes on it."""

    def driver(self) -> PostgresDriver:
        """What a store runs its verbs on."""
        address = parse_address(self.address)
        assert isinstance(address, PostgresAddress)
        return _NewerDriver(address, on_fault=self.faults.append)


BACKENDS["newer"] = NewerBackend
