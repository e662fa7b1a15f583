"""A database that is closed for a move takes no writes from anybody; one that is gone is not relied on any more."""

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

import pytest
from backends import BACKENDS, until
from given import START, a_company, a_key, a_login, a_partner, a_refresh, a_registration
from moving import fill
from sqlalchemy import delete, insert, update

from gatelodge.errors import Unavailable
from gatelodge_server.core.following import ChangeFollower
from gatelodge_server.core.model import SessionEnd
from gatelodge_server.core.ports import Advanced, Done, MailLimits, Opened
from gatelodge_server.store import relocation
from gatelodge_server.store.address import parse_address
from gatelodge_server.store.faults import DatabaseFault
from gatelodge_server.store.relocation import COPIED, Overtaken
from gatelodge_server.store.sides import side_of
from gatelodge_server.store.trail import LAST_CHANGE, append_audit

MOVE = b"m" * 16


@pytest.fixture(params=BACKENDS)
def backend(request, tmp_path):
    return BACKENDS[request.param].create(tmp_path)


def begin(backend):
    backend.run(partial(relocation.begin_move, move=MOVE, other="postgresql://there/it", now=START))


def close(backend):
    """Close it as the command does."""

    def write():
        with closing(side_of(parse_address(backend.address))) as side:
            side.write(partial(relocation.close, move=MOVE, now=START))

    with ThreadPoolExecutor(1) as pool:  # a side has a loop of its own
        pool.submit(write).result()


def leave(backend):
    def verb(connection):
        relocation.leave(connection, MOVE, now=START)
        connection.info[LAST_CHANGE] = 0

    async def write():
        driver = backend.driver()
        await driver.write(verb)
        await driver.close()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, write()).result()


async def test_every_verb_that_writes_is_refused_and_those_that_read_go_on(backend, store):
    """Those too that meet what they take for a row of somebody else's: a savepoint and a unique index."""
    key, company = a_key(), a_company()
    assert isinstance(await store.add_partner(a_partner(), key, by="test"), Done)
    opened = (await store.open_session(a_login(key))).session
    begin(backend)
    assert isinstance(await store.advance_session(a_refresh(opened)), Advanced)
    close(backend)
    writes = [
        lambda: store.open_session(a_login(key)),
        lambda: store.advance_session(a_refresh(opened, generation=1)),
        lambda: store.advance_session(a_refresh(opened)),
        lambda: store.end_session(opened.id, cause=SessionEnd.LOGOUT, now=START, by="test"),
        lambda: store.add_partner(a_partner("zeta"), a_key("zeta"), by="test"),
        lambda: store.create_company(company, a_key(company_id=company.id), replay=None, by="test"),
        lambda: store.note_issuer("https://x.example", now=START),
        lambda: store.begin_registration(a_registration(), limits=MailLimits(5, 5, per_address_daily=5), recovery="on"),
        lambda: store.revoke_key(key.id, now=START, by="test"),
    ]
    for number, write in enumerate(writes):
        with pytest.raises(Unavailable):
            await write()
        assert "moved to another database" in backend.faults[-1], number
        assert len(backend.faults) == number + 1
    assert (await store.find_session(opened.id)).session.generation == 1
    assert len(await store.list_partners()) == 1
    assert await store.list_changes(after=0, limit=10)
    backend.run(partial(relocation.reopen, move=MOVE, now=START))
    assert isinstance(await store.open_session(a_login(key)), Opened)


@pytest.mark.parametrize("table", COPIED, ids=lambda table: table.name)
def test_no_table_is_forgotten(backend, table):
    fill(backend)
    begin(backend)
    same = {column.name: column for column in table.columns if not column.primary_key}
    statements = [delete(table), update(table).values(same), insert(table).from_select([*table.columns.keys()], table.select())]
    close(backend)
    for statement in statements:
        with pytest.raises(DatabaseFault, match="moved to another database"):
            backend.run(lambda connection, statement=statement: connection.execute(statement))


