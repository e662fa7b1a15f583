"""Servers with one part swapped: ``python -m experiments.variants NAME serve …`` takes the arguments of ``gatelodge serve``.

All but ``clock`` are broken on purpose, each in one way that an experiment has to notice. They are put together through the
constructor arguments of the product; the product itself knows nothing of them.
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection

from gatelodge.errors import InvalidCredential, Unavailable
from gatelodge.gate import Rates, Scope
from gatelodge.verify import Caller
from gatelodge_server.app import Lodge, assemble, open_store
from gatelodge_server.core.following import MAX_STALENESS
from gatelodge_server.core.ids import uuid7
from gatelodge_server.core.model import Change, Clock, Instant, SessionEnd
from gatelodge_server.core.ports import (
    Advanced,
    Condemned,
    Done,
    LoginAttempt,
    Opened,
    RefreshAttempt,
    RefreshOutcome,
    Refused,
    SessionStanding,
)
from gatelodge_server.core.sessions import judge_refresh
from gatelodge_server.deployment import system_clock
from gatelodge_server.http.turnstile import Turnstile
from gatelodge_server.serve import WebApp, serve
from gatelodge_server.settings import Settings, load_settings
from gatelodge_server.store.address import PostgresAddress, SqliteAddress
from gatelodge_server.store.database import database_at
from gatelodge_server.store.postgres import PostgresDriver
from gatelodge_server.store.sqlite import SqliteDriver
from gatelodge_server.store.store import Driver, SqlStore
from gatelodge_server.vault import Vault, system_entropy

_UNCOUNTED: Final = frozenset({"no-news", "uncounted"})
OFFSET_FILE: Final = "clock-offset"
"""In the data directory: what the ``clock`` variant adds to the time, in milliseconds; ``=N`` stops it at N."""
_LATE: Final = 0.3
"""Seconds that the ``hasty`` store lets pass between its word and its deed."""


class _LaxDriver(SqliteDriver):
    """Writes with another ``synchronous`` than FULL."""

    def __init__(self, path: Path, level: str) -> None:
        super().__init__(path, on_fault=lambda _: None)
        event.listen(self._writer, "connect", lambda connection, _: connection.execute(f"PRAGMA synchronous = {level}"))


class _PostgresVariant(PostgresDriver):
    """The driver of the settings' server, whose connections can be meddled with."""

    def __init__(self, settings: Settings) -> None:
        assert isinstance(settings.database, PostgresAddress)
        super().__init__(settings.database, on_fault=lambda _: None, pool=settings.database_pool)

    @property
    def connections(self) -> Engine:
        """What its connections come from."""
        return self._engine.sync_engine


class _AsynchronousDriver(_PostgresVariant):
    """Commits without waiting for the disk."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)

        def stop_waiting(connection: DBAPIConnection, _: object) -> None:
            connection.cursor().execute("SET synchronous_commit = off")
            connection.commit()

        event.listen(self.connections, "connect", stop_waiting)


class _UnlockedDriver(_PostgresVariant):
    """Reads what it decides by without a lock."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)

        def leave_the_lock_out(*call: Any) -> tuple[str, Any]:
            _, _, statement, parameters, *_ = call
            return statement.partition(" FOR UPDATE")[0], parameters

        event.listen(self.connections, "before_cursor_execute", leave_the_lock_out, retval=True)


class _Forgetful(SqlStore):
    """Forgets to look at the generation: every genuine token moves its session on."""

    async def advance_session(self, attempt: RefreshAttempt) -> RefreshOutcome:
        found = await self.find_session(attempt.session_id)
        if found is not None:
            attempt = attempt._replace(generation=found.session.generation)
        return await super().advance_session(attempt)


