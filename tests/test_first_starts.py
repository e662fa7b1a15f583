"""Whose a database becomes: of starts at once, each with a master key of its own, one has it and the others say so."""

import base64
import itertools
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from backends import backend_at
from harness import PROGRAM, Server, clean_environment
from moving import run_of
from outside import command, until
from postgres import postgres
from sqlalchemy import delete

from gatelodge_server.deployment import StartFault, prepare
from gatelodge_server.settings import load_settings
from gatelodge_server.store.tables import key_check

_names = itertools.count(1)
DATABASES = ("sqlite", "postgresql")


def new_line():
    return base64.urlsafe_b64encode(os.urandom(32)).decode().rstrip("=")


@pytest.fixture
def make_database(tmp_path):
    """Makes the address of a database in which there is nothing."""

    def make(kind):
        if kind == "sqlite":
            return f"sqlite:///{tmp_path}/shared-{next(_names)}/gatelodge.db"
        return postgres().create(f"first_{os.getpid()}_{next(_names)}")

    return make


@pytest.fixture(params=DATABASES)
def database(request, make_database):
    return make_database(request.param)


def start(data, database, **environ):
    """What every server and command begins with."""
    return prepare(load_settings({"data": str(data), "database": database}, {}), environ)


def attempt(*args, **environ):
    try:
        return start(*args, **environ)
    except StartFault as fault:
        return fault


def key_of(data):
    return (data / "master.key").read_text().strip()


@pytest.mark.parametrize("kind", DATABASES)
def test_of_first_starts_at_once_on_two_machines_one_has_the_database(tmp_path, make_database, kind):
    for turn in range(12):
        database, machines = make_database(kind), [tmp_path / f"{turn}-{name}" for name in ("one", "two", "three")]
        gate = threading.Barrier(len(machines))

        def begin(data, database=database, gate=gate):
            gate.wait()
            return attempt(data, database)

        with ThreadPoolExecutor(len(machines)) as threads:
            outcomes = dict(zip(machines, threads.map(begin, machines), strict=True))
        (winner,) = [data for data, outcome in outcomes.items() if not isinstance(outcome, StartFault)]
        for data, outcome in outcomes.items():
            if data != winner:
                assert "master key" in str(outcome)
                assert not (data / "master.key").exists()
                (data / "master.key").write_text((winner / "master.key").read_text())
                (data / "master.key").chmod(0o600)
            start(data, database)


def test_each_has_made_its_key_before_the_other_reaches_the_database(tmp_path):
    """The narrowest case: a third holds up both. Whoever comes second removes its key and says what to do."""
    database, machines = postgres().create(f"first_{os.getpid()}_{next(_names)}"), [tmp_path / "one", tmp_path / "two"]
    with ThreadPoolExecutor(len(machines) + 1) as threads:
        is_held = threading.Event()

        def hold(_):
            is_held.set()
            until(lambda: all((data / "master.key").exists() for data in machines), "both have made a key")

        holding = threads.submit(backend_at(database).run, hold)
        assert is_held.wait(10)
        outcomes = list(threads.map(lambda data: attempt(data, database), machines))
        holding.result()
    (refused,) = [(data, outcome) for data, outcome in zip(machines, outcomes, strict=True) if isinstance(outcome, StartFault)]
    assert "was made under another master key" in str(refused[1])
    assert f"Copy master.key of a node that serves it to {refused[0]}/master.key" in str(refused[1])
    assert "GATELODGE_MASTER_KEY" in str(refused[1])
    assert list(refused[0].iterdir()) == []


