"""`gatelodge doctor` on a database: whether it can be used as it is, and on PostgreSQL whether nodes would believe it."""

import contextlib
import json
import os
import re
import time
from itertools import count

import pytest
from backends import backend_at
from experiments.cut import Cut
from experiments.servers import FakeClock
from moving import Stopped, at, run_of, stop
from outside import command
from postgres import DURABLE, PostgresServer, postgres
from sqlalchemy import text
from standby import Pair, wait_until

from gatelodge_server.deployment import system_clock
from gatelodge_server.doctor import NotFine, judge_clocks
from gatelodge_server.relocating import abandon
from gatelodge_server.store.address import parse_address
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


def looked(database, data, **settings):
    """What the doctor found, and what of it is wrong, by check. A command has made everything before; TLS is a proxy's."""
    environ = {
        "GATELODGE_BEHIND_PROXY": "10.0.0.0/8",
        **{f"GATELODGE_{name.upper()}": str(settings[name]) for name in settings},
    }
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


# --- whether it is the one to start on ------------------------------------------------------------------------------------


def move(old, new, until):
    """Move a deployment, and stop at a step, or go back once the old database was gone."""
    with contextlib.suppress(Stopped):
        run_of(backend_at(old), backend_at(new), tell=at("gone" if until == "abandoned" else until, stop)).run()
    if until == "abandoned":
        abandon(parse_address(old), parse_address(new), clock=system_clock)


@pytest.mark.parametrize(
    ("until", "side", "said"),
    [
        ("copying", "old", None),
        ("closed", "old", "is being moved to OTHER and takes no writes"),
        ("gone", "old", "has been moved: start with `--database OTHER`"),
        ("complete", "old", "has been moved: start with `--database OTHER`"),
        ("abandoned", "old", None),
        ("copying", "new", "is an incomplete copy of OTHER"),
        ("gone", "new", "is an incomplete copy of OTHER"),
        ("complete", "new", None),
        ("abandoned", "new", "is a copy of OTHER that was given up: start there"),
    ],
)
def test_of_two_databases_of_a_move_the_doctor_says_what_a_start_on_them_says(tmp_path, database, until, side, said):
    other = f"sqlite:///{tmp_path}/other.db"
    old, new = (database, other) if side == "old" else (other, database)
    move(made(old, tmp_path), new, until)
    found, wrong = looked(database, tmp_path)
    start = command("partner", "list", "--database", database, data=tmp_path)
    if said is None:
        assert (wrong, start.exit_code) == ({}, 0)
        return
    assert list(wrong) == ["use"]
    assert said.replace("OTHER", other) in wrong["use"]
    assert start.exit_code == 1
    assert wrong["use"] in start.stderr
    assert {"schema", "signing keys", "mail", "changes"}.isdisjoint(found)
    assert {"database", "durability", "master key", "certificate"} <= set(found)


def test_what_nobody_may_start_on_is_not_said_to_be_upgraded(tmp_path, database):
    move(made(database, tmp_path), f"sqlite:///{tmp_path}/other.db", "complete")
    change(database, "UPDATE alembic_version SET version_num = '0006'")
    assert list(looked(database, tmp_path)[1]) == ["use"]


def test_a_database_from_before_there_were_moves_may_be_started_on(tmp_path, database):
    made(database, tmp_path)
    change(database, "DROP TABLE relocation", "UPDATE alembic_version SET version_num = '0006'")
    assert list(looked(database, tmp_path)[1]) == ["schema"]


def test_a_database_that_moves_away_while_the_doctor_looks_is_a_finding(there, tmp_path):
    """A row that a start lets pass and a reading of changes does not: as if it had become that in between."""
    change(there, "INSERT INTO relocation VALUES (1, 'm', 'target', 'gone', 'elsewhere', NULL, NULL, 0)")
    assert list(looked(there, tmp_path)[1]) == ["changes"]


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


# --- its clock and its connections ----------------------------------------------------------------------------------------

CONNECTIONS = 12
RESERVED = 3


@pytest.fixture(scope="module")
def clock():
    return FakeClock()


@pytest.fixture(scope="module")
def small(clock):
    """A durable server without a standby, with few connections, whose clock can be set."""
    limits = {"max_connections": str(CONNECTIONS), "superuser_reserved_connections": str(RESERVED)}
    with PostgresServer(settings={**DURABLE, **limits}, environ=clock.environ) as server:
        yield server


@pytest.fixture
def on_small(small, tmp_path):
    return made(small.create(f"doctor_{next(_names)}"), tmp_path)


@pytest.fixture
def started_at(small, clock, tmp_path):
    """Makes a deployment while the database's clock is ahead by so many seconds, which it stays."""

    def start(ahead):
        clock.set(ahead)
        return made(small.create(f"doctor_{next(_names)}"), tmp_path)

    yield start
    clock.set(0)


