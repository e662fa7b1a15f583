"""The bell: heard by every process before the writer is told, and by nobody when nothing was committed."""

import asyncio
import os
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
from backends import SqliteBackend
from given import START, a_key, a_login, a_partner, a_refresh

from gatelodge.errors import Unavailable
from gatelodge_server.core.ports import Condemned
from gatelodge_server.store.bell import Bell
from gatelodge_server.store.sqlite import SqliteDriver
from gatelodge_server.store.trail import append_change

WRITER = """
import asyncio, sys
from backends import backend_at
from given import START, a_key, a_partner

async def write():
    store = backend_at(sys.argv[1]).open()
    for line in sys.stdin:
        await store.add_partner(a_partner(line.strip()), a_key(line.strip()), by="test")
        print(store.bell(), flush=True)
    await store.close()

asyncio.run(write())
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "gatelodge.db-bell"


@pytest.fixture
def backend(tmp_path):
    return SqliteBackend.create(tmp_path)


ENDINGS = ("", "-bell", "-wal", "-shm")


def restore(backend, content):
    """Put a backup in the place of what is in the file, as a restore into an open database does."""
    backup = backend.path.with_name("backup")
    backup.write_bytes(content)
    with closing(sqlite3.connect(backup)) as saved, closing(sqlite3.connect(backend.path)) as live:
        saved.backup(live)
    backup.unlink()


def a_step(connection, subject="acme-motors"):
    return append_change(connection, "partner", subject, START)


# --- The file ---


def test_what_one_rings_all_hear(path):
    one, other = Bell(path), Bell(path)
    assert (one(), other()) == (0, 0)
    for number in (1, 2**32, 2**63, 5, 2**64 - 1):
        one.ring(number)
        assert (one(), other(), Bell(path)()) == (number,) * 3


def test_the_number_outlives_whoever_rang(path):
    bell = Bell(path)
    bell.ring(7)
    bell.close()
    assert Bell(path)() == 7


def test_the_bell_is_for_its_owner_only(path):
    Bell(path)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 4096, 10_000])
def test_a_file_of_another_size_is_a_bell_all_the_same(path, size):
    path.write_bytes(b"\1" * size)
    bell = Bell(path)
    assert bell() == int.from_bytes((b"\1" * min(size, 8)).ljust(8, b"\0"), sys.byteorder)
    bell.ring(9)
    assert Bell(path)() == 9
    assert path.stat().st_size == max(size, 9)


def test_whoever_makes_the_file_at_the_same_time_does_not_silence_it(path, monkeypatch):
    """The other process has found no file, and writes it when the first has rung already."""
    first = Bell(path)
    first.ring(41)
    real = os.fstat
    monkeypatch.setattr(os, "fstat", lambda fd: os.stat_result((*real(fd)[:6], 0, *real(fd)[7:])))
    late = Bell(path)
    assert (first(), late()) == (41, 41)


def test_the_bells_memory_has_room_on_the_disk(path):
    """A hole would be a SIGBUS on a full disk, in the middle of a request."""
    Bell(path)
    assert path.stat().st_blocks > 0


@pytest.mark.parametrize("obstacle", ["a directory in its place", "no directory"])
def test_a_bell_that_cannot_be_hung_is_an_oserror(path, obstacle):
    if obstacle == "a directory in its place":
        path.mkdir()
    with pytest.raises(OSError):
        Bell(path if path.exists() else path / "nowhere" / "bell")


# --- The driver ---


async def test_a_change_has_rung_when_its_writer_returns(driver, backend):
    outside = Bell(backend.path.with_name(backend.path.name + "-bell"))
    heard = {outside()}
    for number in range(1, 4):
        assert await driver.write(a_step) == number
        assert driver.bell() == outside()
        assert driver.bell() not in heard
        heard.add(outside())


async def test_several_changes_of_one_transaction_ring_once(backend):
    rung = []
    driver = SqliteDriver(
        backend.path, on_fault=backend.faults.append, entropy=lambda size: rung.append(size) or bytes([*bytes(size - 1), 7])
    )
    assert await driver.write(lambda connection: [a_step(connection) for _ in range(3)]) == [1, 2, 3]
    assert (driver.bell(), rung) == (7, [8])
    await driver.close()


async def test_a_step_that_is_taken_again_after_a_restore_rings_as_another(backend, driver):
    """The bell is no part of a backup: it shows what was rung last before."""
    empty = backend.path.read_bytes()
    await driver.write(a_step)
    heard = driver.bell()
    restore(backend, empty)
    assert driver.bell() == heard
    assert await driver.write(a_step) == 1
    assert driver.bell() != heard


@pytest.mark.parametrize("way", ["the file", "its directory"])
async def test_by_a_symbolic_link_it_is_the_same_bell(backend, driver, tmp_path, way):
    link = tmp_path / "link"
    link.symlink_to(backend.path if way == "the file" else backend.path.parent)
    linked = SqliteBackend(link if way == "the file" else link / backend.path.name)
    other = linked.driver()
    heard = driver.bell()
    await other.write(a_step)
    assert driver.bell() == other.bell() != heard
    await other.close()
    assert {path.name for path in tmp_path.iterdir()} <= {"link", *(backend.path.name + end for end in ENDINGS)}


async def test_what_changes_nothing_rings_nothing(driver):
    await driver.write(a_step)
    driver._bell.ring(77)
    await driver.write(lambda connection: None)
    await driver.read(lambda connection: None)
    assert driver.bell() == 77


async def test_a_transaction_that_is_rolled_back_rings_nothing_and_neither_does_the_next(driver):
    def half(connection):
        a_step(connection)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await driver.write(half)
    assert driver.bell() == 0
    await driver.write(lambda connection: None)
    assert driver.bell() == 0
    await driver.write(a_step)
    assert driver.bell() != 0


async def test_the_bell_does_not_ring_before_the_change_can_be_read(backend):
    """At the stroke itself another connection looks, and must find the step."""
    found = []

    class Looking(Bell):
        def ring(self, number):
            found.append(backend.count("change"))
            super().ring(number)

    driver = SqliteDriver(backend.path, on_fault=backend.faults.append, bell_at=Looking)
    for _ in range(3):
        await driver.write(a_step)
    await driver.close()
    assert found == [1, 2, 3]


async def test_r72_a_store_that_could_not_be_heard_writes_nothing(backend):
    bell = backend.path.with_name(backend.path.name + "-bell")
    bell.mkdir()
    store = backend.open()
    with pytest.raises(Unavailable):
        store.bell()
    with pytest.raises(Unavailable):
        await store.add_partner(a_partner(), a_key(), by="test")
    assert backend.count("partner") == 0
    assert backend.faults == ["no bell: Is a directory"] * 2
    bell.rmdir()
    await store.add_partner(a_partner(), a_key(), by="test")
    assert store.bell() != 0
    await store.close()


async def test_a_cancelled_writers_change_is_heard_all_the_same(backend):
    store = backend.open()
    writing = asyncio.create_task(store.add_partner(a_partner(), a_key(), by="test"))
    await asyncio.sleep(0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    await store.ping()
    await store.add_partner(a_partner("zeta"), a_key("zeta"), by="test")  # behind the other: there is one writer
    assert [change.subject for change in await store.list_changes(after=0, limit=9)] == ["acme-motors", "zeta"]
    assert store.bell() != 0
    await store.close()


async def test_the_store_rings_for_changes_of_a_batch_too(backend):
    store, other = backend.open(), backend.open()
    key = a_key()
    await store.add_partner(a_partner(), key, by="test")
    session = (await store.open_session(a_login(key))).session
    heard = other.bell()
    await store.advance_session(a_refresh(session))
    assert other.bell() == heard  # a refresh is nothing that anybody remembers
    assert isinstance(await store.advance_session(a_refresh(session)), Condemned)
    assert other.bell() != heard
    await store.close()
    await other.close()


# --- Processes ---


async def test_a_change_of_another_process_is_heard_when_its_writer_returns(backend):
    store = backend.open()
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    command = [sys.executable, "-c", WRITER, backend.address]
    with subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        for number in range(1, 21):
            print(f"partner-{number}", file=writer.stdin, flush=True)
            told = await asyncio.to_thread(writer.stdout.readline)
            assert int(told) == store.bell()
            assert await store.last_change() == number
        writer.stdin.close()
    assert writer.returncode == 0
    await store.close()


async def test_writers_of_many_processes_ring_so_that_the_last_change_is_heard(backend):
    """Whatever order they ring in: after all have returned the number is one of theirs, and not the one from before."""
    store = backend.open()
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    command = [sys.executable, "-c", WRITER, backend.address]

    def write(name):
        lines = "".join(f"{name}-{number}\n" for number in range(15))
        return subprocess.run(command, env=environ, input=lines, capture_output=True, text=True, check=True).stdout

    told = await asyncio.gather(*(asyncio.to_thread(write, name) for name in ("one", "two")))
    assert [len(lines.split()) for lines in told] == [15, 15]
    assert str(store.bell()) in {line for lines in told for line in lines.split()}
    assert await store.last_change() == 30
    await store.close()
