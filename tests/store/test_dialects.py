"""What the verbs say must be SQL for every database that the store is to run on, not only for the one of the tests."""

import re
from collections import defaultdict

import pytest
from backends import SqliteBackend
from given import (
    START,
    a_company,
    a_confirmation,
    a_key,
    a_login,
    a_partner,
    a_refresh,
    a_registration,
    a_replay,
    a_signing_key,
    a_token,
    next_version,
)
from sqlalchemy import ClauseElement, Engine, event
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex, CreateTable

from gatelodge_server.core.model import DAY, KeyPurpose, PartnerStatus, SessionEnd, Tier
from gatelodge_server.core.ports import LastUse, MailLimits, QuotaAsk, Sent, UsageMark
from gatelodge_server.store.tables import metadata


async def everything_of_tokens(store):
    """The verbs of access tokens, and of the keys that sign them."""
    ring = [a_signing_key(kid, signs_from=START, purpose=KeyPurpose.ACCESS) for kid in ("4", "5")]
    await store.establish_signing_keys(ring, now=START)
    await store.add_partner(a_partner("zeta"), a_key("zeta"), by="test")
    token = a_token("4", "zeta")
    await store.issue_token(token, by="test")
    await store.roll_token(token.id, next_version(token), ends_at=START, now=START, by="test")
    await store.revoke_token(token.id, now=START, by="test")
    await store.find_token(token.id)
    await store.get_token(token.id)
    await store.list_tokens("zeta")
    await store.list_token_versions(token.lineage_id)
    await store.count_live_tokens(now=START)
    await store.retire_unneeded_keys(now=START)


async def everything(store):
    """Every verb once, with something to do."""
    key, replay = a_key(), a_replay()
    await store.ping()
    await store.add_partner(a_partner(), key, by="test")
    await store.list_partners()
    company = a_company()
    company_key = a_key(company_id=company.id)
    await store.create_company(company, company_key, replay=replay, by="test")
    await store.find_company("acme-motors", company.id)
    await store.list_companies("acme-motors", before=company.id, limit=1)
    await store.roll_company_key(
        company.id, a_key(company_id=company.id), ends_at=START + DAY, replay=a_replay(), now=START, by="test"
    )
    session = (await store.open_session(a_login(company_key))).session
    await store.advance_session(a_refresh(session))
    await store.advance_session(a_refresh(session))
    await store.find_session(session.id)
    await store.end_session((await store.open_session(a_login(key))).session.id, cause=SessionEnd.LOGOUT, now=START, by="test")
    await store.purge_sessions(after=bytes(16), limit=10, ended_before=START + DAY)
    await store.delete_company("acme-motors", company.id, now=START, by="test")
    await store.find_key(key.id)
    await store.get_key(key.id)
    await store.list_keys("acme-motors")
    await store.roll_key(key.id, a_key(), ends_at=START + DAY, now=START, by="test")
    await store.revoke_key(key.id, now=START, by="test")
    await store.set_partner_status("acme-motors", PartnerStatus.SUSPENDED, now=START, by="test")
    await store.find_partner("acme-motors")
    await store.establish_signing_keys([a_signing_key("1", signs_from=START), a_signing_key("2")], now=START)
    await store.rotate_signing_keys(a_signing_key("3"), lead=0, life=DAY, now=START, by="test")
    await store.retire_signing_key("1", now=START, by="test")
    await store.list_signing_keys()
    await everything_of_tokens(store)
    await everything_of_a_companys_key(store)
    await every_verb_of_registration(store)
    await every_verb_of_quotas(store, key)
    await store.list_audit(partner_id="acme-motors", since=START)
    await store.list_changes(after=0, limit=10)
    await store.forget_replays(now=START + 9 * DAY)
    for mail in await store.claim_mails(limit=10, now=START, until=START + DAY):
        await store.settle_mail(mail.id, Sent(), now=START)
    await store.purge_mails(ended_before=START + DAY, now=START + DAY)


