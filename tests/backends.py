"""The databases that the store runs on. A backend is known by an address, so that another process can open it as well."""

import asyncio
import functools
import itertools
import os
import tempfile
from pathlib import Path

from postgres import postgres
from sqlalchemy import func, select

from gatelodge_server.store.address import parse_address
from gatelodge_server.store.database import database_at
from gatelodge_server.store.migrate import upgrade
from gatelodge_server.store.sqlite import SqliteDatabase, sqlite_engine
from gatelodge_server.store.store import SqlStore
from gatelodge_server.store.tables import metadata


def by_the_asker(_):
    """A store's clock that is none: each verb goes by the time that it is told, so that a test may say what time it is."""


async def until(condition):
    """Return when something is so."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


class Backend:
    """A database that the migrations have made, seen as nodes see it, and from outside."""

    def __init__(self, address):
        self.address = address
        self.database = database_at(parse_address(address))
        self.faults = []

    def driver(self):
        return self.database.driver(on_fault=self.faults.append)

    def open(self, **changes):
        """A node's store: its own driver and connections."""
        return SqlStore(self.driver(), **changes)

    def run(self, verb):
        """Run ``verb`` in a transaction of somebody else's."""
        return self.database.upgrade(verb)

    def written(self):
        """Something that is another when a transaction has been written to the disk."""
        where = func.pg_current_wal_insert_lsn()
        return self.database.read(lambda connection: str(connection.execute(select(where)).scalar_one()))

    async def start_listening(self, *nodes):
        """Let nodes hear of each other's changes; the tasks to cancel. Returns when they do."""
        before = [node.bell() for node in nodes]
        tasks = [asyncio.create_task(node.listen()) for node in nodes]
        await until(lambda: all(node.bell() != then for node, then in zip(nodes, before, strict=True)))
        return tasks

    def count(self, table):
        """How many rows a table has, seen from outside."""
        query = select(func.count()).select_from(metadata.tables[table])
        return self.database.read(lambda connection: connection.execute(query).scalar_one())

    def rows(self, table, *columns):
        """Columns of all rows of a table, seen from outside."""
        found = metadata.tables[table]
        query = select(*(found.c[name] for name in columns))
        return self.database.read(lambda connection: [tuple(row) for row in connection.execute(query)])


@functools.cache
def _empty_file():
    """A database as the migrations make it. They take longer than most tests, so they run once."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "empty.db"
        SqliteDatabase(path).upgrade(upgrade)
        return path.read_bytes()


class SqliteBackend(Backend):
    """The embedded database, on a real file."""

    def __init__(self, path):
        super().__init__(f"sqlite:///{path}")
        self.path = path

    @classmethod
    def create(cls, directory):
        backend = cls(directory / "gatelodge.db")
        backend.path.write_bytes(_empty_file())
        return backend

    def engine(self):
        return sqlite_engine(self.path)

    def written(self):
        return self.path.with_name(self.path.name + "-wal").read_bytes()

    async def start_listening(self, *_):
        return []


_names = itertools.count(1)


@functools.cache
def _empty_database():
    name = f"empty_{os.getpid()}"
    database_at(parse_address(postgres().create(name))).upgrade(upgrade)
    return name


class PostgresBackend(Backend):
    """A database of its own on the server of this process of tests."""

    @classmethod
    def create(cls, _):
        return cls(postgres().create(f"test_{os.getpid()}_{next(_names)}", template=_empty_database()))


BACKENDS = {"sqlite": SqliteBackend, "postgresql": PostgresBackend}


def backend_at(address):
    """The backend of an address that another process was told."""
    return SqliteBackend(Path(address.removeprefix("sqlite:///"))) if address.startswith("sqlite:") else Backend(address)
