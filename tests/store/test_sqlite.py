"""The embedded database: what it promises of durability, and what it does when the file lets it down."""

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
from backends import SqliteBackend
from given import a_key, a_login, a_partner
from sqlalchemy import insert, text
from sqlalchemy.exc import IntegrityError, ProgrammingError

from gatelodge.errors import Unavailable
from gatelodge_server.core.ports import Opened
from gatelodge_server.store.sqlite import LOCK_TIMEOUT
from gatelodge_server.store.tables import tier

FULL_DISK = Path(__file__).with_name("full_disk.py")
NEW_TIER = {"name": "gold", "requests_per_hour": 1, "requests_per_day": 1}


@pytest.fixture
def backend(tmp_path):
    return SqliteBackend.create(tmp_path)


def pragma(connection, name):
    return connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()


def add_tier(connection, **changes):
    connection.execute(insert(tier).values(NEW_TIER | changes))


def tiers(connection):
    return connection.execute(text("SELECT count(*) FROM tier")).scalar_one()


# --- Durability ---


@pytest.mark.parametrize("way", ["write", "read"])
async def test_wal_and_full_synchronous_are_in_force_on_every_connection(driver, way):
    run = getattr(driver, way)
    assert await run(pragma, "journal_mode") == "wal"
    assert await run(pragma, "synchronous") == 2  # FULL
    assert await run(pragma, "foreign_keys") == 1


async def test_the_promise_of_durability_holds_after_a_fault_too(backend, driver):
    with pytest.raises(Unavailable):
        await driver.write(lambda connection: connection.exec_driver_sql("SELECT * FROM nowhere"))
    assert await driver.write(pragma, "synchronous") == 2


async def test_what_is_written_another_connection_sees_when_the_verb_returns(backend, driver):
    await driver.write(add_tier)
    with sqlite3.connect(backend.path) as outside:
        assert outside.execute("SELECT name FROM tier WHERE name = 'gold'").fetchall() == [("gold",)]
    outside.close()


async def test_what_is_written_is_in_the_file_when_the_store_has_closed(backend):
    store = backend.open()
    await store.add_partner(a_partner(), a_key(), by="test")
    await store.close()
    assert sorted(path.name for path in backend.path.parent.iterdir()) == [backend.path.name, backend.path.name + "-bell"]
    assert backend.count("partner") == 1


async def test_a_verb_that_fails_half_way_leaves_nothing(driver):
    def half(connection):
        add_tier(connection)
        add_tier(connection)

    before = await driver.read(tiers)
    with pytest.raises(IntegrityError):
        await driver.write(half)
    assert await driver.read(tiers) == before


async def test_a_writing_verb_is_alone_from_its_first_reading_on(backend, driver):
    """Two drivers that read, then write what they have read plus one, lose no step."""
    other = backend.driver()

    def step(connection):
        last = connection.execute(text("SELECT requests_per_day FROM tier WHERE name = 'starter'")).scalar_one()
        connection.execute(text("UPDATE tier SET requests_per_day = :next WHERE name = 'starter'"), {"next": last + 1})

    await asyncio.gather(*((driver, other)[at % 2].write(step) for at in range(60)))
    await other.close()
    assert (
        await driver.read(
            lambda connection: connection.execute(text("SELECT requests_per_day FROM tier WHERE name = 'starter'")).scalar_one()
        )
        == 1_060
    )


async def test_readers_do_not_wait_for_a_writer(driver):
    writing, enough = threading.Event(), threading.Event()

    def slow(connection):
        add_tier(connection)
        writing.set()
        assert enough.wait(60)

    before = await driver.read(tiers)
    write = asyncio.create_task(driver.write(slow))
    await asyncio.to_thread(writing.wait)
    assert await driver.read(tiers) == before
    enough.set()
    await write
    assert await driver.read(tiers) == before + 1


async def test_a_reading_verb_reads_one_snapshot(driver):
    between, enough = threading.Event(), threading.Event()

    def twice(connection):
        first = tiers(connection)
        between.set()
        assert enough.wait(60)
        return first, tiers(connection)

    reading = asyncio.create_task(driver.read(twice))
    await asyncio.to_thread(between.wait)
    await driver.write(add_tier)
    enough.set()
    first, second = await reading
    assert first == second


