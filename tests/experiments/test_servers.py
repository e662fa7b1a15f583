"""The servers that tests and experiments stand on: they come up, keep what they promise, and leave nothing behind."""

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import asyncpg
import psutil
import pytest
from experiments.cut import Cut
from experiments.servers import Nodes, before_hour, postgres_server, wait_for
from postgres import postgres

HOUR = 3600


@pytest.fixture(scope="module")
def durable():
    with postgres_server() as server:
        yield server


@pytest.fixture
def database(durable):
    yield durable.create("lodge")
    durable.drop("lodge")


async def committed(url):
    connection = await asyncpg.connect(url)
    await connection.execute("CREATE TABLE seen (number int)")
    await connection.execute("INSERT INTO seen VALUES (1)")
    await connection.close()


async def test_a_role_that_may_do_nothing_else_owns_the_databases():
    server = postgres()
    url = server.create("owned")
    try:
        await committed(url)
        connection = await asyncpg.connect(url)
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("CREATE ROLE another")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("CREATE DATABASE another")
        await connection.close()
        assert server.create("copied", "owned") != url
        assert server.run_sql("SELECT number FROM seen", database="copied") == [["1"]]
    finally:
        server.drop("owned")
        server.drop("copied")
    assert server.run_sql("SELECT count(*) FROM pg_database WHERE datname IN ('owned', 'copied')") == [["0"]]


async def test_a_password_is_asked_for():
    url = postgres().url("postgres")
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(url, password="another")
    connection = await asyncpg.connect(url)
    assert await connection.fetchval("SELECT current_user") == "gatelodge"
    await connection.close()


async def test_a_database_is_dropped_whoever_is_connected():
    connection = await asyncpg.connect(postgres().create("in_use"))
    postgres().drop("in_use")
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        await connection.fetchval("SELECT 1")


async def test_what_was_committed_outlives_a_kill(durable, database):
    await committed(database)
    assert durable.run_sql("SHOW fsync", "SHOW synchronous_commit", "SHOW full_page_writes") == [["on"]] * 3
    everyone = psutil.Process(durable.process.pid).children(recursive=True)
    port = durable.port
    durable.kill()
    assert not [process for process in everyone if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    with pytest.raises(OSError):
        await asyncpg.connect(database)
    durable.start()
    assert durable.port == port
    assert durable.run_sql("SELECT number FROM seen", database="lodge") == [["1"]]
    durable.restart()
    assert durable.run_sql("SELECT number FROM seen", database="lodge") == [["1"]]


async def test_a_frozen_server_answers_nobody_and_then_goes_on(durable, database):
    connection = await asyncpg.connect(database)
    durable.freeze()
    try:
        asked = asyncio.ensure_future(connection.fetchval("SELECT 7"))
        stopped = [process.status() for process in psutil.Process(durable.process.pid).children()]
        assert set(stopped) == {psutil.STATUS_STOPPED}
        assert not asked.done()
    finally:
        durable.thaw()
    assert await asked == 7
    await connection.close()


def shared_memory():
    """The ids of the segments of System V's shared memory."""
    return {line.split()[1] for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]}


def test_nothing_is_left_of_a_server_that_was_killed():
    with postgres_server() as server:
        server.kill()
        segment = (server.data / "postmaster.pid").read_text().splitlines()[6].split()[-1]
        assert segment in shared_memory()
    assert segment not in shared_memory()
    assert not server.root.exists()


def test_settings_are_for_controls_to_break():
    with postgres_server(settings={"synchronous_commit": "off"}) as server:
        assert server.run_sql("SHOW synchronous_commit", "SHOW fsync") == [["off"], ["on"]]
    assert not server.root.exists()


