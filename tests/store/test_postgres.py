"""What is particular to PostgreSQL: what is done again, what is not, and what becomes of a server that goes away."""

import asyncio
import contextlib
import re
import socket
import subprocess
import time

import pytest
from backends import Backend, PostgresBackend, until
from experiments.cut import Cut
from given import START, a_key, a_login, a_partner
from postgres import PostgresServer, postgres, programs_of_tests
from sqlalchemy import func, insert, select, text, update

from gatelodge.errors import Unavailable
from gatelodge_server.store.address import parse_address
from gatelodge_server.store.database import database_at
from gatelodge_server.store.faults import DatabaseFault
from gatelodge_server.store.migrate import upgrade
from gatelodge_server.store.postgres import LOCK_PATIENCE, PATIENCE
from gatelodge_server.store.store import SqlStore
from gatelodge_server.store.tables import change, tier
from gatelodge_server.store.trail import append_change


@pytest.fixture
def backend(tmp_path):
    return PostgresBackend.create(tmp_path)


@pytest.fixture
def own_server():
    """A server that may be stopped, which nobody else uses."""
    with PostgresServer() as server:
        yield server


@pytest.fixture
def own_backend(own_server):
    backend = Backend(own_server.create("lodge"))
    backend.database.upgrade(upgrade)
    return backend


def read_tiers(connection):
    return connection.execute(select(func.count()).select_from(tier)).scalar_one()


def wait_in_the_database(connection, seconds):
    connection.execute(select(func.pg_sleep(seconds)))


# --- Which versions ---