async def test_what_has_begun_is_finished_when_the_store_is_closed(backend):
    store = backend.open()
    key = a_key()
    await store.add_partner(a_partner(), key, by="test")
    logins = [asyncio.create_task(store.open_session(a_login(key))) for _ in range(20)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await store.close()
    outcomes = await asyncio.gather(*logins)
    assert all(isinstance(outcome, Opened) for outcome in outcomes)
    assert backend.count("session") == 20


# --- Faults ---


async def test_r72_a_file_locked_for_too_long_is_unavailable_and_works_again_once_it_is_free(backend, store):
    key = a_key()
    await store.add_partner(a_partner(), key, by="test")
    lock = (
        "import sqlite3, sys\n"
        "connection = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "connection.execute('BEGIN IMMEDIATE')\n"
        "print('locked', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", lock, str(backend.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert await asyncio.to_thread(other.stdout.readline) == b"locked\n"
        outcomes = await asyncio.gather(*(store.open_session(a_login(key)) for _ in range(5)), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Unavailable] * 5
        assert await store.find_partner("acme-motors") == a_partner()
        assert backend.faults == ["database is locked"]
        other.communicate(b"\n")
    assert isinstance(await store.open_session(a_login(key)), Opened)
    assert backend.count("session") == 1


async def test_r72_nobody_waits_for_a_locked_file_longer_than_one_lock_timeout(backend, driver):
    """Whoever comes while others wait for it does not wait their time as well."""
    loop = asyncio.get_running_loop()
    waited = []

    async def write():
        queued_at = loop.time()
        with pytest.raises(Unavailable):
            await driver.write(add_tier)
        waited.append(loop.time() - queued_at)

    with closing(sqlite3.connect(backend.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        first = [asyncio.create_task(write()) for _ in range(4)]
        while not first[0].done():
            await asyncio.wait(first, timeout=LOCK_TIMEOUT / 2)
            if len(waited) == 0:
                first += [asyncio.create_task(write()) for _ in range(4)]
        await asyncio.gather(*first)
        other.execute("ROLLBACK")
    assert len(waited) >= 8
    assert max(waited) < LOCK_TIMEOUT + 1
    await driver.write(add_tier)  # and none of them was done


async def test_r72_a_full_disk_acknowledges_nothing_and_works_again_once_there_is_room(tmp_path):
    backend = SqliteBackend.create(tmp_path)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, FULL_DISK, backend.address], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["unavailable"] > 0
    assert told["opened_while_full"] < told["tried_while_full"]
    assert told["faults"]
    assert told["opened_afterwards"] == 10
    # Every session that anybody was told of is there, and none that nobody was told of.
    assert told["missing"] == []
    assert backend.count("session") == told["acknowledged"]


async def test_r72_a_file_that_is_no_database_is_unavailable(backend, store):
    backend.path.write_bytes(b"This was a database once. " * 1000)
    with pytest.raises(Unavailable):
        await store.ping()
    with pytest.raises(Unavailable):
        await store.add_partner(a_partner(), a_key(), by="test")
    assert backend.faults


async def test_r72_a_directory_that_is_gone_is_unavailable(tmp_path):
    backend = SqliteBackend(tmp_path / "nowhere" / "gatelodge.db")
    store = backend.open()
    for verb in (store.ping, store.list_partners):
        with pytest.raises(Unavailable):
            await verb()
    with pytest.raises(Unavailable):
        await store.add_partner(a_partner(), a_key(), by="test")
    await store.close()
    assert len(backend.faults) == 3


@pytest.mark.parametrize("way", ["write", "read"])
async def test_after_a_fault_the_connections_are_thrown_away(backend, driver, way):
    """A mark that lives on a connection is gone once a fault has come over it."""
    run = getattr(driver, way)

    def mark(connection):
        connection.exec_driver_sql("CREATE TEMP TABLE IF NOT EXISTS mark (x)")

    def marked(connection):
        return connection.exec_driver_sql("SELECT count(*) FROM sqlite_temp_master").scalar_one()

    await asyncio.gather(*(run(mark) for _ in range(4)))
    with pytest.raises(Unavailable) as caught:
        await run(lambda connection: connection.exec_driver_sql("SELECT * FROM nowhere"))
    assert caught.value.__cause__ is not None
    assert backend.faults == ["no such table: nowhere"]
    assert await asyncio.gather(*(run(marked) for _ in range(4))) == [0] * 4


async def test_a_mistake_of_ours_is_not_unavailable_and_costs_no_connection(backend, driver):
    await driver.write(lambda connection: connection.exec_driver_sql("CREATE TEMP TABLE mark (x)"))
    with pytest.raises(IntegrityError):
        await driver.write(add_tier, name="starter")
    with pytest.raises(ProgrammingError):
        await driver.write(lambda connection: connection.exec_driver_sql("SELECT ?", ()))
    with pytest.raises(ZeroDivisionError):
        await driver.write(lambda connection: connection and 1 / 0)
    assert backend.faults == []
    assert await driver.write(lambda connection: connection.exec_driver_sql("SELECT count(*) FROM mark").scalar_one()) == 0


async def test_r45_no_value_of_a_row_is_in_an_error(driver):
    with pytest.raises(IntegrityError) as caught:
        await driver.write(add_tier, name="starter", requests_per_hour=987_654_321)
    assert "987654321" not in str(caught.value)
    assert "987_654_321" not in repr(caught.value)


async def test_a_row_that_points_at_nothing_is_refused(driver):
    def orphan(connection):
        connection.execute(
            text(
                "INSERT INTO credential (id, kind, partner_id, digest, masked, created_at) "
                "VALUES ('x', 'pk', 'nobody', x'00', '', 0)"
            )
        )

    with pytest.raises(IntegrityError):
        await driver.write(orphan)