def test_of_two_commands_at_once_on_two_machines_one_is_done(tmp_path, database):
    """The same with processes."""
    arguments = ["partner", "add", "Acme", "--email", "a@b.example", "--database", database]
    processes = [
        subprocess.Popen(
            [*PROGRAM, *arguments, "--data", str(tmp_path / name)],
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    said = [process.communicate(timeout=60) for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 1]
    (refusal,) = [stderr for process, (_, stderr) in zip(processes, said, strict=True) if process.returncode == 1]
    assert "master key" in refusal
    assert refusal.count("\n") == 1
    assert sorted((tmp_path / name / "master.key").exists() for name in ("one", "two")) == [False, True]


def test_a_key_that_this_start_has_not_made_stays_where_it_is(tmp_path, database):
    start(tmp_path / "one", database)
    (tmp_path / "two").mkdir()
    line = new_line()
    (tmp_path / "two" / "master.key").write_text(line)
    (tmp_path / "two" / "master.key").chmod(0o600)
    with pytest.raises(StartFault, match="another master key"):
        start(tmp_path / "two", database)
    assert key_of(tmp_path / "two") == line


def test_a_key_in_the_environment_is_held_to_the_same(tmp_path, database):
    mine = new_line()
    start(tmp_path, database, GATELODGE_MASTER_KEY=mine)
    with pytest.raises(StartFault, match="another master key"):
        start(tmp_path, database, GATELODGE_MASTER_KEY=new_line())
    start(tmp_path, database, GATELODGE_MASTER_KEY=mine)


def test_starts_at_once_in_one_directory_share_its_key(tmp_path, database):
    gate = threading.Barrier(3)

    def begin(_):
        gate.wait()
        return subprocess.run(
            [*PROGRAM, "partner", "list", "--data", str(tmp_path / "data"), "--database", database],
            env=clean_environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    with ThreadPoolExecutor(3) as threads:
        assert [(done.returncode, done.stderr) for done in threads.map(begin, range(3))] == [(0, "")] * 3


# --- the master key is replaced -------------------------------------------------------------------------------------------


def test_a_master_key_is_replaced_node_by_node_and_each_start_between_is_good(tmp_path, database):
    old, new = new_line(), new_line()
    for listed in (old, f"{new},{old}", old, f"{new},{old}", new, f"{new},{old}", new):
        start(tmp_path, database, GATELODGE_MASTER_KEY=listed)
    with pytest.raises(StartFault, match="another master key"):
        start(tmp_path, database, GATELODGE_MASTER_KEY=new_line())


def test_a_key_that_never_stood_beside_a_known_one_is_refused(tmp_path, database):
    old, new = new_line(), new_line()
    start(tmp_path, database, GATELODGE_MASTER_KEY=old)
    with pytest.raises(StartFault, match="another master key"):
        start(tmp_path, database, GATELODGE_MASTER_KEY=new)


def test_a_start_that_has_nothing_to_add_writes_nothing(tmp_path, database):
    line = new_line()
    backend = backend_at(database)
    start(tmp_path, database, GATELODGE_MASTER_KEY=line)
    before = backend.rows("key_check", "key_id", "sealed")
    start(tmp_path, database, GATELODGE_MASTER_KEY=line)
    assert backend.rows("key_check", "key_id", "sealed") == before
    assert len(before) == 1


def test_a_database_of_an_earlier_version_is_of_whoever_starts_on_it_first_and_has_its_keys(tmp_path, database):
    """Nothing is kept in it for any master key. Its signing keys say whose it is; from the next start on it knows by itself."""
    mine = new_line()
    named = ("--database", database)
    assert command("partner", "list", *named, data=tmp_path, environ={"GATELODGE_MASTER_KEY": mine}).exit_code == 0
    backend_at(database).run(lambda connection: connection.execute(delete(key_check)))
    with pytest.raises(StartFault, match="another master key"):
        start(tmp_path, database, GATELODGE_MASTER_KEY=new_line())
    start(tmp_path, database, GATELODGE_MASTER_KEY=mine)
    assert backend_at(database).count("key_check") == 1


@pytest.mark.parametrize(("old", "new"), [("sqlite", "postgresql"), ("postgresql", "sqlite")])
def test_a_copy_is_of_the_same_master_key(tmp_path, make_database, old, new):
    source, target, mine = make_database(old), make_database(new), new_line()
    start(tmp_path, source, GATELODGE_MASTER_KEY=mine)
    run_of(backend_at(source), backend_at(target)).run()
    with pytest.raises(StartFault, match="another master key"):
        start(tmp_path, target, GATELODGE_MASTER_KEY=new_line())
    start(tmp_path, target, GATELODGE_MASTER_KEY=mine)


def test_the_doctor_says_that_a_database_without_signing_keys_is_of_another_master_key(tmp_path, database):
    start(tmp_path, database, GATELODGE_MASTER_KEY=new_line())
    done = command("doctor", "--database", database, data=tmp_path, environ={"GATELODGE_MASTER_KEY": new_line()})
    assert "it knows none of the present master keys" in done.stdout


# --- the marking ----------------------------------------------------------------------------------------------------------


def test_a_server_whose_database_is_marked_anew_is_not_ready_until_it_is_its_own_again(tmp_path):
    """A first start with a slip in the environment can be made good by another, and the first server gives nothing out."""
    data = tmp_path / "data"
    with Server(data) as server, server.client() as client:
        assert client.get("/readyz").status_code == 200
        assert command("partner", "list", "--environment", "production", data=data).exit_code == 0
        until(lambda: client.get("/readyz").status_code == 503, "the server is not ready")
        assert "is marked as production, gatelodge, partner-api-production" in server.log_path.read_text()
        assert command("partner", "list", "--environment", "uat", data=data).exit_code == 0
        until(lambda: client.get("/readyz").status_code == 200, "the server is ready")
        assert command("partner", "add", "Acme", "--email", "a@b.example", data=data).exit_code == 0
        refused = command("partner", "list", "--environment", "production", data=data)
        assert refused.exit_code == 1
        assert "has credentials of the environment uat, not production" in refused.stderr
        assert client.get("/readyz").status_code == 200
