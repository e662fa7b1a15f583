"""A row that two nodes make at once: the second waits for the first one's commit and leaves it as it is.

Which rule keeps a row out is in ``conformance/test_rules.py``.
"""

import asyncio
import threading

import pytest
from backends import BACKENDS, PostgresBackend, SqliteBackend
from given import START, a_company, a_confirmation, a_key, a_partner, a_registration
from moving import Stopped, at, run_of, stop
from outside import until
from postgres import postgres
from sqlalchemy import func, insert, select

from gatelodge_server.core.ports import Confirmed, Created, Done, MailLimits, Refused
from gatelodge_server.core.refusals import CompanyExists, InvalidVerificationCode, PartnerIdTaken
from gatelodge_server.store.companies import create_company
from gatelodge_server.store.deployment import Marking, settle_marking
from gatelodge_server.store.faults import DatabaseFault
from gatelodge_server.store.partners import add_partner
from gatelodge_server.store.races import insert_unless_there
from gatelodge_server.store.registration import begin_registration, claim_attempt
from gatelodge_server.store.tables import COMPANY_TAX_NUMBER, company, partner, quota, tier

LIMITS = {"requests_per_hour": 1, "requests_per_day": 1}
NAMED = (("gold", 1), ("gold", 2), ("silver", 3))
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
A_PARTNER = {
    "name": "Acme Motors",
    "contact_email": "dev@acme.example",
    "tier": "starter",
    "status": "active",
    "origin": "self-service",
    "created_at": START,
    "registered_address": "dev@acme.example",
}
A_COMPANY = {
    "partner_id": "acme-motors",
    "company_name": "Müller GmbH",
    "country": "DE",
    "tax_number": "1",
    "canonical_tax_number": "1",
    "created_at": START,
}


@pytest.fixture(params=BACKENDS)
def backend(request, tmp_path):
    return BACKENDS[request.param].create(tmp_path)


def limits_of(backend):
    return dict(backend.rows("tier", "name", "requests_per_hour"))


def test_the_second_of_two_leaves_the_first_ones_row_and_its_own_transaction_as_they_are(backend):
    def work(connection):
        rows = [{"name": name, "requests_per_hour": at, "requests_per_day": at} for name, at in NAMED]
        return [insert_unless_there(connection, tier, row) for row in rows]

    assert backend.run(work) == [True, False, True]
    assert (limits_of(backend)["gold"], limits_of(backend)["silver"]) == (1, 3)


@pytest.mark.parametrize(
    ("table", "row"),
    [
        (quota, {"partner_id": "nobody", "hour_starts_at": 0, "hour_taken": 0, "day_starts_at": 0, "day_taken": 0}),
        (tier, {"name": "gold", "requests_per_hour": 1}),
        (partner, {"id": "another", **A_PARTNER}),
    ],
    ids=["refers to nothing", "has nothing in a column", "has what must be unique of another row"],
)
def test_a_row_that_breaks_another_rule_is_a_fault(backend, table, row):
    backend.run(lambda connection: connection.execute(insert(partner), {"id": "acme-motors", **A_PARTNER}))
    before = backend.count(table.name)
    with pytest.raises(DatabaseFault, match=r"violates|constraint failed"):
        backend.run(lambda connection: insert_unless_there(connection, table, row))
    assert backend.count(table.name) == before


def a_company_of(number, **changes):
    return {"id": bytes([number]) * 16, **A_COMPANY, **changes}


def test_a_rule_for_some_rows_keeps_out_those_of_them_that_break_it_and_no_others(backend):
    rows = [
        a_company_of(1),
        a_company_of(2),
        a_company_of(3, deleted_at=START),
        a_company_of(4, country="AT"),
    ]
    backend.run(lambda connection: connection.execute(insert(partner), {"id": "acme-motors", **A_PARTNER}))

    def work(connection):
        return [insert_unless_there(connection, company, row, rule=COMPANY_TAX_NUMBER) for row in rows]

    assert backend.run(work) == [True, False, True, True]
    assert sorted(row[0][0] for row in backend.rows("company", "id")) == [1, 3, 4]


@pytest.mark.parametrize("changes", [{"tax_number": None}, {"partner_id": "nobody"}, {"canonical_tax_number": "2"}])
def test_beside_another_rule_than_the_key_the_key_is_one_that_must_be_kept(backend, changes):
    backend.run(lambda connection: connection.execute(insert(partner), {"id": "acme-motors", **A_PARTNER}))
    backend.run(lambda connection: connection.execute(insert(company), a_company_of(1)))
    row = a_company_of(1, **changes)
    with pytest.raises(DatabaseFault, match=r"violates|constraint failed"):
        backend.run(lambda connection: insert_unless_there(connection, company, row, rule=COMPANY_TAX_NUMBER))


@pytest.mark.parametrize("name", ["starter", "new"])
def test_a_database_that_is_closed_takes_no_such_row_either(backend, tmp_path, name):
    backend.run(lambda connection: settle_marking(connection, Marking("uat", "gatelodge", "partner-api-uat")))
    with pytest.raises(Stopped):
        run_of(backend, SqliteBackend(tmp_path / "target.db"), tell=at("closed", stop)).run()
    with pytest.raises(DatabaseFault, match="has moved to another database"):
        backend.run(lambda connection: insert_unless_there(connection, tier, {"name": name, **LIMITS}))