class _Hasty(SqlStore):
    """Acknowledges a refresh before it commits it. Unless it is killed in between, nobody can tell."""

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver)
        self._ahead: dict[bytes, SessionStanding] = {}
        self._promised: asyncio.Queue[RefreshAttempt] = asyncio.Queue()
        self._writer: asyncio.Task[None] | None = None

    async def advance_session(self, attempt: RefreshAttempt) -> RefreshOutcome:
        stored = await self.find_session(attempt.session_id)
        found = self._ahead.get(attempt.session_id, stored)
        outcome = judge_refresh(found, attempt)
        if found is not None and isinstance(outcome, Advanced | Condemned):
            self._ahead[attempt.session_id] = SessionStanding(outcome.session, found.standing)
            self._promised.put_nowait(attempt)
            self._writer = self._writer or asyncio.create_task(self._keep_promises())
        return outcome

    async def end_session(self, session_id: bytes, *, cause: SessionEnd, now: Instant, by: str) -> Done | None:
        await self._promised.join()
        self._ahead.pop(session_id, None)
        return await super().end_session(session_id, cause=cause, now=now, by=by)

    async def _keep_promises(self) -> None:
        while True:
            await asyncio.sleep(_LATE)
            for _ in range(self._promised.qsize()):
                await super().advance_session(self._promised.get_nowait())
                self._promised.task_done()


class _Careless(SqlStore):
    """Takes no notice when a commit fails."""

    async def advance_session(self, attempt: RefreshAttempt) -> RefreshOutcome:
        outcome = judge_refresh(await self.find_session(attempt.session_id), attempt)
        try:
            return await super().advance_session(attempt)
        except Unavailable:
            return outcome


class _Lenient(SqlStore):
    """Refuses a reused token, and leaves the session alive."""

    async def advance_session(self, attempt: RefreshAttempt) -> RefreshOutcome:
        found = await self.find_session(attempt.session_id)
        if found is not None and isinstance(outcome := judge_refresh(found, attempt), Condemned):
            return outcome
        return await super().advance_session(attempt)


class _ByTheClock(SqlStore):
    """Knows a spent token by the time only: one is spent when the session was moved on at an earlier moment than now."""

    async def advance_session(self, attempt: RefreshAttempt) -> RefreshOutcome:
        found = await self.find_session(attempt.session_id)
        if found is not None and found.session.rotated_at >= attempt.now:
            attempt = attempt._replace(generation=found.session.generation)
        return await super().advance_session(attempt)


class _Deaf(SqlStore):
    """Does not hear of Idempotency-Keys."""

    async def advance_session(self, attempt: RefreshAttempt) -> RefreshOutcome:
        return await super().advance_session(attempt._replace(retry=None))


class _Hoarding(SqlStore):
    """Opens another session at every refresh."""

    async def advance_session(self, attempt: RefreshAttempt) -> RefreshOutcome:
        found = await self.find_session(attempt.session_id)
        if found is not None:
            session, digest = found.session, found.standing.digest
            another = uuid7(attempt.now, system_entropy)
            await self.open_session(
                LoginAttempt(session.credential_id, digest, another, attempt.now, attempt.expires_at, session.retires_at)
            )
        return await super().advance_session(attempt)


class _Telling(SqlStore):
    """Answers at once when nobody has a key of this id."""

    async def open_session(self, attempt: LoginAttempt) -> Opened | Refused:
        if await self.find_key(attempt.key_id) is None:
            return Refused(InvalidCredential)
        return await super().open_session(attempt)


class _LongMemory(SqlStore):
    """Says for ten times the maximum staleness that nothing has changed: what a node remembers is believed for so long."""

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver)
        self.bell = lambda: 0
        self.listen = _never
        self._until = time.monotonic() + 10 * MAX_STALENESS

    async def list_changes(self, *, after: int, limit: int) -> Sequence[Change]:
        return [] if time.monotonic() < self._until else await super().list_changes(after=after, limit=limit)


class _NoNews(SqlStore):
    """Takes no answer for no news: a node goes on to believe what it remembers while nobody tells it anything."""

    _last = 0

    async def list_changes(self, *, after: int, limit: int) -> Sequence[Change]:
        try:
            return await super().list_changes(after=after, limit=limit)
        except Unavailable:
            return []

    async def last_change(self) -> int:
        with contextlib.suppress(Unavailable):
            self._last = await super().last_change()
        return self._last


