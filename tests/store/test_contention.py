"""What one transaction holds on PostgreSQL keeps nobody waiting who does not need it."""

import asyncio
import contextlib
import time

import asyncpg
import pytest
from backends import PostgresBackend
from given import a_company, a_key, a_login, a_partner, a_refresh, a_registration, a_replay, changed

from gatelodge.errors import CredentialRevoked, Unavailable
from gatelodge_server.core.model import DAY, HOUR, SessionEnd
from gatelodge_server.core.ports import Advanced, Condemned, Created, MailLimits, Opened, Purged, Refused, UsageMark
from gatelodge_server.deployment import system_clock
from gatelodge_server.store.postgres import LOCK_PATIENCE, PATIENCE
from gatelodge_server.store.races import Turn

FIFTY = 50
AT_ONCE = LOCK_PATIENCE / 2
"""Seconds within which everybody is answered who does not wait."""


@pytest.fixture
def backend(tmp_path):
    return PostgresBackend.create(tmp_path)


@pytest.fixture
async def key(store):
    key = a_key()
    await store.add_partner(a_partner(), key, by="test")
    return key


@pytest.fixture
async def sessions(store, key):
    """One more than fifty."""
    attempts = [a_login(key, now=system_clock()) for _ in range(FIFTY + 1)]
    outcomes = await asyncio.gather(*(store.open_session(attempt) for attempt in attempts))
    return [outcome.session for outcome in outcomes]


@pytest.fixture
async def held(backend):
    """``held(statement, …)`` is a transaction of somebody else's, which does not go on before it is told to."""
    async with contextlib.AsyncExitStack() as stack:

        async def hold(statement, *values):
            connection = await asyncpg.connect(backend.address)
            stack.push_async_callback(connection.close)
            transaction = connection.transaction()
            await transaction.start()
            assert await connection.fetch(statement, *values)
            return transaction

        yield hold


async def refreshed(store, sessions):
    async with asyncio.timeout(AT_ONCE):
        return await asyncio.gather(*(store.advance_session(a_refresh(session)) for session in sessions))


async def test_a_session_that_is_held_keeps_no_other_refresh_waiting_and_goes_on_when_it_is_let_go(store, sessions, held):
    holder = await held("SELECT id FROM session WHERE id = $1 FOR UPDATE", sessions[0].id)
    waiting = asyncio.create_task(store.advance_session(a_refresh(sessions[0])))
    assert {type(outcome) for outcome in await refreshed(store, sessions[1:])} == {Advanced}
    assert not waiting.done()
    await holder.rollback()
    assert isinstance(await waiting, Advanced)


async def test_a_session_that_is_held_for_too_long_is_unavailable_and_the_others_are_not(store, sessions, held):
    await held("SELECT id FROM session WHERE id = $1 FOR UPDATE", sessions[0].id)
    begun = time.monotonic()
    waiting = asyncio.create_task(store.advance_session(a_refresh(sessions[0])))
    outcomes = await refreshed(store, sessions[1:])
    while not waiting.done():
        outcomes = await refreshed(store, [outcome.session for outcome in outcomes])
    with pytest.raises(Unavailable):
        await waiting
    assert time.monotonic() - begun < PATIENCE


async def test_a_session_that_somebody_ends_meanwhile_is_judged_as_it_is_then(store, sessions, held):
    ending = "UPDATE session SET ended_at = 1, end_cause = $2 WHERE id = $1 RETURNING id"
    holder = await held(ending, sessions[0].id, SessionEnd.LOGOUT.value)
    waiting = asyncio.create_task(store.advance_session(a_refresh(sessions[0])))
    await refreshed(store, sessions[1:])
    await holder.commit()
    assert await waiting == Refused(CredentialRevoked)


async def test_a_reuse_that_waits_for_the_change_sequence_keeps_no_other_refresh_waiting(store, sessions, held):
    first = sessions[0]
    assert isinstance(await store.advance_session(a_refresh(first)), Advanced)
    holder = await held("SELECT pg_advisory_xact_lock($1)", Turn.APPENDING.value)
    waiting = asyncio.create_task(store.advance_session(a_refresh(first)))
    assert {type(outcome) for outcome in await refreshed(store, sessions[1:])} == {Advanced}
    assert not waiting.done()
    await holder.rollback()
    assert isinstance(await waiting, Condemned)


async def test_what_is_over_and_held_is_left_to_a_later_round_which_waits_for_nobody(store, key, held, backend):
    then = system_clock()
    for number in range(3):
        company = a_company(created_at=then)
        made = await store.create_company(
            company, a_key(company_id=company.id), replay=a_replay(readable_until=then), by="test"
        )
        assert isinstance(made, Created)
        assert isinstance(await store.open_session(a_login(key, now=then)), Opened)
        asked = a_registration(f"dev{number}@acme.example", now=then)
        await store.begin_registration(asked, limits=MailLimits(9, 9, per_address_daily=9), recovery="on")
    await store.note_usage([UsageMark("acme-motors", hour * HOUR, 1, 0) for hour in range(3)], [])
    tables = {"session": "id", "replay": "id", "outbox": "id", "verification": "address", "usage": "hour_starts_at"}
    holders = [await held(f"SELECT 1 FROM {table} ORDER BY {column} LIMIT 1 FOR UPDATE") for table, column in tables.items()]
    late = then + 400 * DAY

    async def go_round():
        async with asyncio.timeout(AT_ONCE):
            await store.forget_replays(now=late)
            await store.purge_mails(ended_before=late, now=late)
            await store.forget_usage(before=late)
            return await store.purge_sessions(after=None, limit=100, ended_before=late)

    assert await go_round() == Purged(None, 2)
    assert [backend.count(table) for table in tables] == [1] * 5
    for holder in holders:
        await holder.rollback()
    assert await go_round() == Purged(None, 1)
    assert [backend.count(table) for table in tables] == [0] * 5


async def test_companies_that_are_deleted_beside_housekeeping_never_wait_for_each_other_in_a_circle(store, key, backend):
    now, other = system_clock(), backend.open()
    companies = [changed(a_company(), created_at=now) for _ in range(20)]
    for company in companies:
        replay = a_replay(readable_until=now)
        await store.create_company(company, a_key(company_id=company.id), replay=replay, by="test")
    await asyncio.gather(
        *(store.delete_company("acme-motors", company.id, now=now, by="test") for company in companies),
        *(other.forget_replays(now=now + at) for at in range(20)),
    )
    await other.close()
    assert backend.faults == []