@pytest.mark.parametrize(("ahead", "said"), [(-3, "ahead of"), (-1, None), (0, None), (1, None), (3, "behind")])
def test_a_clock_that_is_off_by_more_than_two_seconds_is_complained_of(started_at, tmp_path, ahead, said):
    found, wrong = looked(started_at(ahead), tmp_path)
    if said is None:
        assert wrong == {}
        assert re.fullmatch(r"\d\.\d s apart from the database's", found["clock"])
    else:
        assert list(wrong) == ["clock"]
        assert re.match(rf"this machine's is [23]\.\d s {said} the database's: are both kept by NTP\?", wrong["clock"])
        assert "the times in its log are wrong" in wrong["clock"]


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (-2001, "2.0 s ahead of"),
        (-2000, None),
        (-1999, None),
        (0, None),
        (50, None),
        (100, None),
        (2099, None),
        (2100, None),
        (2101, "2.0 s behind"),
    ],
)
def test_two_seconds_are_reckoned_from_the_nearer_of_two_looks_at_the_own_clock(there, said):
    begun = system_clock()
    if said is None:
        assert judge_clocks(begun, begun + there, begun + 100).endswith(" s apart from the database's")
    else:
        with pytest.raises(NotFine, match=f"this machine's is {said} the database's"):
            judge_clocks(begun, begun + there, begun + 100)


@pytest.mark.parametrize("hours", [-1, 1])
def test_what_the_database_has_dated_is_judged_by_its_clock(started_at, tmp_path, hours):
    """Else keys would be said not to sign yet, and mails to wait for too long."""
    database = started_at(hours * 3600)
    now = "(SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT) AS now) AS clock"
    columns = "id, kind, recipient, facts, created_at, due_at, expires_at"
    change(database, f"INSERT INTO outbox ({columns}) SELECT 'm', 'verification', 'x', '{{}}', now, now, now FROM {now}")
    found, wrong = looked(database, tmp_path)
    assert list(wrong) == ["clock"]
    assert "1 waiting, the oldest for 0 minutes" in found["mail"]


@pytest.mark.parametrize(
    ("whose", "limit", "settings", "wanted"),
    [
        ("role", 4, {"database_pool": 4}, 5),
        ("role", 5, {"database_pool": 4}, 5),
        ("role", 6, {"database_pool": 4}, 5),
        ("role", 5, {"database_pool": 2, "workers": 2}, 6),
        ("role", 6, {"database_pool": 2, "workers": 2}, 6),
        ("role", 8, {}, 9),
        ("database", 4, {"database_pool": 4}, 5),
        ("database", 5, {"database_pool": 4}, 5),
    ],
)
def test_a_connection_limit_must_let_all_workers_have_their_pool_and_listen(
    on_small, small, tmp_path, whose, limit, settings, wanted
):
    name, by = {
        "role": ("ROLE gatelodge", "its role"),
        "database": (f"DATABASE {on_small.rsplit('/', 1)[1]}", "the database"),
    }[whose]
    small.run_sql(f"ALTER {name} CONNECTION LIMIT {limit}")
    try:
        found, wrong = looked(on_small, tmp_path, **settings)
    finally:
        small.run_sql(f"ALTER {name} CONNECTION LIMIT -1")
    if wanted <= limit:
        assert wrong == {}
        assert re.fullmatch(rf"\d+ of {limit} in use; this node wants {wanted} at most", found["connections"])
    else:
        said = f"this node may want {wanted}, the CONNECTION LIMIT of {by} leaves {limit}: lower database_pool or workers, or"
        assert list(wrong) == ["connections"]
        assert said in wrong["connections"]


@pytest.mark.parametrize(("pool", "enough"), [(7, True), (8, True), (9, False)])
def test_what_a_server_keeps_for_superusers_is_nothing_for_nodes(on_small, tmp_path, pool, enough):
    found, wrong = looked(on_small, tmp_path, database_pool=pool)
    assert set(wrong) == (set() if enough else {"connections"})
    left = CONNECTIONS - RESERVED
    said = f"of {left} in use; this node wants {pool + 1}" if enough else f"may want {pool + 1}, max_connections leaves {left}:"
    assert said in found["connections"]


def test_what_a_server_keeps_for_others_is_nothing_for_nodes(tmp_path):
    kept = {"max_connections": "14", "superuser_reserved_connections": "3", "reserved_connections": "3"}
    with PostgresServer(settings={**DURABLE, **kept}) as server:
        database = made(server.create("lodge"), tmp_path)
        assert looked(database, tmp_path, database_pool=7)[1] == {}
        assert "may want 9, max_connections leaves 8:" in looked(database, tmp_path, database_pool=8)[1]["connections"]