class _Uncounted(Turnstile):
    """Lets everybody in whom the gate knows. What an experiment sees of a gate is then whom it knows."""

    def __call__(self, caller: Caller, scope: Scope) -> Rates:  # noqa: ARG002 - it is all the same to it who comes
        """Count nothing."""
        return []


async def _never() -> None:
    await asyncio.Event().wait()


def _driver(settings: Settings) -> SqliteDriver:
    return SqliteDriver(_path(settings), on_fault=lambda _: None)


def _path(settings: Settings) -> Path:
    assert isinstance(settings.database, SqliteAddress)
    return settings.database.path


def _by_own_clock(settings: Settings) -> SqlStore:
    """Judges windows by the clock of the node that asks, on whatever database."""
    return SqlStore(_any_driver(settings), store_now=lambda _: None)


def _any_driver(settings: Settings) -> Driver:
    return database_at(settings.database, pool=settings.database_pool).driver(on_fault=lambda _: None)


STORES: Final[Mapping[str, Callable[[Settings], SqlStore]]] = {
    "clock": open_store,
    "sync-off": lambda settings: SqlStore(_LaxDriver(_path(settings), "OFF")),
    "sync-normal": lambda settings: SqlStore(_LaxDriver(_path(settings), "NORMAL")),
    "sync-commit-off": lambda settings: SqlStore(_AsynchronousDriver(settings)),
    "unlocked": lambda settings: SqlStore(_UnlockedDriver(settings)),
    "forgetful": lambda settings: _Forgetful(_driver(settings)),
    "hasty": lambda settings: _Hasty(_driver(settings)),
    "careless": lambda settings: _Careless(_driver(settings)),
    "lenient": lambda settings: _Lenient(_driver(settings)),
    "by-the-clock": lambda settings: _ByTheClock(_driver(settings)),
    "deaf": lambda settings: _Deaf(_driver(settings)),
    "hoarding": lambda settings: _Hoarding(_driver(settings)),
    "own-clock": _by_own_clock,
    "long-memory": lambda settings: _LongMemory(_any_driver(settings)),
    "no-news": lambda settings: _NoNews(_any_driver(settings)),
    "uncounted": open_store,
    "telling": lambda settings: _Telling(_driver(settings)),
}


def shifted_clock(path: Path) -> Clock:
    """The system's clock, moved or stopped by what stands in a file, which is read at every look."""

    def read() -> int:
        try:
            text = path.read_text()
        except FileNotFoundError:
            return system_clock()
        return int(text[1:]) if text.startswith("=") else system_clock() + int(text)

    return read


@dataclass(frozen=True, slots=True)
class VariantApp(WebApp):
    """The application with a part of another make."""

    variant: str

    def assemble(self, vault: Vault) -> Lodge:
        """The parts that serve, one of them swapped."""
        clock = shifted_clock(self.settings.data / OFFSET_FILE)
        lodge = assemble(self.settings, vault, own_clock=clock, store_of=STORES[self.variant])
        if self.variant in _UNCOUNTED:
            return replace(lodge, turnstile=_Uncounted(quotas=lodge.quotas, clock=clock))
        return lodge


def program(variant: str) -> tuple[str, ...]:
    """The command that runs a variant, without its arguments."""
    return (sys.executable, "-m", "experiments.variants", variant)


def main() -> None:
    """Serve, and say so as `gatelodge serve --json` does."""
    parser = argparse.ArgumentParser(prog="experiments.variants")
    parser.add_argument("variant", choices=STORES)
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("--json", action="store_true", help="announced in JSON, always")
    for flag in ("port", "data", "workers"):
        parser.add_argument(f"--{flag}")
    given = parser.parse_args()
    settings = load_settings({"port": given.port, "data": given.data, "workers": given.workers}, os.environ)
    variant: str = given.variant
    serve(
        settings,
        lambda started: print(json.dumps({"port": started.settings.port}), flush=True),
        web_app_of=lambda own: VariantApp(own, variant),
    )


if __name__ == "__main__":
    main()
