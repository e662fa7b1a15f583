"""When a process takes traffic: not while it is about to stop, and not when it cannot hear of changes."""

import time

import pytest
from backends import SqliteBackend
from given import AROUND, Clock

from gatelodge.errors import Unavailable
from gatelodge_server.core.following import MAX_STALENESS, ChangeFollower
from gatelodge_server.http.draining import Draining
from gatelodge_server.http.metadata import MetadataRoutes
from gatelodge_server.http.problems import AboutToStop


class Line:
    """The line of a follower to its store, which can be cut. Nothing else goes over it."""

    def __init__(self, store):
        self._store = store
        self.is_cut = False

    def bell(self):
        return self._store.bell()

    async def last_change(self):
        return await self._over("last_change")

    async def list_changes(self, **asked):
        return await self._over("list_changes", **asked)

    async def _over(self, verb, **asked):
        if self.is_cut:
            raise Unavailable
        return await getattr(self._store, verb)(**asked)


class NoKeys:
    """A ring whose keys are not what is asked about here."""

    async def key_set(self):
        return []


@pytest.fixture
async def store(tmp_path):
    store = SqliteBackend.create(tmp_path).open()
    yield store
    await store.close()


@pytest.fixture
def line(store):
    return Line(store)


@pytest.fixture
def monotonic():
    return Clock(time.monotonic())


@pytest.fixture
def draining():
    return Draining()


@pytest.fixture
def routes(store, line, monotonic, draining):
    follower = ChangeFollower(store=line, monotonic=monotonic, on_mistake=pytest.fail)
    return MetadataRoutes(store=store, signing_keys=NoKeys(), access_keys=NoKeys(), follower=follower, draining=draining)


async def is_ready(routes):
    try:
        return (await routes.readiness(None, None)).status == 200
    except Unavailable:
        return False


async def test_a_process_is_ready_once_it_has_read_the_changes(routes, line):
    line.is_cut = True
    assert not await is_ready(routes)
    line.is_cut = False
    assert await is_ready(routes)


@pytest.mark.parametrize("off", AROUND)
async def test_it_is_not_when_it_could_not_hear_of_changes_for_too_long(routes, line, monotonic, off):
    assert await is_ready(routes)
    line.is_cut = True
    monotonic.now += MAX_STALENESS + off * 0.001
    assert await is_ready(routes) == (off < 0)
    assert (await routes.health(None, None)).status == 200
    line.is_cut = False
    assert await is_ready(routes)


async def test_it_is_not_when_it_is_about_to_stop_and_lives_all_the_same(routes, draining):
    assert await is_ready(routes)
    draining.begin()
    with pytest.raises(AboutToStop):
        await routes.readiness(None, None)
    assert (await routes.health(None, None)).status == 200
