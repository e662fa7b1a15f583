"""`gatelodge doctor` on a database: whether it can be used as it is, and on PostgreSQL whether nodes would believe it."""

import json
import os
import re
import time
from itertools import count

import pytest
from backends import backend_at
from experiments.cut import Cut
from outside import command
from postgres import postgres
from sqlalchemy import text
from standby import Pair, wait_until

from gatelodge_server.store.leading import PROOF_PATIENCE
from gatelodge_server.store.migrate import HEAD

_names = count(1)
PROVED = "proved by a commit in"


@pytest.fixture(scope="module")
def pair():
    with Pair() as pair:
        yield pair


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path):
    """The address of a database in which there is nothing."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/gatelodge.db"
    return request.getfixturevalue("pair").leader.create(f"doctor_{next(_names)}")


def looked(database, data):
    """What the doctor found, and what of it is wrong, by check. A command has made everything before; TLS is a proxy's."""
    environ = {"GATELODGE_BEHIND_PROXY": "10.0.0.0/8"}
    done = command("doctor", "--json", "--database", database, data=data, environ=environ)
    findings = {finding["check"]: finding for finding in json.loads(done.stdout)}
    wrong = {name: finding["detail"] for name, finding in findings.items() if finding["status"] == "failed"}
    assert done.exit_code == (1 if wrong else 0), done.exception
    return {name: finding["detail"] for name, finding in findings.items()}, wrong


def made(database, data):
    """The same database, with what a first start makes in it."""
    assert command("partner", "list", "--database", database, data=data).exit_code == 0
    return database


@pytest.fixture
def there(pair, tmp_path):
    """A deployment on a server with a standby."""
    return made(pair.leader.create(f"doctor_{next(_names)}"), tmp_path)


def change(database, *statements):
    def work(connection):
        for statement in statements:
            connection.execute(text(statement))

    backend_at(database).run(work)


# --- its schema -----------------------------------------------------------------------------------------------------------


def test_a_database_whose_migrations_are_behind_is_complained_of_once_with_the_command_to_run(tmp_path, database):
    made(database, tmp_path)
    change(database, "DROP TABLE key_check", "UPDATE alembic_version SET version_num = '0006'")
    found, wrong = looked(database, tmp_path)
    assert list(wrong) == ["schema"]
    assert wrong["schema"].startswith(f"at version 0006, this program needs {HEAD}: run `gatelodge database upgrade`")
    assert {"signing keys", "mail", "changes"}.isdisjoint(found)
    assert {"database", "durability", "master key", "certificate"} <= set(found)


def test_what_the_complaint_says_to_run_makes_it_good(tmp_path, database):
    made(database, tmp_path)
    # What the migrations since then have made.
    change(database, "DROP TABLE key_check", "ALTER TABLE verifier DROP COLUMN clock")
    change(database, "UPDATE alembic_version SET version_num = '0006'")
    assert command("database", "upgrade", "--database", database, data=tmp_path).exit_code == 0
    assert looked(database, tmp_path)[1] == {}


def test_a_database_of_a_newer_version_is_not_to_be_upgraded(tmp_path, database):
    made(database, tmp_path)
    change(database, "UPDATE alembic_version SET version_num = '9999'")
    assert looked(database, tmp_path)[1] == {"schema": f"at version 9999, this program knows {HEAD}: use a newer one"}


# --- whether it leads -----------------------------------------------------------------------------------------------------


def test_a_file_leads_nobody(tmp_path):
    found, wrong = looked(made(f"sqlite:///{tmp_path}/gatelodge.db", tmp_path), tmp_path)
    assert wrong == {}
    assert {"leadership", "changes"}.isdisjoint(found)


def test_a_server_whose_standby_confirms_a_commit_has_proved_that_it_leads(pair, there, tmp_path):
    found, wrong = looked(there, tmp_path)
    assert wrong == {}
    assert re.fullmatch(rf"{PROVED} \d+ ms", found["leadership"])
    assert "on a standby (standby)" in found["durability"]
    assert "news is heard after" in found["changes"]


def test_a_server_whose_standby_confirms_nothing_is_said_not_to_be_believed(pair, there, tmp_path):
    pair.standby.freeze()
    try:
        begun = time.monotonic()
        found, wrong = looked(there, tmp_path)
        took = time.monotonic() - begun
    finally:
        pair.standby.thaw()
    assert list(wrong) == ["leadership"]
    assert "no standby confirms a commit, and without that nodes refuse everything (tried for 3 s)" in wrong["leadership"]
    assert "one of synchronous_standby_names (standby) running" in wrong["leadership"]
    assert "changes" not in found
    assert PROOF_PATIENCE < took < 4 * PROOF_PATIENCE
    assert looked(there, tmp_path)[1] == {}


def test_the_doctor_leaves_the_commit_that_nobody_confirms_to_the_standby(pair, there, tmp_path):
    """It hangs up, and does not have it cancelled: what was written would be seen, and be lost with the server."""
    before = len(pair.leader.log())
    pair.standby.freeze()
    try:
        looked(there, tmp_path)
        assert pair.leader.run_sql("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'") == [["1"]]
    finally:
        pair.standby.thaw()
    wait_until(lambda: pair.leader.run_sql("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'") == [])
    assert "canceling" not in pair.leader.log()[before:]


def test_a_user_who_may_not_prove_that_the_server_leads_is_told_what_to_run(pair, there, tmp_path):
    name = there.rsplit("/", 1)[1]
    # It has one more parameter since PostgreSQL 17, and a twin for bytes.
    which = "SELECT oid::regprocedure FROM pg_proc WHERE proname = 'pg_logical_emit_message'"
    for (function,) in pair.leader.run_sql(which):
        pair.leader.run_sql(f"REVOKE EXECUTE ON FUNCTION {function} FROM PUBLIC", database=name)
    _, wrong = looked(there, tmp_path)
    assert list(wrong) == ["leadership"]
    assert "may not prove by a commit that the server leads (permission denied for function" in wrong["leadership"]
    pair.leader.run_sql(re.search("run `(GRANT [^`]+)`", wrong["leadership"])[1], database=name)
    assert looked(there, tmp_path)[1] == {}


@pytest.mark.parametrize(
    ("lost", "check", "said"),
    [
        (b"pg_logical_emit_message", "leadership", "a commit is not done, and without that nodes refuse everything"),
        (b"pg_notify", "changes", "another does not hear within a second: nodes hear of revocations half a second late"),
    ],
)
def test_a_server_without_a_standby_that_does_not_answer_is_told_from_one_with(tmp_path, lost, check, said):
    database = made(postgres().create(f"doctor_{os.getpid()}_{next(_names)}"), tmp_path)
    with Cut(postgres().port, only=lost) as wire:
        wire.freeze()
        _, wrong = looked(database.replace(f":{postgres().port}/", f":{wire.port}/"), tmp_path)
    # The server of these tests is not durable.
    assert set(wrong) == {check, "durability"}
    assert said in wrong[check]
    assert "standby" not in wrong[check]
