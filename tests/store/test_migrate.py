"""The schema: the migrations make what the tables say, once, whoever comes first."""

import subprocess
import sys

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from backends import SqliteBackend
from sqlalchemy import inspect

import gatelodge_server.store
from gatelodge_server.store import migrate
from gatelodge_server.store.migrate import HEAD, SchemaTooNew, schema_version, upgrade
from gatelodge_server.store.sqlite import sqlite_engine
from gatelodge_server.store.tables import metadata

OUR_TABLES = {"alembic_version", *metadata.tables}


@pytest.fixture
def engine(tmp_path):
    engine = sqlite_engine(tmp_path / "gatelodge.db")
    yield engine
    engine.dispose()


def schema(engine):
    """Everything that SQLite knows of its tables, whatever was written to make them."""
    found = {}
    with engine.connect() as connection:
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


def test_the_migrations_make_the_tables_that_the_code_speaks_of(engine):
    upgrade(engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []


def test_the_migrations_make_them_to_the_letter(engine, tmp_path):
    upgrade(engine)
    created = sqlite_engine(tmp_path / "created.db")
    metadata.create_all(created)
    assert schema(engine) == schema(created)
    assert schema(engine)["session"][1][1] == 1  # without rowid: the primary key is the table
    created.dispose()


def test_the_newest_migration_is_the_one_that_the_program_knows():
    config = Config()
    config.set_main_option("script_location", str(gatelodge_server.store.__path__[0] + "/migrations"))
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


def test_an_empty_database_has_no_version_and_gets_the_newest(engine):
    assert schema_version(engine) is None
    assert upgrade(engine) is True
    assert schema_version(engine) == HEAD
    assert set(inspect(engine).get_table_names()) == OUR_TABLES


def test_a_database_that_is_up_to_date_is_left_alone(engine):
    upgrade(engine)
    assert upgrade(engine) is False


def test_the_first_tiers_are_there(engine):
    upgrade(engine)
    with engine.connect() as connection:
        tiers = connection.execute(metadata.tables["tier"].select()).all()
    assert {tuple(row) for row in tiers} == {
        ("starter", 100, 1_000),
        ("growth", 1_000, 10_000),
        ("enterprise", 10_000, 100_000),
    }


def test_a_database_of_a_newer_program_is_refused_and_left_alone(engine):
    upgrade(engine)
    newer = f"{int(HEAD) + 1:04}"
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = ?", (newer,))
    with pytest.raises(SchemaTooNew, match=newer):
        upgrade(engine)
    assert schema_version(engine) == newer


def test_a_version_table_without_a_version_is_an_empty_database(engine):
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
    assert schema_version(engine) is None
    assert upgrade(engine) is True
    assert schema_version(engine) == HEAD


def test_a_migration_that_fails_half_way_leaves_an_empty_database(engine):
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE session (what TEXT)")  # in the way of the last table
    with pytest.raises(Exception, match="already exists"):
        upgrade(engine)
    assert inspect(engine).get_table_names() == ["session"]


def test_processes_that_upgrade_at_once_all_find_the_newest_schema(tmp_path):
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from gatelodge_server.store.migrate import schema_version, upgrade\n"
        "from gatelodge_server.store.sqlite import UPGRADE_TIMEOUT, sqlite_engine\n"
        "import alembic.command\n"
        "engine = sqlite_engine(Path(sys.argv[1]), lock_timeout=UPGRADE_TIMEOUT)\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "upgrade(engine)\n"
        "print(schema_version(engine), flush=True)\n"
        "engine.dispose()\n"
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
    engine = sqlite_engine(path)
    upgrade(engine)
    engine.dispose()
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        f"from {migrate.__name__} import upgrade\n"
        "from gatelodge_server.store.sqlite import sqlite_engine\n"
        "assert upgrade(sqlite_engine(Path(sys.argv[1]))) is False\n"
        "assert 'alembic' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)