START_AND_WAIT = """
import sys
from tests.postgres import postgres
server = postgres()
if sys.argv[1] == "frozen":
    server.freeze()
print(server.process.pid, server.root, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("state", "sign"), [("at work", signal.SIGKILL), ("frozen", signal.SIGKILL), ("at work", signal.SIGINT), ("at work", None)]
)
def test_no_server_is_left_behind_however_its_tests_end(state, sign):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", START_AND_WAIT, state]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=root
    ) as tests:
        pid, directory = tests.stdout.readline().split()
        family = [psutil.Process(int(pid)), *psutil.Process(int(pid)).children(recursive=True)]
        if sign is not None:
            tests.send_signal(sign)
    wait_for("the directory's end", lambda: not Path(directory).exists(), timeout=30)
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


@contextlib.contextmanager
def echo(port=0, heard=None):
    """A server that says what it hears, and its port."""
    heard = bytearray() if heard is None else heard
    listener = socket.create_server(("127.0.0.1", port))
    connections = []

    def serve(connection):
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(100):
                heard.extend(data)
                connection.sendall(data)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connections.append(connection)
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def wire():
    with echo() as port, Cut(port) as cut:
        yield cut


def connect(cut):
    connection = socket.create_connection(("127.0.0.1", cut.port))
    connection.settimeout(10)
    return connection


def says(connection, word=b"x"):
    connection.sendall(word)
    return connection.recv(len(word)) == word


def test_a_whole_wire_carries_what_is_said_and_both_ends(wire):
    with connect(wire) as connection:
        assert says(connection, b"word")
        assert wire.connections == 1
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""


def test_a_cut_wire_resets_and_refuses_until_it_is_healed(wire):
    with connect(wire) as connection:
        assert says(connection)
        wire.cut()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with pytest.raises(ConnectionRefusedError):
        connect(wire)
    wire.heal()
    with connect(wire) as connection:
        assert says(connection)


def test_a_drop_resets_what_there_is_and_nothing_else(wire):
    with connect(wire) as connection:
        assert says(connection)
        wire.drop()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with connect(wire) as connection:
        assert says(connection)


def test_a_frozen_wire_holds_back_and_loses_nothing(wire):
    with connect(wire) as connection:
        assert says(connection)
        wire.freeze()
        connection.sendall(b"late")
        with connect(wire) as another:
            another.sendall(b"also")
            for held in (connection, another):
                held.setblocking(False)
                with pytest.raises(BlockingIOError):
                    held.recv(4)
                held.settimeout(10)
            wire.heal()
            assert connection.recv(4) == b"late"
            assert another.recv(4) == b"also"


def test_a_mute_wire_carries_the_request_and_loses_the_answer():
    heard = bytearray()
    with echo(heard=heard) as port, Cut(port) as wire:
        wire.mute()
        with connect(wire) as connection:
            connection.sendall(b"request")
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
        assert heard == b"request"
        wire.heal()
        with connect(wire) as connection:
            assert says(connection)


def test_only_connections_that_have_said_the_word_are_cut():
    with echo() as port, Cut(port, only=b"LISTEN ") as wire, connect(wire) as deaf, connect(wire) as listening:
        assert says(deaf)
        assert says(listening, b"xLIST")
        assert wire.connections == 0
        assert says(listening, b"EN changes")
        assert wire.connections == 1
        wire.cut()
        with pytest.raises(ConnectionResetError):
            listening.recv(1)
        assert says(deaf)
        with connect(wire) as later:
            assert says(later)
            later.sendall(b"LISTEN changes")
            with pytest.raises(ConnectionResetError):
                later.recv(1)


def test_a_wire_to_nobody_refuses_and_opens_when_somebody_listens():
    with echo() as port, Cut(port) as wire, connect(wire) as connection:
        assert says(connection)
    with Cut(port) as wire:
        with pytest.raises(ConnectionRefusedError):
            connect(wire)
        with echo(port):

            def opens():
                with contextlib.suppress(ConnectionRefusedError), connect(wire) as connection:
                    return says(connection)
                return False

            wait_for("the wire to open", opens, timeout=10)


async def test_a_notification_is_lost_when_its_connection_alone_is_cut(durable, database):
    with Cut(durable.port, only=b"LISTEN ") as wire:
        through = database.replace(f":{durable.port}/", f":{wire.port}/")
        listening, asking = await asyncpg.connect(through), await asyncpg.connect(through)
        gone = asyncio.Event()
        listening.add_termination_listener(lambda _: gone.set())
        await listening.add_listener("changes", lambda *_: None)
        wire.cut()
        async with asyncio.timeout(10):
            await gone.wait()
        assert await asking.fetchval("SELECT 1") == 1
        await asking.close()


def test_nodes_share_a_database_and_a_master_key(tmp_path):
    with Nodes(tmp_path, f"sqlite:///{tmp_path}/lodge.db") as nodes:
        one, other = nodes.start(2)
        key = nodes.run("partner", "add", "Acme Motors", "--email", "dev@acme.example")["apiKey"]
        with one.client() as client:
            token = client.post("/auth/login", json={"apiKey": key}).json()["refreshToken"]
        with other.client() as client:
            assert client.post("/auth/refresh", json={"refreshToken": token}).status_code == 200
        assert one.data != other.data
        one.freeze()
        assert psutil.Process(one.pid).status() == psutil.STATUS_STOPPED
        one.thaw()
        one.kill()
        one.start()
        with one.client() as client:
            assert client.get("/readyz").status_code == 200


@pytest.mark.parametrize("seconds", [1, 60, 3599])
@pytest.mark.parametrize("now", [0, 1, 3598, 3599, 3600, 7261])
def test_a_clock_is_set_ahead_to_just_before_a_full_hour(seconds, now):
    offset = before_hour(seconds, now=now)
    assert 0 <= offset < HOUR
    assert (now + offset + seconds) % HOUR == 0
