"""A deployment is copied into another database: every row of it, whatever comes between."""

import subprocess
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

import moving
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from backends import BACKENDS, PostgresBackend, SqliteBackend
from moving import AT, IDS, STEPS, Stopped, at, everything_in, fill, run_of, stop
from postgres import FAST, PostgresServer, postgres
from sqlalchemy import String, delete, insert, update
from sqlalchemy.dialects import postgresql

from gatelodge_server.relocating import CopyRefused, abandon
from gatelodge_server.store.address import parse_address
from gatelodge_server.store.copying import in_order
from gatelodge_server.store.database import database_at
from gatelodge_server.store.faults import DatabaseFault
from gatelodge_server.store.migrate import HEAD
from gatelodge_server.store.relocation import COPIED, Relocation, Role, State, find_relocation, why_not_used
from gatelodge_server.store.sides import side_of
from gatelodge_server.store.tables import change, company, deployment, issuer, metadata, partner, session, tier
from gatelodge_server.store.trail import append_change, last_change

WAYS = [(old, new) for old in BACKENDS for new in BACKENDS]


@pytest.fixture
def new_backend(tmp_path):
    """Makes a database as the migrations do."""
    made = []

    def make(kind):
        made.append(kind)
        directory = tmp_path / str(len(made))
        directory.mkdir()
        return BACKENDS[kind].create(directory)

    return make


@pytest.fixture
def source(new_backend):
    """An embedded database with rows in every table."""
    backend = new_backend("sqlite")
    fill(backend)
    return backend


@pytest.fixture
def target(new_backend):
    return new_backend("postgresql")


def mark_of(backend):
    found = backend.database.read(find_relocation)
    return None if found is None else (found.role, found.state)


def assert_moved(source, target, before=None):
    """The new database has what the old one has, and is the one that is used."""
    assert everything_in(target) == everything_in(source) == (before or everything_in(source))
    assert (mark_of(source), mark_of(target)) == ((Role.SOURCE, State.GONE), (Role.TARGET, State.COMPLETE))
    assert target.database.read(why_not_used) is None
    assert "has been moved" in source.database.read(why_not_used)


@pytest.mark.parametrize(("old", "new"), WAYS, ids=[f"{old}-to-{new}" for old, new in WAYS])
def test_every_row_of_every_table_is_copied(new_backend, old, new):
    source, target = new_backend(old), new_backend(new)
    fill(source)
    before = everything_in(source)
    assert all(before.values())
    steps = []
    copied = run_of(source, target, tell=steps.append).run()
    assert (copied.tables, copied.rows, copied.changed) == (len(COPIED), sum(map(len, before.values())), 0)
    assert_moved(source, target, before)
    assert list(dict.fromkeys(step.name for step in steps)) == list(STEPS)
    assert all(0 <= step.done <= step.total for step in steps)


@pytest.mark.parametrize("new", BACKENDS)
def test_the_copy_is_a_database_as_the_migrations_make_it_with_its_rules_in_force(new_backend, source, new):
    target = new_backend(new)
    run_of(source, target).run()

    def look(connection):
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []

    target.run(look)
    stray = {"id": b"x" * 16, "credential_id": "nobody", "epoch": 0, "generation": 0}
    stray |= dict.fromkeys(("started_at", "rotated_at", "expires_at", "retires_at"), AT)
    twin = {"id": b"y" * 16, "partner_id": "Zed", "company_name": "x", "country": "DE", "tax_number": "Zed"}
    twin |= {"canonical_tax_number": "Zed", "created_at": AT}
    for table, row in ((session, stray), (company, twin)):
        with pytest.raises(DatabaseFault, match=r"violates|constraint failed"):
            target.run(lambda connection, table=table, row=row: connection.execute(insert(table), row))


@pytest.mark.parametrize(("old", "new"), WAYS, ids=[f"{old}-to-{new}" for old, new in WAYS])
def test_a_number_that_was_given_to_a_row_once_is_not_given_again(new_backend, old, new):
    source, target = new_backend(old), new_backend(new)
    fill(source)
    last = source.database.read(last_change)
    source.run(lambda connection: connection.execute(delete(change).where(change.c.sequence >= last - 1)))
    run_of(source, target).run()
    assert target.database.read(last_change) == last - 2
    assert target.run(lambda connection: append_change(connection, "partner", "x", AT)) == last + 1


