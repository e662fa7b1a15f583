"""`gatelodge database copy`: a deployment moves into another database while it serves.

What happens, in order; ``store/relocation.py`` keeps the states, ``store/copying.py`` the rows:

1. Both databases get a row that says what they are to each other. Nobody starts on the new one from here on.
2. Every table is copied in batches. The old database is served meanwhile, and changes.
3. The old database is closed to writes. From here on nothing in it changes.
4. The tables are walked through row by row, and what is different is put right. Then the rules that were lifted for the copying
   (foreign keys, unique indexes) are taken back into force, and the counters of numbered rows are set.
5. Every row is compared once more.
6. The old database is gone: nobody relies on it any more. Then the new one is complete. Servers start on it.

It can be killed anywhere and run again. Until step 3 nobody notices anything; between 3 and 6 requests that write are answered
503; before the new one is complete it can be taken back (``abandon``). Of two runs at once the later one overtakes the other.
"""

import asyncio
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple, TypeAlias

from sqlalchemy import Connection, Table, text

from gatelodge.errors import Unavailable
from gatelodge_server.core.model import Clock, Entropy
from gatelodge_server.store import relocation
from gatelodge_server.store.address import Address, SqliteAddress, parse_address
from gatelodge_server.store.copying import (
    Difference,
    count_rows,
    drop_rows,
    find_differences,
    has_rows,
    inspector,
    key_reader,
    read_batch,
    read_key,
    write_key,
    write_rows,
)
from gatelodge_server.store.database import database_at
from gatelodge_server.store.deployment import find_marking
from gatelodge_server.store.faults import DatabaseFault, UnfitRow
from gatelodge_server.store.migrate import HEAD, SchemaTooNew, schema_version, upgrade
from gatelodge_server.store.relocation import COPIED, Overtaken, Relocation, Role, State
from gatelodge_server.store.sides import Side, high_water, loosen, raise_water, side_of, tighten
from gatelodge_server.store.tables import AnyRow, audit, change, tier
from gatelodge_server.store.trail import LAST_CHANGE

_BATCH: Final = 1000
"""Rows. Reading them takes a few milliseconds, and nobody waits for it."""
_CLOSING_TRIES: Final = 5
_ID_SIZE: Final = 16
_NUMBERED: Final = (change, audit)
_OWN: Final = tuple(table for table in COPIED if table is not tier)
"""What a database has rows in only when somebody has started on it. The first tiers are put there by the migrations."""
_IDENTITY: Final = text(
    "SELECT oid::text || ' since ' || pg_postmaster_start_time()::text FROM pg_database WHERE datname = current_database()"
)


class CopyRefused(Exception):
    """The copy cannot be begun, or cannot go on. The message says what to do."""


class Step(NamedTuple):
    """How far it has come: ``done`` of about ``total`` rows of what ``name`` says."""

    name: str
    done: int = 0
    total: int = 0


Tell: TypeAlias = Callable[[Step], None]
Differences: TypeAlias = Generator[tuple[Table, Difference | None], None, None]


@dataclass(frozen=True, slots=True)
class Copied:
    """What was moved: ``changed`` rows of it had to be put right after the old database was closed."""

    tables: int
    rows: int
    changed: int


