"""PostgreSQL: any number of nodes on one database.

Everything that is particular to PostgreSQL stands here, so that the verbs need not know it:

- a transaction that writes is READ COMMITTED. What a verb decides by, it locks first (``FOR UPDATE``), or takes from rows that
  are never changed; what it reads after a lock is what the others have committed. One that only reads sees one snapshot;
- ``synchronous_commit`` is on: a commit returns when it is on the disk, and on the standby where the server waits for one;
- what is known not to have been committed (a deadlock, a serialization failure, a connection that was lost before the commit)
  is done again while there is time. After a commit without an answer nobody knows, and the caller hears ``Unavailable``;
- whoever appends to the change sequence says so (``NOTIFY``) as it commits. Every node listens. What is not heard is read all
  the same: ``core/following.py`` does not rely on it;
- what a server says is believed while it proves by commits that it leads (``store/leading.py``).
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Concatenate, Final, ParamSpec, TypeVar
from urllib.parse import parse_qs, urlsplit

import asyncpg
from sqlalchemy import Connection, ExceptionContext, event, func, inspect, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool

from gatelodge.errors import Unavailable
from gatelodge_server.store.address import PostgresAddress
from gatelodge_server.store.faults import DatabaseFault
from gatelodge_server.store.leading import NAME, PROOF, PROOF_PATIENCE, TRUST, UNPROVEN, Leader, NotLeadingError
from gatelodge_server.store.trail import LAST_CHANGE

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

OLDEST: Final = 150_000
"""The first version that is served, as ``server_version_num`` has it."""
PATIENCE: Final = 5.0
"""Seconds within which a transaction reaches its commit, from when it is asked for; and within which that is answered."""
_MARGIN: Final = 0.05
"""Seconds after which what has to end by then has been told to."""
LOCK_PATIENCE: Final = 4.0
"""Seconds for which a statement waits for a lock."""
UPGRADE_PATIENCE: Final = 60.0
_CONNECT_TIMEOUT: Final = 3.0
_HEAD_START: Final = 0.3
"""Seconds that one of several hosts has before the next is tried too."""
_LONGEST: Final = 1024
"""How many transactions wait for a connection at most."""
_TRIES: Final = 8
_PAUSE: Final = 0.02
_CHANNEL: Final = "gatelodge_change"
_RELISTEN: Final = 1.0
_PROOF_OF_LIFE: Final = 5.0
_UPGRADE_LOCK: Final = 0x6761_7465_0001
_TAKEN: Final = "23505"
"""SQLSTATE: a row is there that was not when the verb looked. Looked at again, it is judged as any other."""
_CONTENTION: Final = frozenset({"40001", "40P01", _TAKEN})
"""SQLSTATE: also a serialization failure, a deadlock. Somebody else went first."""
_MISTAKEN: Final = ("22", "23", "42", "0A")
"""SQLSTATE classes: data, integrity, syntax, what is not supported."""
_READ_ONLY: Final = "25006"
"""SQLSTATE: the server takes no writes any more, since another one does. Its connections are of no use."""
_CONNECTION_LOST: Final = ("08", "57P", _READ_ONLY)
"""SQLSTATE classes: connection exceptions, shutdown."""
_PREPARED_BEFORE: Final = "0A000"
"""SQLSTATE: a statement was prepared before somebody upgraded the schema. SQLAlchemy has forgotten it by now."""
_SERVER_SETTINGS: Final = {
    "application_name": "gatelodge",
    "synchronous_commit": "on",
    "default_transaction_isolation": "read committed",
    "timezone": "UTC",
    # A time limit that strikes while a commit waits for its standby would make it a commit without one. Ours are our own.
    "statement_timeout": "0",
    "lock_timeout": str(int(LOCK_PATIENCE * 1000)),
    # A node that is frozen, or gone without a word, must not hold its locks for longer than others wait for them.
    "idle_in_transaction_session_timeout": "3000",
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "3",
    "tcp_keepalives_count": "3",
    "jit": "off",
}


class ServerConnection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types
    """A connection that knows its server (``leading.NAME``), and how often that had been doubted when it was made."""

    __slots__ = ("doubts", "server")
    doubts: int
    server: str

    def is_usable(self, leader: Leader) -> bool:
        """Whether its server has not been doubted since."""
        return self.doubts == leader.doubts(self.server)


async def connect(
    address: PostgresAddress, *, application: str = "gatelodge", leader: Leader | None = None
) -> ServerConnection:
    """Connect to the server of an address that takes writes. Raises ``OSError``, ``TimeoutError`` or ``asyncpg``'s errors.

    Of several hosts the first that can be used is taken. None is waited for alone: a leader that is frozen, or that nothing
    reaches, refuses nobody, and would take the time of all that stand behind it. One that ``leader`` doubts is taken if there
    is no other.
    """
    leader = leader or Leader(monotonic=time.monotonic)
    left, trying, faults = _each_host(address.url), set[asyncio.Task[ServerConnection]](), list[BaseException]()
    spare: list[ServerConnection] = []
    try:
        while left or trying:
            if left:
                trying.add(asyncio.create_task(_connect_to(left.pop(0), address, application, leader)))
            done, trying = await asyncio.wait(
                trying, timeout=_HEAD_START if left else None, return_when=asyncio.FIRST_COMPLETED
            )
            found = [task.result() for task in done if task.exception() is None]
            spare += [one for one in found if leader.is_doubted(one.server)]
            good = [one for one in found if one not in spare]
            spare += good[1:]
            if good:
                return good[0]
            faults += [fault for task in done if (fault := task.exception()) is not None]
        if spare:
            return spare.pop()
    finally:
        for another in spare:
            another.terminate()
        for task in trying:
            task.cancel()
            task.add_done_callback(_let_go)
    # What a server has said tells more than that another could not be reached.
    raise min(faults, key=lambda fault: (not isinstance(fault, asyncpg.PostgresError), isinstance(fault, OSError)))


async def _connect_to(url: str, address: PostgresAddress, application: str, leader: Leader) -> ServerConnection:
    states_target = "target_session_attrs" in parse_qs(urlsplit(url).query)
    connection: ServerConnection = await asyncpg.connect(
        url,
        password=None if address.password is None else address.password.reveal(),
        timeout=_CONNECT_TIMEOUT,
        server_settings={**_SERVER_SETTINGS, "application_name": application},
        connection_class=ServerConnection,
        **({} if states_target else {"target_session_attrs": "read-write"}),
    )
    try:
        connection.server = await connection.fetchval(NAME, timeout=_CONNECT_TIMEOUT)
        connection.doubts = leader.doubts(connection.server)
    except BaseException:
        connection.terminate()
        raise
    return connection


def _each_host(url: str) -> list[str]:
    """The address once for each of its hosts, in their order."""
    netloc = urlsplit(url).netloc
    user, at, hosts = netloc.rpartition("@")
    return [url.replace(netloc, f"{user}{at}{host}", 1) for host in hosts.split(",")] if netloc else [url]


def _let_go(task: asyncio.Task[ServerConnection]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().terminate()


def postgres_engine(address: PostgresAddress, *, pool: int | None = None, leader: Leader | None = None) -> AsyncEngine:
    """An engine for one event loop; it keeps at most ``pool`` connections, or none."""
    kept: dict[str, Any] = {"poolclass": NullPool}
    if pool is not None:
        kept = {"poolclass": AsyncAdaptedQueuePool, "pool_size": pool, "max_overflow": 0, "pool_use_lifo": True}
        kept["pool_timeout"] = PATIENCE
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=lambda: connect(address, leader=leader),
        hide_parameters=True,  # no value of a row in an error or a log
        **kept,
    )
    event.listen(engine.sync_engine, "handle_error", _leave_read_only)
    return engine


def _leave_read_only(context: ExceptionContext) -> None:
    """Let a pool throw away the connections to a server that takes no writes any more, as those that are lost."""
    if _state_of(context.original_exception) == _READ_ONLY:
        context.is_disconnect = True


class PostgresDatabase:
    """A database on a PostgreSQL server, made by whoever runs that. Our tables in it are made by the first start."""

    def __init__(self, address: PostgresAddress, *, pool: int) -> None:
        self._address = address
        self._pool = pool

    def make_room(self) -> None:
        """Do nothing: a database is made by whoever runs the server."""

    def is_new(self) -> bool:
        """Whether nothing of ours is there. Raises ``DatabaseFault``."""
        return not self.read(lambda connection: inspect(connection).has_table("alembic_version"))

    def read(self, verb: Callable[[Connection], Result]) -> Result:
        """Run ``verb``, which only reads. Raises ``DatabaseFault``."""
        return self._in_thread(self._run(verb, upgrades=False))

    def upgrade(self, verb: Callable[[Connection], Result]) -> Result:
        """Run ``verb`` in one transaction. Raises ``DatabaseFault``."""
        return self._in_thread(self._run(verb, upgrades=True))

    def _in_thread(self, run: Coroutine[Any, Any, Result]) -> Result:
        # Whoever calls may have a loop of its own.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, run).result()

    async def _run(self, verb: Callable[[Connection], Result], *, upgrades: bool) -> Result:
        engine = postgres_engine(self._address)
        try:
            async with contextlib.aclosing(await engine.connect()) as connection:
                async with asyncio.timeout(UPGRADE_PATIENCE):
                    _refuse_old(await connection.get_raw_connection())
                    await connection.begin()
                    if not upgrades:
                        await connection.exec_driver_sql("SET TRANSACTION READ ONLY")
                    else:
                        await _wait_to_upgrade(connection)
                    outcome = await connection.run_sync(verb)
                await commit(connection)
                return outcome
        except FAULTS as fault:
            raise DatabaseFault(say(fault)) from fault
        finally:
            await engine.dispose()

    def driver(self, *, on_fault: Callable[[str], None]) -> "PostgresDriver":
        """What a store runs its verbs on."""
        return PostgresDriver(self._address, on_fault=on_fault, pool=self._pool)


class PostgresDriver:
    """Runs verbs on at most ``pool`` connections. Belongs to the event loop in which it is first used."""

    at_once = 3
    """While the server works at some, this process makes others of them: measured, more than three gain little."""

    def __init__(
        self,
        address: PostgresAddress,
        *,
        on_fault: Callable[[str], None],
        pool: int = 8,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address = address
        self._on_fault = on_fault
        self._monotonic = monotonic
        self._leader = Leader(monotonic=monotonic)
        self._proving = asyncio.Lock()
        self._renewing: asyncio.Task[None] | None = None
        self._engine = postgres_engine(address, pool=pool, leader=self._leader)
        self._reading = self._engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        self._under_way: set[asyncio.Task[Any]] = set()
        self._rung = 0

    def bell(self) -> int:
        """A number that has become another since a change was committed here, was heard of, or may have been missed."""
        if self._leader.has_lapsed():
            self._ring()
        return self._rung

    async def listen(self) -> None:
        """Hear of what other nodes commit, until cancelled; come back whenever the connection is lost."""
        was_heard = True
        while True:
            try:
                async with self._listening() as lost:
                    was_heard = True
                    await lost.wait()
            except FAULTS as fault:
                if was_heard:  # once for each outage
                    self._on_fault(f"not listening: {say(fault)}")
                was_heard = False
            self._ring()
            await asyncio.sleep(_RELISTEN)

    @contextlib.asynccontextmanager
    async def _listening(self) -> AsyncIterator[asyncio.Event]:
        """A connection that listens, and what is set when it is lost. Nothing tells of a peer that vanished: it is asked."""
        connection = await connect(self._address, application="gatelodge-listen", leader=self._leader)
        lost = asyncio.Event()

        async def prove() -> None:
            with contextlib.suppress(*FAULTS):
                while connection.is_usable(self._leader):
                    await asyncio.sleep(_PROOF_OF_LIFE)
                    await connection.fetchval("SELECT 1", timeout=_CONNECT_TIMEOUT)
            lost.set()

        proving = asyncio.create_task(prove())
        try:
            connection.add_termination_listener(lambda _: lost.set())
            async with asyncio.timeout(_CONNECT_TIMEOUT):  # a server may fall silent right after it has let somebody in
                await connection.add_listener(_CHANNEL, lambda *_: self._ring())
            self._ring()  # for what was said while nobody listened
            yield lost
        finally:
            proving.cancel()
            connection.terminate()

    def _ring(self) -> None:
        self._rung += 1

    async def write(
        self,
        verb: Callable[Concatenate[Connection, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """Run ``verb`` in a transaction; it is durable when this returns. Raises ``Unavailable``."""
        return await self._transact(self._engine, lambda connection: verb(connection, *args, **kwargs))

    async def read(
        self,
        verb: Callable[Concatenate[Connection, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """Run ``verb``, which only reads, over one snapshot. Raises ``Unavailable``."""
        since = self._monotonic() - TRUST
        return await self._transact(self._reading, lambda connection: verb(connection, *args, **kwargs), since=since)

    async def read_current(
        self,
        verb: Callable[Concatenate[Connection, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """The same, where what it says must have been so when this was asked."""
        since = self._monotonic()
        return await self._transact(self._reading, lambda connection: verb(connection, *args, **kwargs), since=since)

    async def _transact(
        self, engine: AsyncEngine, verb: Callable[[Connection], Result], *, since: float | None = None
    ) -> Result:
        if len(self._under_way) >= _LONGEST:
            raise Unavailable
        progress = _Progress(asyncio.get_running_loop().time() + PATIENCE, since)
        task = asyncio.create_task(self._try(engine, verb, progress))
        self._under_way.add(task)
        task.add_done_callback(self._end)
        # Whoever asked may go away. What has begun is brought to its end all the same.
        await asyncio.wait((task,), timeout=PATIENCE + _MARGIN)
        if not task.done() and not progress.is_committing:
            # Broken off, and so never committed. It takes leave of a server that does not answer, and that takes its time.
            raise Unavailable
        return await asyncio.shield(task)

    def _end(self, task: asyncio.Task[Any]) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            task.exception()  # whoever still waits hears of it

    async def _try(self, engine: AsyncEngine, verb: Callable[[Connection], Result], progress: "_Progress") -> Result:
        for attempt in range(1, _TRIES + 1):
            try:
                return await self._once(engine, verb, progress)
            except _NotCommittedError as nothing_done:
                is_late = asyncio.get_running_loop().time() + _PAUSE * attempt >= progress.deadline
                if attempt == _TRIES or is_late or not nothing_done.is_worth_a_try(attempt):
                    if _is_mistake(nothing_done.fault):
                        raise nothing_done.fault from None  # in a verb, and so ours: it would be no better another time
                    self._on_fault(say(nothing_done.fault))
                    raise Unavailable from nothing_done.fault
                await asyncio.sleep(_PAUSE * attempt * nothing_done.is_contention)
        raise AssertionError("the last attempt returns or raises")

    async def _once(self, engine: AsyncEngine, verb: Callable[[Connection], Result], progress: "_Progress") -> Result:
        try:
            async with asyncio.timeout_at(progress.deadline):
                connecting = await self._connect(engine)
            async with contextlib.aclosing(connecting) as connection:
                async with asyncio.timeout_at(progress.deadline):
                    if progress.since is not None:
                        await self._assure(connection, progress.since)
                    await connection.begin()
                    outcome, has_changed = await connection.run_sync(_run_verb, verb)
                    if has_changed:
                        await connection.exec_driver_sql(f"NOTIFY {_CHANNEL}")
                progress.is_committing, asked_at, server = True, self._monotonic(), _raw(connection).server
                await commit(connection)
        except FAULTS as fault:
            if progress.is_committing:
                self._on_fault(f"a commit without an answer: {say(fault)}")
                raise Unavailable from fault
            raise _NotCommittedError(fault) from fault
        if has_changed:
            self._leader.note(server, asked_at=asked_at)  # what is read next must not come from another that led before
            self._ring()
        return outcome

    async def _connect(self, engine: AsyncEngine) -> AsyncConnection:
        while True:
            connection = await engine.connect()
            if _raw(connection).is_usable(self._leader):
                return connection
            await _throw_away(connection)

    async def _assure(self, connection: AsyncConnection, since: float) -> None:
        """Have the server of a connection prove that it leads, unless it has since then. Raises ``NotLeadingError``."""
        raw = _raw(connection)
        if self._leader.has_proved(raw.server, since=since):
            if self._leader.is_due() and self._renewing is None:
                self._renewing = asyncio.create_task(self._renew())
                self._under_way.add(self._renewing)
                self._renewing.add_done_callback(self._end)
            return
        async with self._proving:
            if self._leader.has_proved(raw.server, since=since):
                return
            try:
                await self._prove(raw)
            except BaseException:
                await _throw_away(connection)
                raise

    async def _prove(self, raw: ServerConnection) -> None:
        if not raw.is_usable(self._leader):
            raise NotLeadingError("somebody else has waited for its proof in vain")
        asked_at = self._monotonic()
        asking = asyncio.create_task(raw.execute(PROOF))
        try:
            await asyncio.wait((asking,), timeout=PROOF_PATIENCE)
        finally:
            if not asking.done():
                # Also if whoever asked had little time left. While a leader is frozen all come late, and each that asked it
                # anew would leave one more connection to wait there.
                self._leader.doubt(raw.server)
                self._on_fault(UNPROVEN)  # another attempt may follow, and whoever asked hears only of that
                raw.terminate()  # not cancelled, as in `commit`
                asking.add_done_callback(lambda task: task.cancelled() or task.exception())
        if not asking.done():
            raise NotLeadingError(UNPROVEN)
        try:
            asking.result()
        except asyncpg.PostgresError as fault:
            raise NotLeadingError(say(fault)) from fault
        if self._leader.note(raw.server, asked_at=asked_at):
            self._ring()  # what was heard from the one before may be older than thought

    async def _renew(self) -> None:
        try:
            async with asyncio.timeout(PATIENCE), contextlib.aclosing(await self._connect(self._engine)) as connection:
                await self._assure(connection, self._monotonic())
        except FAULTS as fault:
            self._on_fault(say(fault))
        finally:
            self._renewing = None

    async def close(self) -> None:
        """Finish what has begun and let go of the connections."""
        while self._under_way:  # one that ends may have begun another
            await asyncio.wait(self._under_way)
        await self._engine.dispose()


@dataclass(slots=True)
class _Progress:
    """Until when a transaction has to have reached its commit, by the loop's clock, and whether it has.

    ``since``: a reading needs a proof that its server leads that was asked for at this moment or later.
    """

    deadline: float
    since: float | None = None
    is_committing: bool = False


def _raw(connection: AsyncConnection) -> ServerConnection:
    assert connection.sync_connection is not None  # noqa: S101 - it is connected
    raw = connection.sync_connection.connection.driver_connection
    assert isinstance(raw, ServerConnection)  # noqa: S101 - as the engine makes them
    return raw


async def _throw_away(connection: AsyncConnection) -> None:
    """End a connection, and let the pool know."""
    _raw(connection).terminate()
    await connection.invalidate()
    await connection.close()


async def commit(connection: AsyncConnection) -> None:
    """Commit; hang up if that is not answered in time.

    It is not cancelled. A server that waits for a standby and is told to stop waiting has committed without one, and shows that
    to everybody: a retry would be acknowledged on the strength of what the next leader has never heard of.
    """
    raw = (await connection.get_raw_connection()).driver_connection
    committing = asyncio.create_task(connection.commit())
    await asyncio.wait((committing,), timeout=PATIENCE)
    if not committing.done() and raw is not None:
        raw.terminate()
    await committing


FAULTS: Final = (
    DBAPIError,
    OSError,
    TimeoutError,
    PoolTimeout,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # among them: no host takes writes, as while there is no leader
)


class _NotCommittedError(Exception):
    """Nothing of the transaction was done, and that is certain."""

    def __init__(self, fault: Exception) -> None:
        super().__init__()
        self.fault = fault
        self.is_contention = _state_of(fault) in _CONTENTION

    def is_worth_a_try(self, attempt: int) -> bool:
        """Whether another attempt may succeed now: after contention often; after a lost connection one, with a new one."""
        return self.is_contention or (attempt == 1 and (_is_lost(self.fault) or _state_of(self.fault) == _PREPARED_BEFORE))


def _run_verb(connection: Connection, verb: Callable[[Connection], Result]) -> tuple[Result, bool]:
    connection.info.pop(LAST_CHANGE, None)
    outcome = verb(connection)
    return outcome, connection.info.pop(LAST_CHANGE, None) is not None


def _state_of(fault: BaseException) -> str:
    """The SQLSTATE of a fault, if the server has said one."""
    original = getattr(fault, "orig", None) or fault
    return str(getattr(original, "sqlstate", None) or "")


async def _wait_to_upgrade(connection: AsyncConnection) -> None:
    """Let those go first who upgrade already. For a table nobody waits long: all who use it would stand behind."""
    await connection.exec_driver_sql(f"SET LOCAL lock_timeout = {int(UPGRADE_PATIENCE * 1000)}")
    await connection.exec_driver_sql(f"SET LOCAL idle_in_transaction_session_timeout = {int(UPGRADE_PATIENCE * 1000)}")
    await connection.execute(select(func.pg_advisory_xact_lock(_UPGRADE_LOCK)))
    await connection.exec_driver_sql(f"SET LOCAL lock_timeout = {int(LOCK_PATIENCE * 1000)}")


def _is_mistake(fault: BaseException) -> bool:
    """Whether it is what was asked that is at fault: the server refused it, or it could not even be written down for it."""
    unwritten = isinstance(getattr(getattr(fault, "orig", None), "__cause__", None), ValueError)
    return unwritten or _state_of(fault).startswith(_MISTAKEN)


def _is_lost(fault: BaseException) -> bool:
    if isinstance(fault, DBAPIError) and fault.connection_invalidated:
        return True
    return isinstance(fault, ConnectionError | asyncpg.InterfaceError) or _state_of(fault).startswith(_CONNECTION_LOST)


def say(fault: BaseException) -> str:
    """What went wrong, in one line."""
    original = getattr(fault, "orig", None) or fault
    return str(original).strip().splitlines()[0] if str(original).strip() else type(original).__name__


def _refuse_old(connection: Any) -> None:  # noqa: ANN401 - SQLAlchemy's own name for it says nothing
    version = connection.driver_connection.get_server_version()
    if version.major * 10_000 < OLDEST:
        raise DatabaseFault(f"PostgreSQL {version.major} is too old: 15 is needed")
