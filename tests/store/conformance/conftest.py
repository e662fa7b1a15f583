"""Every case of this directory runs on every backend. There is no way to opt out: a backend is a line in ``BACKENDS``.

Its stores go by the clock of whoever asks, so that a case may say what time it is. What they do by the database's clock is in
``test_clock.py``, one directory up.
"""

import pytest
from backends import BACKENDS, by_the_asker
from given import a_company, a_key, a_partner

from gatelodge_server.core.ports import Created, Done


@pytest.fixture(params=BACKENDS)
def backend(request, tmp_path):
    return BACKENDS[request.param].create(tmp_path)


@pytest.fixture
async def store(backend):
    """A node's store."""
    node = backend.open(store_now=by_the_asker)
    yield node
    await node.close()


@pytest.fixture
async def other_node(backend):
    """A second store on the same database, as another node has it."""
    node = backend.open(store_now=by_the_asker)
    yield node
    await node.close()


@pytest.fixture
async def key(store):
    """The first key of the partner ``acme-motors``."""
    key = a_key()
    assert isinstance(await store.add_partner(a_partner(), key, by="test"), Done)
    return key


@pytest.fixture
async def company_key(store, key):
    """The first key of a company of ``acme-motors``."""
    company = a_company()
    company_key = a_key(company_id=company.id)
    assert isinstance(await store.create_company(company, company_key, replay=None, by="test"), Created)
    return company_key


@pytest.fixture
def trail(store):
    """What the change sequence and the audit trail say of a subject."""

    async def of(subject):
        changes = [change.kind for change in await store.list_changes(after=0, limit=10_000) if change.subject == subject]
        events = [event.action for event in await store.list_audit(partner_id=None, since=None) if event.subject == subject]
        return changes, events

    return of