def test_a_table_that_never_had_a_row_is_numbered_from_one(new_backend, target):
    source = new_backend("sqlite")
    marking = {"id": 1, "environment": "uat", "brand": "gatelodge", "audience": "a"}
    source.run(lambda connection: connection.execute(insert(deployment), marking))
    run_of(source, target).run()
    assert target.run(lambda connection: append_change(connection, "partner", "x", AT)) == 1


def test_keys_are_walked_through_by_their_bytes_whatever_the_language_of_the_database():
    """The PostgreSQL of the tests was built without languages, so no row could show it."""
    for table in COPIED:
        on_postgresql = str(in_order(table, "postgresql").compile(dialect=postgresql.dialect()))
        order = on_postgresql.rpartition("ORDER BY ")[2]
        texts = [column for column in table.primary_key.columns if isinstance(column.type, String)]
        assert order.count(' COLLATE "C"') == len(texts), order
    assert str(in_order(partner, "sqlite")).endswith("ORDER BY partner.id")
    assert sorted(IDS) == list(IDS) != sorted(IDS, key=str.casefold)


# --- it changes while it is copied ----------------------------------------------------------------------------------------


def shake(source):
    """Everything that may happen to a row after it was copied; values that are unique go from one row to another."""

    def write(connection):
        connection.execute(update(session).values(generation=session.c.generation - 1).where(session.c.epoch == 0))
        connection.execute(delete(session).where(session.c.id == bytes(16)))
        connection.execute(delete(metadata.tables["usage"]).where(metadata.tables["usage"].c.partner_id == "ab"))
        late = {"id": b"\x80" * 16, "credential_id": "key-Zed", "epoch": 0, "generation": 0}
        connection.execute(insert(session), late | dict.fromkeys(("started_at", "rotated_at", "expires_at", "retires_at"), AT))
        connection.execute(update(partner).where(partner.c.id == "é").values(registered_address=None))
        connection.execute(update(partner).where(partner.c.id == "a_b").values(status="deactivated", name="x\u2028y"))
        connection.execute(update(partner).where(partner.c.id == "Zed").values(registered_address="a_b@acme.example"))
        connection.execute(insert(tier), {"name": "gold", "requests_per_hour": 1, "requests_per_day": 1})
        connection.execute(update(partner).where(partner.c.id == "aB").values(tier="gold"))
        append_change(connection, "partner", "aB", AT)

    source.run(write)


@pytest.mark.parametrize("new", BACKENDS)
@pytest.mark.parametrize("step", ["copying", "copied"])
def test_what_changes_after_it_was_copied_is_brought_over(new_backend, source, new, step):
    source.run(
        lambda connection: connection.execute(
            update(partner).where(partner.c.id == "a_b").values(registered_address="a_b@acme.example")
        )
    )
    target = new_backend(new)
    copied = run_of(source, target, tell=at(step, lambda: shake(source))).run()
    assert (copied.changed > 5) == (step == "copied")
    assert_moved(source, target)
    assert len(target.rows("tier", "name")) == 2


def test_a_row_that_refers_to_one_that_was_not_copied_yet_waits_for_nothing(source, target):
    """A partner and its key are added when partners have been copied, and keys have not."""

    def add():
        row = dict(zip(partner.columns.keys(), source.rows("partner", *partner.columns.keys())[0], strict=True))
        key = {"id": "late", "kind": "pk", "partner_id": "0-late", "digest": bytes(32), "masked": "x", "created_at": AT}

        def write(connection):
            connection.execute(insert(partner), row | {"id": "0-late", "registered_address": None})
            connection.execute(insert(metadata.tables["credential"]), key)

        source.run(write)

    passed = []

    def tell(step):
        if step.name == "copying" and not passed and target.count("partner") == 8:
            passed.append(step)
            add()

    run_of(source, target, tell=tell).run()
    assert passed
    assert_moved(source, target)