async def everything_of_a_companys_key(store):
    """The verbs that lock a company's key, which is used for the first time at the gate."""
    company = a_company(partner_id="zeta")
    await store.create_company(company, a_key("zeta", company.id), replay=a_replay(), by="test")
    key = a_key("zeta", company.id)
    await store.roll_company_key(company.id, key, ends_at=START, replay=a_replay(), now=START, by="test")
    await store.note_usage([UsageMark("zeta", 0, 1, 1)], [LastUse("key", key.id, START, "")])
    await store.roll_key(key.id, a_key("zeta", company.id), ends_at=START, now=START, by="test")
    await store.delete_company("zeta", company.id, now=START, by="test")


async def every_verb_of_registration(store):
    limits = MailLimits(1, 10, per_address_daily=100_000)
    for now in (START, START + DAY):  # a new partner, then a recovery
        for _ in range(2):  # the second is past the limit
            await store.begin_registration(a_registration(now=now), limits=limits, recovery="on")
        challenge = await store.claim_attempt("dev@acme.example", now=now)
        right = a_confirmation(challenge, now=now)
        await store.confirm_registration(right)
        await store.repeat_confirmation("dev@acme.example", challenge, now=now)
    assert await store.claim_attempt("nobody@acme.example", now=START) is None
    partner_id = (await store.get_key(right.key.id)).partner_id
    await store.find_registrant(partner_id)
    await store.note_first_use(right.key.id, now=START)
    newer = a_key("")
    await store.roll_own_key(right.key.id, right.key.digest, newer, ends_at=START, replay=a_replay(), now=START)
    await store.deactivate_own(newer.id, newer.digest, now=START)


async def every_verb_of_quotas(store, key):
    await store.set_tier(Tier("gold", 1, 1), now=START, by="test")
    await store.list_tiers()
    await store.set_partner_tier("acme-motors", "gold", now=START, by="test")
    await store.lease_quota(QuotaAsk("acme-motors", 1, START))
    await store.note_usage([UsageMark("acme-motors", 0, 1, 1)], [LastUse(kind, key.id, START, "") for kind in ("key", "token")])
    await store.list_usage("acme-motors", since=0)
    await store.forget_usage(before=START)


@pytest.fixture
async def said(tmp_path):
    """What every verb has said to the database: the transaction, the statement, and its parameters if it has any."""
    heard = []

    def listen(connection, statement, several, one, _):
        if isinstance(statement, ClauseElement):
            heard.append((connection.get_transaction(), statement, {**one, **(several[0] if several else {})}))

    store = SqliteBackend.create(tmp_path).open()
    event.listen(Engine, "before_execute", listen)
    try:
        await everything(store)
    finally:
        await store.close()
        event.remove(Engine, "before_execute", listen)
    return heard


@pytest.fixture
def statements(said):
    return list({id(statement): statement for _, statement, _ in said}.values())


def on_postgresql(statement):
    return str(statement.compile(dialect=postgresql.dialect()))


async def test_every_statement_of_the_verbs_is_sql_for_postgresql_too(statements):
    assert statements
    for statement in statements:
        said = on_postgresql(statement)
        assert re.match(r"(SELECT|INSERT INTO|UPDATE|DELETE FROM|WITH)\s", said)
        assert not re.search(r"\b(sqlite|rowid|PRAGMA|OR REPLACE|OR IGNORE)\b", said)


async def test_every_statement_is_known_again_so_that_it_is_written_down_once(statements):
    """One part without a cache key makes the statement that it is in five times as slow."""
    assert [on_postgresql(statement) for statement in statements if statement._generate_cache_key() is None] == []


