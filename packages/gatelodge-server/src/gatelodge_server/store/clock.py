"""The store's clock. All nodes go by it where they must agree on the time: in which hour a request counts (``quotas.py``)."""

from collections.abc import Callable
from typing import Final

from sqlalchemy import BigInteger, Connection, cast, extract, func, select

from gatelodge_server.core.model import SECOND, Instant

StoreClock = Callable[[Connection], Instant | None]

# `now()` is when the transaction began, and a wait for a lock may cross the end of an hour. Rounded down, as clocks are read.
_CLOCK: Final = select(cast(func.floor(extract("epoch", func.clock_timestamp()) * SECOND), BigInteger))


def store_now(connection: Connection) -> Instant | None:
    """The time by the database's clock at this moment; ask when what is to be decided by it is locked.

    ``None`` from SQLite, which has no clock that is not the caller's as well: all its processes run on one machine.
    """
    if connection.dialect.name != "postgresql":
        return None
    return int(connection.execute(_CLOCK).scalar_one())