# --- it is killed, and goes on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
def test_a_copy_that_is_killed_goes_on_and_loses_nothing(source, target, step):
    before = everything_in(source)
    command = [sys.executable, moving.__file__, source.address, target.address, step]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(moving.__file__).parent
    ) as process:
        assert process.stdout.readline() == f"{step}\n"
        process.kill()
    place = STEPS.index(step)
    assert (target.database.read(why_not_used) is None) == (step == "complete")
    assert (source.database.read(why_not_used) is None) == (place < STEPS.index("closed"))
    again = []
    run_of(source, target, tell=again.append).run()
    assert_moved(source, target, before)
    if step == "copied":  # what was copied is not copied once more
        assert not [told for told in again if told.name == "copying"]
    run_of(source, target).run()  # and once it is done there is nothing to do
    assert_moved(source, target, before)


@pytest.mark.parametrize("step", STEPS[:-1])
def test_of_two_runs_at_once_the_later_one_overtakes_the_other(source, target, step):
    def overtake():
        run_of(source, target).run()

    with pytest.raises(CopyRefused, match="taken over"):
        run_of(source, target, tell=at(step, overtake)).run()
    assert_moved(source, target)


@pytest.mark.parametrize("new", BACKENDS)
def test_a_run_that_was_overtaken_changes_nothing_in_a_database_that_is_in_use(new_backend, source, new):
    """It still has differences to put right that are of an earlier time."""
    target = new_backend(new)
    url = min(row[0] for row in source.rows("issuer", "url"))

    def use_at(backend, at_):
        named = update(issuer).where(issuer.c.url == url)
        return lambda: backend.run(lambda connection: connection.execute(named.values(used_at=at_)))

    def overtake():
        run_of(source, target).run()
        use_at(target, AT + 2)()

    def tell(step):
        for act in acts:
            act(step)

    acts = [at("copied", use_at(source, AT + 1)), at("settling", overtake)]
    with pytest.raises(CopyRefused, match="taken over"):
        run_of(source, target, tell=tell).run()
    assert dict(target.rows("issuer", "url", "used_at"))[url] == AT + 2


@pytest.mark.parametrize("new", BACKENDS)
def test_a_run_that_was_overtaken_sets_no_counter_back(new_backend, source, new):
    target = new_backend(new)
    steps = []

    def overtake():
        run_of(source, target).run()
        steps.extend(target.run(lambda connection: [append_change(connection, "partner", "new", AT) for _ in range(3)]))

    with pytest.raises(CopyRefused, match="taken over"):
        run_of(source, target, tell=at("settling", overtake)).run()
    assert target.run(partial(append_change, kind="partner", subject="newer", now=AT)) == steps[-1] + 1


@pytest.fixture
def mortal():
    """A PostgreSQL of the test's own."""
    with PostgresServer(settings=FAST) as server:
        yield server


@pytest.mark.parametrize("step", ["copying", "settling"])
def test_a_target_that_dies_loses_nothing_and_the_copy_goes_on_when_it_is_back(source, mortal, step):
    target = PostgresBackend(mortal.create("elsewhere"))
    before = everything_in(source)
    with pytest.raises(DatabaseFault):
        run_of(source, target, tell=at(step, mortal.kill)).run()
    with pytest.raises(DatabaseFault):
        run_of(source, target).run()
    assert everything_in(source) == before
    assert (source.database.read(why_not_used) is None) == (step == "copying")
    mortal.start()
    run_of(source, target).run()
    assert_moved(source, target, before)


# --- what cannot be copied ------------------------------------------------------------------------------------------------


UNFIT = [
    ("partner", "name", "with a \0 in it", "has a NUL character"),
    ("partner", "organization_name", "x" * 201, "is longer than 200 characters"),
    ("tier", "requests_per_hour", 2**31, "is too large a number"),
    ("signing_key", "wrapped", "text", "is no bytes"),
    ("verification", "display_name", "with a \0 in it", "has a NUL character"),
    ("verification", "created_at", "dev@acme.example", "is no whole number"),
]


def spoil(backend, table, column, value):
    with closing(backend.engine().raw_connection()) as connection:
        connection.execute(f'UPDATE "{table}" SET {column} = ? WHERE rowid = (SELECT max(rowid) FROM "{table}")', (value,))
        connection.commit()


@pytest.mark.parametrize(("table", "column", "value", "complaint"), UNFIT)
def test_a_row_that_postgresql_cannot_hold_is_named_before_anything_is_closed(source, target, table, column, value, complaint):
    spoil(source, table, column, value)
    told = []
    with pytest.raises(CopyRefused, match=f"{table} .*: {column} {complaint}") as refused:
        run_of(source, target, tell=told.append).run()
    assert str(value) not in str(refused.value)
    assert "acme.example" not in str(refused.value)
    assert "closed" not in {step.name for step in told}
    assert source.database.read(why_not_used) is None


