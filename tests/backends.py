"""The databases that the store runs on. A backend is known by an address, so that another process can open it as well."""

import functools
import tempfile
from pathlib import Path

from sqlalchemy import func, select

from gatelodge_server.store.migrate import upgrade
from gatelodge_server.store.sqlite import SqliteDriver, sqlite_engine
from gatelodge_server.store.store import SqlStore
from gatelodge_server.store.tables import metadata


@functools.cache
def _empty_database():
    """A database as the migrations make it. They take longer than most tests, so they run once."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "empty.db"
        engine = sqlite_engine(path)
        upgrade(engine)
        engine.dispose()
        return path.read_bytes()


class SqliteBackend:
    """The embedded database, on a real file."""

    def __init__(self, path):
        self.path = path
        self.faults = []

    @classmethod
    def create(cls, directory):
        backend = cls(directory / "gatelodge.db")
        backend.path.write_bytes(_empty_database())
        return backend

    @property
    def address(self):
        return f"sqlite:///{self.path}"

    def engine(self):
        return sqlite_engine(self.path)

    def driver(self):
        return SqliteDriver(self.path, on_fault=self.faults.append)

    def open(self):
        """A node's store: its own driver and connections."""
        return SqlStore(self.driver())

    def count(self, table):
        """How many rows a table has, seen from outside."""
        engine = self.engine()
        try:
            with engine.connect() as connection:
                return connection.execute(select(func.count()).select_from(metadata.tables[table])).scalar_one()
        finally:
            engine.dispose()

    def rows(self, table, *columns):
        """Columns of all rows of a table, seen from outside."""
        engine = self.engine()
        try:
            with engine.connect() as connection:
                found = metadata.tables[table]
                return [tuple(row) for row in connection.execute(select(*(found.c[name] for name in columns)))]
        finally:
            engine.dispose()


BACKENDS = {"sqlite": SqliteBackend}


def backend_at(address):
    """The backend of an address that another process was told."""
    return SqliteBackend(Path(address.removeprefix("sqlite:///")))