async def test_what_a_verb_reads_before_it_writes_is_locked_on_postgresql(statements):
    """SQLite has one writer at a time and leaves the clause out: there no race would show that it is missing."""
    locking = [said for said in map(on_postgresql, statements) if "FOR UPDATE" in said]
    locked = {(re.search(r"FOR UPDATE OF (\w+)", said) or re.search(r"\nFROM (\w+)", said))[1] for said in locking}
    assert locked == {
        "session",
        "partner",
        "company",
        "signing_key",
        "access_token",
        "outbox",
        "quota",
        "replay",
        "usage",
        "verification",
    }
    # What an access token is issued for must not go meanwhile; before there is a key, the tiers stand for the table of keys.
    # A key is locked against changes, not against sessions that refer to it. A company's partner is held as a new key holds it.
    held = {
        re.search(r"FROM (\w+)\b.*FOR (SHARE|NO KEY UPDATE|KEY SHARE)", said, re.DOTALL)
        for said in map(on_postgresql, statements)
    }
    assert {match.groups() for match in held if match} == {
        ("company", "KEY SHARE"),
        ("credential", "NO KEY UPDATE"),
        ("partner", "KEY SHARE"),
        ("partner", "SHARE"),
        ("signing_key", "SHARE"),
        ("tier", "NO KEY UPDATE"),
    }
    # Who refreshes many sessions, or claims many mails, waits for none of them; credentials and partners stay free for others.
    one = re.compile(r"WHERE session\.id = %\(\w+\)s\s+FOR UPDATE$")
    many = [said for said in locking if re.search(r"\nFROM (session|outbox)\b", said) and not one.search(said)]
    assert len(many) >= 4
    assert all(re.search(r"FOR UPDATE( OF session)? SKIP LOCKED\)?$", said) for said in many)


async def test_whoever_deletes_or_blanks_what_is_over_waits_for_no_row_on_postgresql(statements):
    """It would lock many, in whatever order it finds them, and two nodes would wait for each other in a circle."""
    deletes = {said for said in map(on_postgresql, statements) if said.startswith("DELETE")}
    by_key = "DELETE FROM verification WHERE verification.address = "  # what this very transaction has inserted
    assert len(deletes) >= 6
    assert [said for said in deletes if not said.endswith("FOR UPDATE SKIP LOCKED)") and not said.startswith(by_key)] == []


LOCK_ORDER = ("verification", "replay", "partner", "company", "credential")


def locked_by(said, given):
    """The tables of which a statement locks rows on PostgreSQL: of a new row, those that it refers to.

    ``given`` are the parameters of a new row. Not a key that is referred to: nothing locks keys so that a reference to them would have to wait.
    """
    verb, table = re.match(r"(?:(UPDATE|DELETE FROM|INSERT INTO) (\w+))?", said).groups()
    if verb is None:
        return {re.search(r"FROM (\w+)", said)[1]} if re.search(r"FOR (NO KEY )?(UPDATE|SHARE|KEY SHARE)", said) else set()
    if verb != "INSERT INTO":
        return {table}
    keys = metadata.tables[table].foreign_keys
    return {key.column.table.name for key in keys if given.get(key.parent.name) is not None} - {"credential"}


@pytest.fixture
def transactions(said):
    """The statements of each transaction, with their parameters."""
    found = defaultdict(list)
    for transaction, statement, given in said:
        found[transaction].append((on_postgresql(statement), given))
    return list(found.values())


async def test_every_verb_locks_in_the_same_order_so_that_no_two_wait_for_each_other_on_postgresql(transactions):
    assert len(transactions) > 50
    for statements in transactions:
        held = []
        for said, given in statements:
            locked = locked_by(said, given) & set(LOCK_ORDER)
            new = sorted(LOCK_ORDER.index(table) for table in locked if table not in held)
            for at in new:
                assert not held or at > LOCK_ORDER.index(held[-1]), f"{LOCK_ORDER[at]} after {held}: {statements}"
                held.append(LOCK_ORDER[at])


def test_every_table_and_index_can_be_made_on_postgresql():
    for table in metadata.sorted_tables:
        assert "WITHOUT ROWID" not in str(CreateTable(table).compile(dialect=postgresql.dialect()))
        for index in table.indexes:
            CreateIndex(index).compile(dialect=postgresql.dialect())
    unique = next(index for index in metadata.tables["company"].indexes if index.unique)
    assert "WHERE deleted_at IS NULL" in str(CreateIndex(unique).compile(dialect=postgresql.dialect()))


def test_no_name_is_too_long_for_postgresql():
    for table in metadata.sorted_tables:
        names = [table.name, *table.columns.keys()]
        names += [str(thing.name) for thing in (*table.indexes, *table.constraints)]
        assert max(map(len, names)) <= 63
