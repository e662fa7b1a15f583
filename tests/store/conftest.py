"""What the tests of the store look at a ``backend`` by; each says itself which backend that is."""

import pytest


@pytest.fixture
async def driver(backend):
    driver = backend.driver()
    yield driver
    await driver.close()


@pytest.fixture
async def store(backend):
    """A node's store."""
    node = backend.open()
    yield node
    await node.close()
