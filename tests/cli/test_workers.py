"""Workers while PostgreSQL is away: those that live go on, and those that end come back with it."""

import json
import signal
import subprocess

import psutil
import pytest
from harness import PROGRAM, Server, clean_environment
from outside import command, until
from postgres import FAST, PostgresServer
from uvicorn.config import STARTUP_FAILURE

WORKERS = 2


@pytest.fixture
def database():
    with PostgresServer(settings={**FAST, "synchronous_commit": "on"}) as server:
        yield server


def workers_of(server):
    children = psutil.Process(server.process.pid).children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def said(server, event):
    lines = [json.loads(line) for line in server.log_path.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("event") == event]


def marks(server):
    """Which workers answer: each writes a mark of its own into `X-Request-Id`."""
    with server.client() as client:
        answers = [client.get("/readyz", headers={"Connection": "close"}) for _ in range(8)]
    return {answer.headers["x-request-id"].partition("-")[0] for answer in answers if answer.status_code == 200}


def test_p7_a_worker_that_is_killed_while_the_database_is_away_comes_back_with_it_and_takes_no_other_along(tmp_path, database):
    with Server(tmp_path / "data", "--workers", str(WORKERS), "--database", database.create("lodge")) as server:
        first, *others = workers_of(server)
        database.stop()
        first.send_signal(signal.SIGKILL)
        until(lambda: len(said(server, "worker_ended")) >= 2, "another one that cannot start")
        assert [ended["exit_code"] for ended in said(server, "worker_ended")[:2]] == [-signal.SIGKILL, STARTUP_FAILURE]
        database.start()
        seen = set()
        until(lambda: seen.update(marks(server)) or len(seen) == WORKERS, "all workers")
        assert {worker.pid for worker in others} < {worker.pid for worker in workers_of(server)}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_start_while_the_database_takes_no_writes_is_refused_in_a_line_without_a_traceback(tmp_path, database, workers):
    data = tmp_path / "data"
    address = database.create("lodge")
    assert command("partner", "list", "--database", address, data=data).exit_code == 0
    database.run_sql("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    database.run_sql("SELECT pg_reload_conf()")
    start = [*PROGRAM, "serve", "--json", "--data", str(data), "--database", address, "--port", "0", "--workers", workers]
    done = subprocess.run(start, env=clean_environment(), capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("the service could not start")