async def test_the_server_is_of_the_version_that_was_chosen(driver):
    told = subprocess.run(
        [programs_of_tests() / "postgres", "--version"], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    version = await driver.read(lambda connection: connection.execute(text("SHOW server_version")).scalar_one())
    assert told == f"postgres (PostgreSQL) {version}\n"
    assert int(version.partition(".")[0]) >= 15


@contextlib.asynccontextmanager
async def passed_off(port, major):
    """A wire to a server, which on it gives itself out as of another version; its port. None older than 15 installs here."""

    async def carry(source, target, said):
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                # ParameterStatus, with the login. The message keeps its length.
                target.write(re.sub(rb"(?<=server_version\0)\d\d(?=[.])", said, data))
                await target.drain()
        target.close()

    async def join(from_client, to_client):
        from_server, to_server = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(carry(from_client, to_server, rb"\g<0>"), carry(from_server, to_client, b"%d" % major))

    wire = await asyncio.start_server(join, "127.0.0.1", 0)
    async with wire:
        yield wire.sockets[0].getsockname()[1]


@pytest.mark.parametrize(("major", "outcome"), [(14, "PostgreSQL 14 is too old: 15 is needed"), (15, 3), (16, 3)])
async def test_a_server_that_is_older_than_what_is_promised_is_refused(backend, major, outcome):
    port = postgres().port
    async with passed_off(port, major) as other_port:
        database = database_at(parse_address(backend.address.replace(f":{port}/", f":{other_port}/")))
        for use in (database.read, database.upgrade):
            try:
                found = await asyncio.to_thread(use, read_tiers)
            except DatabaseFault as fault:
                found = str(fault)
            assert found == outcome


# --- What is done again ---


async def test_two_that_wait_for_each_other_are_both_done(driver, backend):
    """A deadlock: the server ends one of the two, and that one is done again."""
    runs = []

    def lock_both(connection, first, second):
        runs.append(first)
        lock(connection, first)
        connection.execute(select(func.pg_sleep(0.2)))
        lock(connection, second)

    def lock(connection, name):
        more = {"requests_per_hour": tier.c.requests_per_hour + 1}
        assert connection.execute(update(tier).where(tier.c.name == name).values(more)).rowcount == 1

    before = dict(backend.rows("tier", "name", "requests_per_hour"))
    await asyncio.gather(
        driver.write(lock_both, "starter", "growth"),
        driver.write(lock_both, "growth", "starter"),
    )
    after = dict(backend.rows("tier", "name", "requests_per_hour"))
    assert {name: after[name] - before[name] for name in after} == {"starter": 2, "growth": 2, "enterprise": 0}
    assert len(runs) == 3
    assert backend.faults == []


async def test_who_meets_a_row_that_was_not_there_is_judged_by_it(driver, backend):
    name, found = "both", []

    def add(connection):
        known = connection.execute(select(tier.c.name).where(tier.c.name == name)).one_or_none()
        found.append(known)
        if known is None:
            connection.execute(select(func.pg_sleep(0.2)))
            connection.execute(insert(tier), {"name": name, "requests_per_hour": 1, "requests_per_day": 1})
        return known

    outcomes = await asyncio.gather(driver.write(add), driver.write(add))
    assert sorted(outcomes, key=repr) == sorted([None, (name,)], key=repr)
    assert len(found) == 3


async def test_a_mistake_is_told_as_one_and_nothing_of_it_stays(driver, backend):
    def break_off(connection):
        connection.execute(insert(tier), {"name": "gone", "requests_per_hour": 1, "requests_per_day": 1})
        connection.execute(text("SELECT nothing FROM nowhere"))

    with pytest.raises(Exception, match="nowhere") as mistake:
        await driver.write(break_off)
    assert not isinstance(mistake.value, Unavailable)
    assert "gone" not in {name for (name,) in backend.rows("tier", "name")}


async def test_a_verb_that_only_reads_sees_one_snapshot_and_cannot_write(driver, backend):
    def read_twice(connection):
        first = read_tiers(connection)
        backend.run(lambda other: other.execute(insert(tier), {"name": "new", "requests_per_hour": 1, "requests_per_day": 1}))
        return first, read_tiers(connection)

    assert await driver.read(read_twice) == (3, 3)
    assert await driver.read(read_tiers) == 4
    with pytest.raises(Unavailable):
        await driver.read(lambda connection: connection.execute(update(tier).values(requests_per_hour=1)))
    assert "read-only" in backend.faults[-1]


# --- What cannot be done now ---


async def test_who_waits_too_long_for_a_lock_is_told_so_and_the_lock_is_free_again(driver, backend):
    def lock(connection, seconds):
        connection.execute(select(tier.c.name).with_for_update())
        is_locked.set()
        wait_in_the_database(connection, seconds)

    is_locked = asyncio.Event()
    holding = asyncio.create_task(driver.write(lock, LOCK_PATIENCE + 0.3))
    await is_locked.wait()
    begun = time.monotonic()
    with pytest.raises(Unavailable):
        await driver.write(lock, PATIENCE)
    assert time.monotonic() - begun < 2 * PATIENCE
    await holding
    await driver.write(lock, 0)


async def test_no_more_than_the_pool_are_under_way_and_the_rest_have_their_turn(backend):
    few = database_at(parse_address(backend.address), pool=2).driver(on_fault=backend.faults.append)

    def count_own(connection):
        wait_in_the_database(connection, 0.02)
        own = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'gatelodge'"
        return connection.execute(text(own)).scalar_one()

    counts = await asyncio.gather(*(few.read(count_own) for _ in range(20)))
    await few.close()
    assert max(counts) <= 2
    assert backend.faults == []


async def test_whoever_goes_away_does_not_break_off_what_has_begun(driver, backend):
    begun = asyncio.Event()

    def slowly(connection):
        begun.set()
        wait_in_the_database(connection, 0.1)
        connection.execute(insert(tier), {"name": "kept", "requests_per_hour": 1, "requests_per_day": 1})

    asking = asyncio.create_task(driver.write(slowly))
    await begun.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await driver.close()
    assert "kept" in {name for (name,) in backend.rows("tier", "name")}


# --- A server that goes away ---


async def test_a_server_that_restarts_is_not_noticed_between_two_verbs(own_server, own_backend):
    driver = own_backend.driver()
    assert await driver.write(read_tiers) == 3
    await asyncio.to_thread(own_server.restart)
    assert await driver.write(read_tiers) == 3
    await asyncio.to_thread(own_server.kill)
    await asyncio.to_thread(own_server.start)
    assert await driver.read(read_tiers) == 3
    await driver.close()
    assert own_backend.faults == []


async def test_without_a_server_everything_is_unavailable_at_once_and_good_again_with_it(own_server, own_backend):
    store = own_backend.open()
    await asyncio.to_thread(own_server.stop)
    begun = time.monotonic()
    for verb in (store.ping(), store.add_partner(a_partner(), a_key(), by="test"), store.list_changes(after=0, limit=1)):
        with pytest.raises(Unavailable):
            await verb
    assert time.monotonic() - begun < PATIENCE
    await asyncio.to_thread(own_server.start)
    await store.ping()
    await store.add_partner(a_partner(), a_key(), by="test")
    await store.close()
    assert own_backend.count("partner") == 1


async def test_a_server_that_does_not_answer_keeps_nobody_for_long(own_server, own_backend):
    store = own_backend.open()
    await store.ping()
    own_server.freeze()
    begun = time.monotonic()
    with pytest.raises(Unavailable):
        await store.ping()
    took = time.monotonic() - begun
    own_server.thaw()
    assert took < PATIENCE + 1
    await until_good(store.ping)
    await store.close()


async def until_good(verb):
    async with asyncio.timeout(10):
        while True:
            try:
                return await verb()
            except Unavailable:
                await asyncio.sleep(0.01)


async def test_a_node_hears_of_changes_again_after_its_listening_connection_is_lost(backend):
    one, other = backend.open(), backend.open()
    (listening,) = await backend.start_listening(other)
    cut = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'gatelodge-listen'"
    own = " AND datname = current_database()"
    assert backend.run(lambda connection: connection.execute(text(cut + own)).scalar_one()) == 1
    before = other.bell()
    await until(lambda: other.bell() != before)  # whatever was missed has to be looked for
    before = other.bell()
    await until(lambda: other.bell() != before)  # it listens again, and has to look for what was said meanwhile
    before = other.bell()
    await one.add_partner(a_partner(), a_key(), by="test")
    await until(lambda: other.bell() != before)
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    await one.close()
    await other.close()


async def test_a_server_that_says_nothing_when_it_is_told_to_listen_is_asked_anew(backend):
    address, port = backend.address.rsplit("@", 1)[0], int(backend.address.rsplit(":", 1)[1].split("/")[0])
    with Cut(port, only=b"LISTEN ") as wire:
        wire.freeze()
        behind = Backend(f"{address}@127.0.0.1:{wire.port}/{backend.address.rsplit('/', 1)[1]}")
        node = behind.open()
        listening = asyncio.create_task(node.listen())
        await until(lambda: behind.faults)
        before = node.bell()
        wire.drop()  # what was held back is never answered
        wire.heal()
        await until(lambda: node.bell() > before)
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        await node.close()


# --- A server that is one of several ---


@contextlib.contextmanager
def a_silent_host():
    """Whoever connects is let in by the kernel, and nobody ever says anything: as a server that is frozen."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def among(address, *hosts):
    """The address with these hosts before its own."""
    user, _, rest = address.rpartition("@")
    return f"{user}@{','.join(hosts)},{rest}"


async def test_a_host_that_says_nothing_does_not_keep_anybody_from_the_one_behind_it(backend):
    with a_silent_host() as one, a_silent_host() as other:
        driver = Backend(among(backend.address, one, other)).driver()
        begun = time.monotonic()
        assert await driver.write(read_tiers) == 3
        assert time.monotonic() - begun < PATIENCE
        await driver.close()


async def test_while_no_host_takes_writes_everything_is_unavailable_and_good_again_when_one_does(own_server, own_backend):
    def switch(state):
        own_server.run_sql(f"ALTER ROLE gatelodge SET default_transaction_read_only = {state}")

    address = among(own_backend.address, f"127.0.0.1:{own_server.port}")
    backend = Backend(address)
    store = backend.open()
    switch("on")
    with pytest.raises(Unavailable):
        await store.ping()
    listening = asyncio.create_task(store.listen())
    await until(lambda: len(backend.faults) > 1)
    switch("off")
    before = store.bell()
    await until(lambda: store.bell() != before)  # it listens again, and has to look for what was said meanwhile
    await store.ping()
    assert not listening.done()
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    await store.close()


async def test_a_connection_that_takes_no_writes_any_more_is_given_up_for_another(driver, backend):
    def become_read_only(connection):
        connection.exec_driver_sql("SET SESSION default_transaction_read_only = on")

    def add(connection):
        connection.execute(insert(tier), {"name": "new", "requests_per_hour": 1, "requests_per_day": 1})

    await driver.write(become_read_only)
    await driver.write(add)
    assert backend.count("tier") == 4
    assert backend.faults == []


async def test_a_commit_that_waits_for_a_standby_is_unknown_and_nobody_sees_it_before_the_standby_has_it(
    own_server, own_backend
):
    def wait_for_standby(name):
        own_server.run_sql(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'", "SELECT pg_reload_conf()")
        return until_good(lambda: asyncio.to_thread(shows, name))

    def shows(name):
        if own_server.run_sql("SHOW synchronous_standby_names") != [[name]]:
            raise Unavailable

    driver, key = own_backend.driver(), a_key()
    store = SqlStore(driver)
    await wait_for_standby("nobody")
    begun = time.monotonic()
    with pytest.raises(Unavailable):
        await store.add_partner(a_partner(), key, by="test")
    assert time.monotonic() - begun < 2 * PATIENCE
    assert "a commit without an answer" in own_backend.faults[-1]
    assert own_backend.count("partner") == 0
    await wait_for_standby("")
    await until(lambda: own_backend.count("partner") == 1)
    await store.close()


# --- The change sequence ---


async def test_steps_become_visible_in_the_order_of_their_numbers(backend):
    """A reader that has seen a step has seen all before it, whatever the order in which transactions come to their end."""
    nodes = [backend.open() for _ in range(3)]
    reader, seen, over = backend.open(), [], False

    async def read():
        while not over:
            after = seen[-1] if seen else 0
            seen.extend(step.sequence for step in await reader.list_changes(after=after, limit=1000))

    reading = asyncio.create_task(read())
    name = "partner-{}-{}"
    await asyncio.gather(
        *(
            node.add_partner(a_partner(name.format(at, number)), a_key(name.format(at, number)), by="test")
            for number in range(40)
            for at, node in enumerate(nodes)
        )
    )
    over = True
    await reading
    seen.extend(step.sequence for step in await reader.list_changes(after=seen[-1], limit=1000))
    assert seen == sorted(number for (number,) in backend.rows("change", "sequence"))
    assert len(seen) == 120
    for node in (*nodes, reader):
        await node.close()


async def test_a_step_waits_for_the_one_before_it(backend, driver):
    """The same by force: one transaction has its number and does not commit yet."""
    got_number, may_commit = asyncio.Event(), []

    def slowly(connection):
        append_change(connection, "partner", "slow", START)
        got_number.set()
        wait_in_the_database(connection, 0.3)
        may_commit.append(connection.execute(select(func.max(change.c.sequence))).scalar_one())

    holding = asyncio.create_task(driver.write(slowly))
    await got_number.wait()
    other = backend.open()
    done = await other.add_partner(a_partner(), a_key(), by="test")
    assert may_commit == [done.sequence - 1]
    await holding
    await other.close()


# --- Starts ---


def test_many_first_starts_at_once_make_one_schema(own_server):
    address = own_server.create("fresh")

    async def starts():
        upgrades = [asyncio.to_thread(database_at(parse_address(address)).upgrade, upgrade) for _ in range(6)]
        return await asyncio.gather(*upgrades)

    assert sorted(asyncio.run(starts())) == [False] * 5 + [True]


def test_what_cannot_be_reached_or_entered_is_said_without_the_password(own_server, own_backend):
    wrong = own_backend.address.replace("postgresql://gatelodge:", "postgresql://gatelodge:not-", 1)
    gone = own_server.url("nowhere")
    for address, why in ((wrong, "password"), (gone, "does not exist")):
        with pytest.raises(DatabaseFault, match=why) as fault:
            database_at(parse_address(address)).is_new()
        assert "not-" not in str(fault.value)
    own_server.stop()
    with pytest.raises(DatabaseFault):
        own_backend.database.is_new()


async def test_a_login_is_durable_when_it_is_answered(own_server, own_backend):
    store = own_backend.open()
    key = a_key()
    await store.add_partner(a_partner(), key, by="test")
    opened = [await store.open_session(a_login(key)) for _ in range(20)]
    await asyncio.to_thread(own_server.kill)
    await asyncio.to_thread(own_server.start)
    assert own_backend.count("session") == len(opened)
    assert own_backend.rows("partner", "id") == [(a_partner().id,)]
    await store.close()