def test_whoever_is_writing_is_waited_for_and_whoever_comes_later_is_refused(backend):
    begin(backend)
    writing, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    def write(connection):
        append_audit(connection, "first", now=START, by="x", subject="x")
        writing.set()
        assert go_on.wait(20)
        append_audit(connection, "second", now=START, by="x", subject="x")

    def shut():
        close(backend)
        closed.set()

    with ThreadPoolExecutor(2) as pool:
        early = pool.submit(backend.run, write)
        assert writing.wait(20)
        shutting = pool.submit(shut)
        assert not closed.wait(0.5)
        go_on.set()
        early.result()
        shutting.result()
    assert [row[0] for row in backend.rows("audit", "action")] == ["first", "second"]
    with pytest.raises(DatabaseFault, match="moved"):
        backend.run(partial(append_audit, action="third", now=START, by="x", subject="x"))


async def test_who_follows_the_changes_of_a_database_that_is_gone_hears_of_it_at_once_and_believes_nothing(backend, store):
    key = a_key()
    await store.add_partner(a_partner(), key, by="test")
    follower = ChangeFollower(store=store, monotonic=asyncio.get_running_loop().time, on_mistake=lambda _: None)
    tasks = await backend.start_listening(store)
    begin(backend)
    await follower.catch_up()
    close(backend)
    await follower.catch_up()
    assert follower.is_current()
    leave(backend)
    await until(lambda: not follower.is_current())
    for read in (follower.catch_up, store.last_change, lambda: store.list_changes(after=0, limit=1)):
        with pytest.raises(Unavailable):
            await read()
    backend.run(partial(relocation.stay, move=MOVE, states=(relocation.State.GONE,)))
    await follower.catch_up()
    assert follower.is_current()
    for task in tasks:
        task.cancel()


@pytest.mark.parametrize("kind", BACKENDS)
def test_each_step_is_made_from_the_one_before_it_only(kind, tmp_path):
    backend = BACKENDS[kind].create(tmp_path)
    begin(backend)
    run = backend.run
    other = os.urandom(16)
    for verb in (partial(relocation.close, move=other, now=START), partial(relocation.leave, move=MOVE, now=START)):
        with pytest.raises(Overtaken):
            run(verb)
    close(backend)
    close(backend)
    for verb in (
        partial(relocation.begin_move, move=other, other="x", now=START),
        partial(relocation.leave, move=other, now=START),
        partial(relocation.stay, move=other, states=(relocation.State.CLOSED,)),
        partial(relocation.stay, move=MOVE, states=(relocation.State.GONE,)),
        partial(relocation.take_over, move=MOVE, copier=other),
    ):
        with pytest.raises(Overtaken):
            run(verb)
    run(partial(relocation.leave, move=MOVE, now=START))
    assert not run(partial(relocation.reopen, move=MOVE, now=START))
    with pytest.raises(Overtaken):
        run(partial(relocation.close, move=MOVE, now=START))


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_copy_is_complete_or_abandoned_and_never_both(kind, tmp_path):
    for first in ("complete", "abandoned"):
        directory = tmp_path / first
        directory.mkdir()
        run = BACKENDS[kind].create(directory).run
        run(partial(relocation.begin_copy, move=MOVE, other="x", now=START))
        run(partial(relocation.take_over, move=MOVE, copier=b"1" * 16))
        run(partial(relocation.take_over, move=MOVE, copier=b"2" * 16))
        with pytest.raises(Overtaken):
            run(partial(relocation.note_progress, copier=b"1" * 16, progress="x"))
        with pytest.raises(Overtaken):
            run(partial(relocation.complete, move=MOVE, copier=b"1" * 16, now=START))
        if first == "complete":
            run(partial(relocation.complete, move=MOVE, copier=b"2" * 16, now=START))
            assert run(partial(relocation.abandon_copy, move=MOVE, now=START)) is False
        else:
            assert run(partial(relocation.abandon_copy, move=b"x" * 16, now=START)) is False
            assert run(partial(relocation.abandon_copy, move=MOVE, now=START)) is True
            assert run(partial(relocation.abandon_copy, move=MOVE, now=START)) is True
            with pytest.raises(Overtaken):
                run(partial(relocation.complete, move=MOVE, copier=b"2" * 16, now=START))