class Copier:
    """One run of the command. ``pause`` is called between two batches; ``tell`` hears of every step once it is done."""

    def __init__(
        self,
        source: Address,
        target: Address,
        *,
        clock: Clock,
        entropy: Entropy,
        pause: Callable[[], None],
        tell: Tell = lambda _: None,
        batch: int = _BATCH,
    ) -> None:
        self._source = source
        self._target = target
        self._clock = clock
        self._entropy = entropy
        self._pause = pause
        self._tell = tell
        self._batch = batch
        self._copier = entropy(_ID_SIZE)

    def run(self) -> Copied:
        """Move everything. Raises ``CopyRefused`` or ``DatabaseFault``; then it can be run again."""
        try:
            self._refuse_impossible()
            with closing(side_of(self._source)) as source, closing(side_of(self._target)) as target:
                return self._move(source, target)
        except Overtaken:
            raise CopyRefused("another `gatelodge database copy` has taken over, or the move was given up meanwhile") from None
        except UnfitRow as unfit:
            raise CopyRefused(f"{self._target} cannot hold everything: {unfit}. Mend that in {self._source}") from unfit

    # --- whether it can be done

    def _refuse_impossible(self) -> None:
        old, new = database_at(self._source), database_at(self._target)
        if old.is_new():
            raise CopyRefused(f"there is no deployment in {self._source}")
        version = old.read(schema_version)
        if version != HEAD:
            raise CopyRefused(
                f"{self._source} is at version {version}, this program has {HEAD}: run `gatelodge database upgrade` first"
            )
        if old.read(find_marking) is None:
            raise CopyRefused(f"there is no deployment in {self._source}")
        try:
            new.make_room()
        except OSError as fault:
            raise CopyRefused(f"{self._target} cannot be made: {fault.strerror}") from fault
        if not new.is_new():
            if self._is_one_database():
                raise CopyRefused(f"{self._target} is the database that is to be copied")
            version = new.read(schema_version)
            if version not in {None, HEAD}:
                raise CopyRefused(f"{self._target} is at version {version}, this program has {HEAD}: upgrade that first")
        try:
            new.upgrade(upgrade)
        except SchemaTooNew as fault:  # somebody with a newer program was faster
            raise CopyRefused(f"{self._target}: {fault}") from fault

    def _is_one_database(self) -> bool:
        if isinstance(self._source, SqliteAddress) or isinstance(self._target, SqliteAddress):
            both = isinstance(self._source, SqliteAddress) and isinstance(self._target, SqliteAddress)
            return both and self._source.path.samefile(self._target.path)  # type: ignore[union-attr]  # as `both` says
        return database_at(self._source).read(_identity) == database_at(self._target).read(_identity)

    def _move(self, source: Side, target: Side) -> Copied:
        here, there = source.read(relocation.find_relocation), target.read(relocation.find_relocation)
        roles = (here.role if here else None, there.role if there else None)
        if here is not None and there is not None and roles == (Role.SOURCE, Role.TARGET) and here.move == there.move:
            return self._go_on(source, target, here, there)
        if here is not None and here.role is Role.SOURCE and here.state is not State.COPYING:
            raise CopyRefused(
                f"{self._source} is being moved to {here.other}, and {self._target} is not the copy that was begun: "
                "name that, or take the move back with --abandon"
            )
        if here is not None and here.role is Role.TARGET and here.state is not State.COMPLETE:
            raise CopyRefused(f"{self._source} is an incomplete copy itself")
        if there is not None:
            raise CopyRefused(f"{self._target} has a part of another copy: name a database that is empty")
        move, now = self._entropy(_ID_SIZE), self._clock()
        # First the old one, and a new mark for each that is empty: so no two databases can ever go on with one move.
        source.write(partial(relocation.begin_move, move=move, other=self._target.url, now=now))
        database_at(self._target).upgrade(lambda connection: self._begin_copy(connection, move))
        self._tell(Step("begun"))
        return self._copy(source, target, move, is_closed=False)

    def _begin_copy(self, connection: Connection, move: bytes) -> None:
        # Whoever starts on a database upgrades it first, and nobody else does so meanwhile.
        if relocation.find_relocation(connection) is not None or has_rows(connection, _OWN):
            raise CopyRefused(f"{self._target} has data of its own: name a database that is empty")
        relocation.begin_copy(connection, move, self._source.url, now=self._clock())

    def _go_on(self, source: Side, target: Side, here: Relocation, there: Relocation) -> Copied:
        if there.state is State.ABANDONED:
            raise CopyRefused(f"{self._target} was given up: take the move back with --abandon, then name an empty database")
        if there.state is State.COMPLETE:
            return Copied(len(COPIED), _count(source), 0)
        if here.state is State.GONE:
            target.write(partial(relocation.take_over, move=here.move, copier=self._copier))
            return self._hand_over(source, target, here.move, changed=0)
        return self._copy(source, target, here.move, is_closed=here.state is State.CLOSED)

    # --- copying

    def _copy(self, source: Side, target: Side, move: bytes, *, is_closed: bool) -> Copied:
        progress = target.write(partial(self._take_over, move=move))
        if not is_closed:
            self._copy_tables(source, target, progress)
            self._close(source, move)
        try:
            changed = self._settle(source, target)
            marks = source.read(_high_waters)
            target.write(lambda connection: self._tighten(connection, marks), long=True)
        except UnfitRow:
            # It came after the copying had passed. Nothing here can mend it, so those who are waiting need not wait.
            source.write(partial(relocation.reopen, move=move, now=self._clock()))
            raise
        self._tell(Step("settled"))
        return self._hand_over(source, target, move, changed=changed)

    def _take_over(self, connection: Connection, move: bytes) -> str | None:
        found = relocation.take_over(connection, move, self._copier)
        loosen(connection)
        return found.progress

    def _copy_tables(self, source: Side, target: Side, progress: str | None) -> None:
        total, done = _count(source), _count(target)
        place, after = read_key(progress, COPIED) if progress is not None else (0, None)
        for table in COPIED[place:]:
            look, key_of = inspector(table, target.dialect), key_reader(table)
            while rows := source.read(partial(read_batch, table=table, after=after, limit=self._batch)):
                look(rows)
                after = key_of(rows[-1])
                target.write(partial(self._put_batch, table=table, rows=rows, progress=write_key(table, after)))
                done += len(rows)
                self._tell(Step("copying", done, max(total, done)))
                if len(rows) < self._batch:
                    break
                self._pause()
            after = None
        if done < total:  # rows have been deleted meanwhile
            self._tell(Step("copying", done, done))
        self._tell(Step("copied", done, done))

    def _put_batch(self, connection: Connection, table: Table, rows: Sequence[AnyRow], progress: str) -> None:
        relocation.note_progress(connection, self._copier, progress)
        write_rows(connection, table, rows)

    def _close(self, source: Side, move: bytes) -> None:
        for attempt in range(1, _CLOSING_TRIES + 1):
            try:
                source.write(partial(relocation.close, move=move, now=self._clock()))
                break
            except DatabaseFault:
                # Those who write wait behind us, so we do not wait long for somebody who is in the way.
                if attempt == _CLOSING_TRIES:
                    raise
                self._pause()
        self._tell(Step("closed"))

    def _settle(self, source: Side, target: Side) -> int:
        """Make the new database equal to the old one, which does not change any more; how many rows were not."""
        changed = 0
        waiting: list[Difference] = []
        with closing(self._differences(source, target, "settling")) as found:
            for table, difference in found:
                if difference is not None:
                    waiting.append(difference)
                if waiting and (difference is None or len(waiting) == self._batch):
                    inspector(table, target.dialect)([row for row, _ in waiting if row is not None])
                    target.write(partial(self._put_right, table=table, differences=waiting))
                    changed += len(waiting)
                    waiting = []
        return changed

    def _put_right(self, connection: Connection, table: Table, differences: Sequence[Difference]) -> None:
        relocation.hold_copy(connection, self._copier)
        drop_rows(connection, table, [other for _, other in differences if other is not None])
        write_rows(connection, table, [row for row, _ in differences if row is not None])

    def _tighten(self, connection: Connection, marks: Mapping[str, int]) -> None:
        relocation.hold_copy(connection, self._copier)
        tighten(connection)
        for table in _NUMBERED:
            raise_water(connection, table, marks[table.name])

    def _hand_over(self, source: Side, target: Side, move: bytes, *, changed: int) -> Copied:
        with closing(self._differences(source, target, "comparing")) as found:
            wrong = [table.name for table, difference in found if difference is not None]
        if wrong:
            raise CopyRefused(f"{len(wrong)} rows are not the same in {self._target} ({', '.join(sorted(set(wrong)))})")
        copied = Copied(len(COPIED), _count(source), changed)
        self._tell(Step("compared", copied.rows, copied.rows))
        self._leave(move)
        self._tell(Step("gone"))
        target.write(partial(relocation.complete, move=move, copier=self._copier, now=self._clock()))
        self._tell(Step("complete"))
        return copied

    def _differences(self, source: Side, target: Side, name: str) -> Differences:
        """Every difference between two moments, and after those of a table ``None``."""
        done, total = 0, _count(source)

        def seen(rows: int) -> None:
            nonlocal done
            done += rows
            if done % self._batch == 0:
                self._tell(Step(name, done, total))

        with source.snapshot() as here, target.snapshot() as there:
            for table in COPIED:
                with closing(find_differences(table, here, there, seen)) as differences:
                    for difference in differences:
                        yield table, difference
                yield table, None
        self._tell(Step(name, done, done))

    def _leave(self, move: bytes) -> None:
        """Let the old database be gone, and let those who serve it hear of that at once."""

        def verb(connection: Connection) -> None:
            relocation.leave(connection, move, now=self._clock())
            connection.info[LAST_CHANGE] = 0

        async def write() -> None:
            driver = database_at(self._source).driver(on_fault=faults.append)
            try:
                await driver.write(verb)
            finally:
                await driver.close()

        faults: list[str] = []
        try:
            asyncio.run(write())
        except Unavailable as fault:
            raise DatabaseFault("; ".join(faults)) from fault