def test_one_that_comes_at_the_last_moment_opens_the_old_database_again(source, target):
    with pytest.raises(CopyRefused, match="NUL"):
        run_of(source, target, tell=at("copied", lambda: spoil(source, *UNFIT[0][:3]))).run()
    assert mark_of(source) == (Role.SOURCE, State.COPYING)
    spoil(source, "partner", "name", "without")  # which a closed database would refuse
    run_of(source, target).run()
    assert_moved(source, target)


def test_so_does_a_row_that_refers_to_nothing(source, target):
    with closing(source.engine().raw_connection()) as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute("UPDATE session SET credential_id = 'nobody' WHERE epoch = 0")
        connection.commit()
    with pytest.raises(CopyRefused, match="fk_session_credential_id"):
        run_of(source, target).run()
    assert source.database.read(why_not_used) is None


# --- wrong targets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_database_is_not_copied_onto_itself(new_backend, kind):
    backend = new_backend(kind)
    fill(backend)
    with pytest.raises(CopyRefused, match="is the database that is to be copied"):
        run_of(backend, backend).run()
    assert mark_of(backend) is None


def test_nor_by_another_name(source, new_backend, tmp_path):
    link = tmp_path / "link.db"
    link.symlink_to(source.path)
    with pytest.raises(CopyRefused, match="is the database that is to be copied"):
        run_of(source, SqliteBackend(link)).run()
    there = new_backend("postgresql")
    fill(there)
    with pytest.raises(CopyRefused, match="is the database that is to be copied"):
        run_of(there, PostgresBackend(f"{there.address}?application_name=other")).run()


@pytest.mark.parametrize("table", [table.name for table in COPIED if table is not tier])
def test_a_target_with_data_of_its_own_is_left_alone(source, target, table):
    def keep_only(connection):
        for other in reversed(COPIED):
            if other.name not in needed:
                connection.execute(delete(other))

    needed = {table}
    while more := {key.column.table.name for name in needed for key in metadata.tables[name].foreign_keys} - needed:
        needed |= more
    fill(target)
    target.run(keep_only)
    before = everything_in(target)
    with pytest.raises(CopyRefused, match="has data of its own"):
        run_of(source, target).run()
    assert everything_in(target) == before
    assert source.database.read(why_not_used) is None


def test_a_target_with_a_part_of_another_copy_is_refused(new_backend, source, target):
    other = new_backend("sqlite")
    fill(other)
    with pytest.raises(Stopped):
        run_of(other, target, tell=at("copied", stop)).run()
    for state in (State.COPYING, State.COMPLETE):
        with pytest.raises(CopyRefused, match="part of another copy"):
            run_of(source, target).run()
        if state is State.COPYING:
            run_of(other, target).run()
    assert_moved(other, target)


def test_another_target_may_be_named_until_the_old_database_is_closed(new_backend, source, target):
    second, third = new_backend("postgresql"), new_backend("postgresql")
    with pytest.raises(Stopped):
        run_of(source, target, tell=at("copied", stop)).run()
    with pytest.raises(Stopped):
        run_of(source, second, tell=at("closed", stop)).run()
    for wrong in (target, third):
        with pytest.raises(CopyRefused, match="is being moved to"):
            run_of(source, wrong).run()
    run_of(source, second).run()
    assert_moved(source, second)
    for wrong in (target, third):
        with pytest.raises(CopyRefused, match="is being moved to"):
            run_of(source, wrong).run()
    assert "incomplete copy" in target.database.read(why_not_used)


