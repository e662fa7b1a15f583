"""The store's clock: the database's. All nodes go by it where they must agree on the time.

A verb that decides by the time asks for it when what it decides about is locked, for the wait may have been long. One that
reads something then anyway reads ``STORE_TIME`` along with it, which costs no round trip. What a caller says in instants of its
own clock (``now`` and what is reckoned from it) is taken for durations: moved by what that clock is wrong by.
"""

from collections.abc import Callable
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from sqlalchemy import BigInteger, Connection, String, cast, func, select
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from gatelodge_server.core.model import Instant

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

StoreClock = Callable[[Connection], Instant | None]

_CLOCK: Final = "gatelodge.clock"
"""Under this name a connection knows a clock that takes the place of the database's."""


class _StoreTime(FunctionElement[int]):
    inherit_cache = True  # or every statement with it would be written anew each time
    name = "store_time"
    type = BigInteger()


@compiles(_StoreTime)
def _say_nothing(*_: Any, **__: Any) -> str:  # noqa: ANN401 - SQLAlchemy's signature
    return "NULL"


@compiles(_StoreTime, "postgresql")
def _say_time(*_: Any, **__: Any) -> str:  # noqa: ANN401 - SQLAlchemy's signature
    # `now()` is when the transaction began, before it waited for locks. Rounded down, as clocks are read.
    return "CAST(floor(extract(epoch FROM clock_timestamp()) * 1000) AS BIGINT)"


STORE_TIME: Final = _StoreTime().label("store_time")
"""The time, as a column of whatever is read. ``NULL`` from SQLite."""


def store_now(connection: Connection) -> Instant | None:
    """The time by the database's clock at this moment.

    ``None`` from SQLite, which has no clock that is not the caller's as well: all its processes run on one machine.
    """
    if connection.dialect.name == "sqlite":
        return None
    return int(connection.execute(select(STORE_TIME)).scalar_one())


def clock_name(connection: Connection) -> str:
    """What tells the store's clock from others, which databases had that this one has taken the place of. Empty: it has none.

    It is another also when the same server is started anew. What was written by another clock says when only among its like.
    """
    if connection.dialect.name == "sqlite":
        return ""
    return str(connection.execute(select(cast(func.pg_postmaster_start_time(), String))).scalar_one())


def shared_now(connection: Connection, *, read: Instant | None = None) -> Instant | None:
    """The time by the clock that all nodes share; ``None``: they have none. ``read``: what ``STORE_TIME`` has just given."""
    clock: StoreClock | None = connection.info.get(_CLOCK)
    if clock is not None:
        return clock(connection)
    return store_now(connection) if read is None else read


def time_of(connection: Connection, now: Instant, *, read: Instant | None = None) -> Instant:
    """The time by the clock that all nodes share; the caller's, ``now``, where they have none. ``read`` as above."""
    there = shared_now(connection, read=read)
    return now if there is None else there


def going_by(
    clock: StoreClock, verb: Callable[Concatenate[Connection, Arguments], Result]
) -> Callable[Concatenate[Connection, Arguments], Result]:
    """The verb, with another clock than the database's: for tests and experiments."""

    def run(connection: Connection, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        connection.info[_CLOCK] = clock
        try:
            return verb(connection, *args, **kwargs)
        finally:
            connection.info.pop(_CLOCK, None)

    return run
