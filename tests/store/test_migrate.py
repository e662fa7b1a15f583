"""The schema: the migrations make what the tables say, once, whoever comes first."""

import itertools
import os
import subprocess
import sys

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from backends import SqliteBackend
from postgres import postgres
from sqlalchemy import inspect, text

import gatelodge_server.store
from gatelodge_server.store import migrate
from gatelodge_server.store.address import parse_address
from gatelodge_server.store.database import database_at
from gatelodge_server.store.faults import DatabaseFault
from gatelodge_server.store.migrate import HEAD, SchemaTooNew, schema_version, upgrade
from gatelodge_server.store.sqlite import SqliteDatabase
from gatelodge_server.store.tables import metadata

OUR_TABLES = {"alembic_version", *metadata.tables}


_names = itertools.count(1)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path):
    """A database with nothing in it."""
    url = f"sqlite:///{tmp_path}/gatelodge.db"
    if request.param == "postgresql":
        url = postgres().create(f"migrate_{os.getpid()}_{next(_names)}")
    return database_at(parse_address(url))


def tables_of(connection):
    return inspect(connection).get_table_names()


def schema(connection):
    """Everything that SQLite knows of its tables, whatever was written to make them."""
    found = {}
    for _, name, kind, *shape in connection.exec_driver_sql("PRAGMA table_list"):
        if name in metadata.tables:
            found[name] = (kind, shape, "AUTOINCREMENT" in sql_of(connection, name))
            columns = connection.exec_driver_sql(f"PRAGMA table_xinfo({name})")
            found[name, "columns"] = {tuple(row[1:]) for row in columns}
            keys = connection.exec_driver_sql(f"PRAGMA foreign_key_list({name})")
            found[name, "keys"] = {tuple(row[2:]) for row in keys}
            for _, index, *kinds in connection.exec_driver_sql(f"PRAGMA index_list({name})").all():
                fields = connection.exec_driver_sql(f"PRAGMA index_xinfo({index})")
                where = sql_of(connection, index).partition(" WHERE ")[2].replace('"', "")
                found[name, index] = (kinds, [tuple(row) for row in fields], where.replace(f"{name}.", ""))
    return found


def sql_of(connection, name):
    return connection.exec_driver_sql("SELECT coalesce(max(sql), '') FROM sqlite_master WHERE name = ?", (name,)).scalar_one()


def test_the_migrations_make_the_tables_that_the_code_speaks_of(database):
    def differences(connection):
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        return compare_metadata(context, metadata)

    database.upgrade(upgrade)
    assert database.read(differences) == []


def test_the_migrations_make_them_to_the_letter(tmp_path):
    migrated, created = SqliteDatabase(tmp_path / "migrated.db"), SqliteDatabase(tmp_path / "created.db")
    migrated.upgrade(upgrade)
    created.upgrade(metadata.create_all)
    made = migrated.read(schema)
    assert made == created.read(schema)
    assert made["session"][1][1] == 1  # without rowid: the primary key is the table


def test_the_newest_migration_is_the_one_that_the_program_knows():
    config = Config()
    config.set_main_option("script_location", str(gatelodge_server.store.__path__[0] + "/migrations"))
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


def test_an_empty_database_has_no_version_and_gets_the_newest(database):
    assert database.upgrade(schema_version) is None
    assert database.upgrade(upgrade) is True
    assert database.read(schema_version) == HEAD
    assert set(database.read(tables_of)) == OUR_TABLES
    assert not database.is_new()


def test_a_database_that_is_up_to_date_is_left_alone(database):
    database.upgrade(upgrade)
    assert database.upgrade(upgrade) is False


def test_the_first_tiers_are_there(database):
    database.upgrade(upgrade)
    tiers = database.read(lambda connection: connection.execute(metadata.tables["tier"].select()).all())
    assert {tuple(row) for row in tiers} == {
        ("starter", 100, 1_000),
        ("growth", 1_000, 10_000),
        ("enterprise", 10_000, 100_000),
    }


def test_a_database_of_a_newer_program_is_refused_and_left_alone(database):
    database.upgrade(upgrade)
    newer = f"{int(HEAD) + 1:04}"
    database.upgrade(lambda connection: connection.execute(text("UPDATE alembic_version SET version_num = :it"), {"it": newer}))
    with pytest.raises(SchemaTooNew, match=newer):
        database.upgrade(upgrade)
    assert database.read(schema_version) == newer


def test_a_version_table_without_a_version_is_an_empty_database(database):
    table = "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)"
    database.upgrade(lambda connection: connection.execute(text(table)))
    assert database.read(schema_version) is None
    assert database.upgrade(upgrade) is True
    assert database.read(schema_version) == HEAD


def test_a_migration_that_fails_half_way_leaves_an_empty_database(database):
    # In the way of the last table of the first migration.
    database.upgrade(lambda connection: connection.execute(text("CREATE TABLE session (what TEXT)")))
    with pytest.raises(DatabaseFault, match="already exists"):
        database.upgrade(upgrade)
    assert database.read(tables_of) == ["session"]


def test_processes_that_upgrade_at_once_all_find_the_newest_schema(tmp_path):
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from gatelodge_server.store.migrate import schema_version, upgrade\n"
        "from gatelodge_server.store.sqlite import SqliteDatabase\n"
        "import alembic.command\n"
        "database = SqliteDatabase(Path(sys.argv[1]))\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "database.upgrade(upgrade)\n"
        "print(database.read(schema_version), flush=True)\n"
    )
    for round_ in range(2):
        path = tmp_path / f"{round_}.db"
        command = [sys.executable, "-c", program, str(path)]
        processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(3)
        ]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = [process.communicate() for process in processes]
        assert [(answer, fault) for answer, fault in answers] == [(f"{HEAD}\n", "")] * 3
        assert SqliteBackend(path).count("tier") == 3


def test_a_start_that_has_nothing_to_migrate_does_without_alembic(tmp_path):
    path = tmp_path / "gatelodge.db"
    SqliteDatabase(path).upgrade(upgrade)
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        f"from {migrate.__name__} import upgrade\n"
        "from gatelodge_server.store.sqlite import SqliteDatabase\n"
        "assert SqliteDatabase(Path(sys.argv[1])).upgrade(upgrade) is False\n"
        "assert not {'alembic', 'asyncpg'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)