def abandon(source: Address, target: Address | None, *, clock: Clock) -> None:
    """Take a move back that is not complete: the old database is in use again, the new one never. Raises as ``Copier`` does.

    ``target`` is needed once the old one is gone, if the address that was written down there does not do.
    """
    if database_at(source).is_new():
        raise CopyRefused(f"there is no deployment in {source}")
    with closing(side_of(source)) as old:
        here = old.read(relocation.find_relocation) if old.read(schema_version) == HEAD else None
        if here is None or here.role is not Role.SOURCE:
            raise CopyRefused(f"{source} is not being moved")
        states: tuple[State, ...] = (State.COPYING, State.CLOSED)
        if here.state is State.GONE:
            there = target or parse_address(here.other)
            with closing(side_of(there)) as new:
                if not new.write(partial(relocation.abandon_copy, move=here.move, now=clock())):
                    raise CopyRefused(f"{there} is complete, or is not the copy: this cannot be taken back any more")
            states = (State.GONE,)
        try:
            old.write(partial(relocation.stay, move=here.move, states=states))
        except Overtaken:
            raise CopyRefused(f"the move of {source} has gone on meanwhile: try again") from None


@contextmanager
def standing_told(source: Address) -> Iterator[None]:
    """Say with each fault what it means for those who use the old database."""
    try:
        yield
    except DatabaseFault as fault:
        raise CopyRefused(f"{fault}. {_standing(source)}") from fault


def _standing(source: Address) -> str:
    try:
        here = database_at(source).read(relocation.find_relocation)
    except DatabaseFault:
        return f"Nothing is lost; when {source} can be read again, run this once more"
    if here is None or here.state is State.COPYING:
        return f"Nothing is lost and {source} is in use as before: run this once more, and it goes on"
    return f"Nothing is lost, but {source} takes no writes: run this once more to finish, or with --abandon to stay there"


def _identity(connection: Connection) -> str:
    return str(connection.execute(_IDENTITY).scalar_one())


def _count(side: Side) -> int:
    return side.read(lambda connection: sum(count_rows(connection, table) for table in COPIED))


def _high_waters(connection: Connection) -> Mapping[str, int]:
    return {table.name: high_water(connection, table) for table in _NUMBERED}