@pytest.mark.parametrize("which", ["source", "target"])
def test_databases_of_different_versions_are_refused(source, target, which):
    backend = {"source": source, "target": target}[which]
    backend.run(lambda connection: connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0004'"))
    with pytest.raises(CopyRefused, match=f"is at version 0004, this program has {HEAD}"):
        run_of(source, target).run()
    assert mark_of(source) is None


def test_what_is_no_deployment_is_not_copied(new_backend, target, tmp_path):
    missing = SqliteBackend(tmp_path / "missing.db")
    for nothing in (new_backend("sqlite"), missing):
        with pytest.raises(CopyRefused, match="there is no deployment in"):
            run_of(nothing, target).run()
    assert not missing.path.exists()


def test_an_incomplete_copy_is_not_copied_on(source, target, new_backend):
    with pytest.raises(Stopped):
        run_of(source, target, tell=at("copied", stop)).run()
    with pytest.raises(CopyRefused, match="is an incomplete copy itself"):
        run_of(target, new_backend("sqlite")).run()
    run_of(source, target).run()
    third = new_backend("sqlite")
    run_of(target, third).run()
    assert everything_in(third) == everything_in(source)


def test_a_target_that_cannot_be_reached_is_a_fault_and_nothing_has_begun(source):
    with pytest.raises(DatabaseFault):
        run_of(source, PostgresBackend(f"{postgres().url('not_there')}")).run()
    assert mark_of(source) is None


# --- taking it back -------------------------------------------------------------------------------------------------------


def take_back(source, target=None):
    abandon(parse_address(source.address), None if target is None else parse_address(target.address), clock=lambda: AT)


@pytest.mark.parametrize("old", BACKENDS)
@pytest.mark.parametrize("step", STEPS[:-1])
def test_a_move_can_be_taken_back_until_it_is_complete(new_backend, target, old, step):
    source = new_backend(old)
    fill(source)
    before = everything_in(source)
    with pytest.raises(Stopped):
        run_of(source, target, tell=at(step, stop)).run()
    take_back(source, target)
    assert source.database.read(why_not_used) is None
    assert everything_in(source) == before
    source.run(lambda connection: append_change(connection, "partner", "x", AT))
    assert target.database.read(why_not_used)
    with pytest.raises(CopyRefused, match="part of another copy"):
        run_of(source, target).run()
    second = new_backend("postgresql")
    run_of(source, second).run()
    assert_moved(source, second)


def test_a_move_that_is_complete_cannot_be_taken_back(source, target):
    run_of(source, target).run()
    with pytest.raises(CopyRefused, match="cannot be taken back any more"):
        take_back(source, target)
    assert_moved(source, target)


def test_a_run_that_is_still_going_on_finds_that_it_was_taken_back(source, target):
    for step in ("copying", "copied", "closed", "compared", "gone"):
        fresh = PostgresBackend.create(None)
        with pytest.raises(CopyRefused, match="given up meanwhile"):
            run_of(source, fresh, tell=at(step, lambda fresh=fresh: take_back(source, fresh))).run()
        assert source.database.read(why_not_used) is None, step
        assert fresh.database.read(why_not_used), step


def test_once_the_old_database_is_gone_the_new_one_is_needed_to_take_it_back(source, mortal):
    target = PostgresBackend(mortal.create("elsewhere"))
    with pytest.raises(Stopped):
        run_of(source, target, tell=at("gone", stop)).run()
    mortal.stop()
    with pytest.raises(DatabaseFault):
        take_back(source, target)
    assert mark_of(source) == (Role.SOURCE, State.GONE)
    mortal.start()
    take_back(source, target)
    assert mark_of(source) is None
    assert mark_of(target) == (Role.TARGET, State.ABANDONED)


def test_where_nothing_is_moved_there_is_nothing_to_take_back(source, target, tmp_path):
    for backend, reason in ((source, "is not being moved"), (SqliteBackend(tmp_path / "x.db"), "there is no deployment")):
        with pytest.raises(CopyRefused, match=reason):
            take_back(backend)


def test_no_password_is_written_down(source, target):
    run_of(source, target).run()
    for backend in (source, target):
        found = backend.database.read(find_relocation)
        assert isinstance(found, Relocation)
        assert "//gatelodge@" in found.other or found.other == source.address
        assert "%" not in found.other


def test_a_side_says_that_its_database_is_away(mortal):
    address = parse_address(mortal.create("elsewhere"))
    with closing(side_of(address)) as side:
        assert side.read(lambda connection: connection.exec_driver_sql("SELECT 1").scalar_one()) == 1
        mortal.stop()
        with pytest.raises(DatabaseFault):
            side.read(lambda connection: connection.exec_driver_sql("SELECT 1").scalar_one())
    with pytest.raises(DatabaseFault):
        database_at(address).read(find_relocation)