async def test_who_comes_second_waits_for_the_commit_and_reads_the_first_ones_row_and_the_log_says_nothing_of_it(tmp_path):
    """On PostgreSQL; SQLite has one writer, so there the second finds the row before it tries."""
    backend, before = PostgresBackend.create(tmp_path), postgres().log()
    driver, is_there = backend.driver(), threading.Event()

    def first(connection):
        connection.execute(insert(tier), {"name": "gold", **LIMITS})
        is_there.set()
        until(lambda: backend.database.read(lambda other: other.exec_driver_sql(WAITING).scalar_one()), "the second one waits")

    def second(connection):
        insert_unless_there(connection, tier, {"name": "gold", "requests_per_hour": 2, "requests_per_day": 2})
        return connection.execute(select(func.max(tier.c.requests_per_hour)).where(tier.c.name == "gold")).scalar_one()

    beginning = asyncio.create_task(asyncio.to_thread(backend.run, first))
    await asyncio.to_thread(is_there.wait, 10)
    assert await driver.write(second) == 1
    await beginning
    await driver.close()
    assert "gold" not in postgres().log().removeprefix(before)
    assert "duplicate key" not in postgres().log().removeprefix(before)


# --- verbs, on PostgreSQL -------------------------------------------------------------------------------------------------

ADDRESS = "dev@acme.example"
PLENTY = MailLimits(per_address=100, overall=100, per_address_daily=100)


class Undone(Exception):
    """The first one's transaction is not committed after all."""


@pytest.fixture
async def shared(tmp_path):
    """A database on PostgreSQL that has a partner."""
    backend = PostgresBackend.create(tmp_path)
    backend.run(lambda connection: add_partner(connection, a_partner("zeta"), a_key("zeta"), "test"))
    return backend


@pytest.fixture
async def node(shared):
    node = shared.open()
    yield node
    await node.close()


async def beside(shared, first, second, *, is_undone=False):
    """What ``second`` gives that begins when ``first`` has written, and waits until that is committed, or undone."""
    has_written = threading.Event()

    def write(connection):
        first(connection)
        has_written.set()
        until(lambda: shared.database.read(lambda other: other.exec_driver_sql(WAITING).scalar_one()), "the second one waits")
        if is_undone:
            raise Undone

    beginning = asyncio.create_task(asyncio.to_thread(shared.run, write))
    await asyncio.to_thread(has_written.wait, 10)
    outcome = await second()
    (fault,) = await asyncio.gather(beginning, return_exceptions=True)
    assert isinstance(fault, Undone) is is_undone
    return outcome


async def challenged(node):
    """The challenge of a code that was claimed."""
    await node.begin_registration(a_registration(ADDRESS), limits=PLENTY, recovery="on")
    return await node.claim_attempt(ADDRESS, now=START)


def log_since(before):
    return postgres().log().removeprefix(before)


@pytest.mark.parametrize("is_undone", [False, True])
async def test_of_two_partners_with_one_id_at_once_the_second_is_refused_unless_the_first_is_undone(shared, node, is_undone):
    before = postgres().log()
    outcome = await beside(
        shared,
        lambda connection: add_partner(connection, a_partner(name="First"), a_key(), "test"),
        lambda: node.add_partner(a_partner(name="Second"), a_key(), by="test"),
        is_undone=is_undone,
    )
    assert isinstance(outcome, Done) if is_undone else outcome == Refused(PartnerIdTaken)
    assert (await node.find_partner("acme-motors")).name == ("Second" if is_undone else "First")
    assert "duplicate key" not in log_since(before)


@pytest.mark.parametrize("is_undone", [False, True])
async def test_of_two_companies_with_one_tax_number_at_once_the_second_is_refused_unless_the_first_is_undone(
    shared, node, is_undone
):
    before = postgres().log()
    one, two = (a_company("zeta", tax_number="12/345/67890") for _ in range(2))
    outcome = await beside(
        shared,
        lambda connection: create_company(connection, one, a_key("zeta", one.id), None, "test"),
        lambda: node.create_company(two, a_key("zeta", two.id), replay=None, by="test"),
        is_undone=is_undone,
    )
    assert isinstance(outcome, Created) if is_undone else outcome == Refused(CompanyExists)
    assert await node.list_companies("zeta", before=None, limit=10) == [two if is_undone else one]
    assert "duplicate key" not in log_since(before)


@pytest.mark.parametrize("is_undone", [False, True])
async def test_whose_id_is_given_to_another_meanwhile_gets_the_next(shared, node, is_undone):
    right = a_confirmation(await challenged(node))
    outcome = await beside(
        shared,
        lambda connection: add_partner(connection, a_partner(), a_key(), "test"),
        lambda: node.confirm_registration(right),
        is_undone=is_undone,
    )
    assert isinstance(outcome, Confirmed)
    assert outcome.partner_id == ("acme-motors" if is_undone else "acme-motors-2")


async def test_whose_address_gets_a_partner_meanwhile_gets_none(shared, node):
    right = a_confirmation(await challenged(node))
    outcome = await beside(
        shared,
        lambda connection: connection.execute(insert(partner), {"id": "another", **A_PARTNER}),
        lambda: node.confirm_registration(right),
    )
    assert outcome == Refused(InvalidVerificationCode)
    assert sorted(shared.rows("partner", "id")) == [("another",), ("zeta",)]
    assert shared.faults == []


async def test_an_attempt_without_a_code_does_not_delete_the_one_that_is_made_meanwhile_and_is_written_all_the_same(
    shared, node
):
    driver = shared.driver()

    def attempt(connection):
        made = claim_attempt(connection, ADDRESS, START)
        return made, connection.exec_driver_sql("SELECT pg_current_xact_id_if_assigned() IS NOT NULL").scalar_one()

    asked = a_registration(ADDRESS)
    outcome = await beside(
        shared,
        lambda connection: begin_registration(connection, asked, PLENTY, "on"),
        lambda: driver.write(attempt),
    )
    await driver.close()
    assert outcome == (None, True)
    assert shared.rows("verification", "address", "digest", "attempts") == [(ADDRESS, asked.digest, 0)]
