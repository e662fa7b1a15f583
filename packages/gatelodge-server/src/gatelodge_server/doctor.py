"""`gatelodge doctor`: whatever would keep the service from working, looked for without changing anything."""

import asyncio
import shutil
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, timedelta
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from cryptography import x509
from sqlalchemy import Connection, func, select, text

from gatelodge.errors import Unavailable
from gatelodge_server.core.following import MAX_STALENESS
from gatelodge_server.core.model import MINUTE, SECOND, Duration, Instant, KeyPurpose
from gatelodge_server.deployment import check_master_keys, load_master_keys, master_key_path, system_clock
from gatelodge_server.mail.transports import NotTaken, Patience, SmtpTransport
from gatelodge_server.settings import Settings
from gatelodge_server.store.address import PostgresAddress, SqliteAddress
from gatelodge_server.store.clock import store_now, time_of
from gatelodge_server.store.database import Database, database_at
from gatelodge_server.store.faults import DatabaseFault
from gatelodge_server.store.migrate import HEAD, schema_version
from gatelodge_server.store.outbox import find_backlog
from gatelodge_server.store.relocation import why_not_used
from gatelodge_server.store.signing import list_signing_keys
from gatelodge_server.store.trail import last_change
from gatelodge_server.vault import MasterKeyFault, Vault, system_entropy

_OLDEST_SQLITE: Final = (3, 35, 0)
"""The first with `RETURNING`."""
_SPARE_DISK: Final = 256 * 1024 * 1024
_MAIL_LATE: Final[Duration] = 15 * MINUTE
_MAIL_PATIENCE: Final = Patience(connect=3.0, command=3.0, letter=5.0)
_CERTIFICATE_SOON: Final = timedelta(days=21)
_SKEW_MAX: Final[Duration] = 2 * SECOND


class Check(NamedTuple):
    """What is looked at, and the checks without which that would only complain of the same again."""

    look: Callable[[], str]
    needs: frozenset[str] = frozenset()


Checks: TypeAlias = Mapping[str, Check]
_USE: Final = frozenset({"use"})
_TABLES: Final = _USE | {"schema"}


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found, and what to do if it is not fine."""

    check: str
    fine: bool
    detail: str

    def record(self) -> Mapping[str, object]:
        """The finding in the wire's field names."""
        return {"check": self.check, "status": "ok" if self.fine else "failed", "detail": self.detail}


def examine(settings: Settings, environ: Mapping[str, str]) -> list[Finding]:
    """Make every check, whatever the others find, but those that would find the same."""
    database = database_at(settings.database)
    address = settings.database
    findings = [_finding("sqlite", _check_sqlite)] if isinstance(address, SqliteAddress) else []
    findings.append(_finding("master key", lambda: _check_master_key(settings, environ)))
    there = _finding("database", lambda: _check_there(database, settings))
    if not there.fine:
        return [*findings, there]
    checks: Checks = {
        "use": Check(lambda: database.read(lambda asked: _check_use(asked, settings))),
        # What nobody may start on is not to be upgraded either.
        "schema": Check(lambda: database.read(_check_schema), _USE),
        **(
            _checks_of_file(database, address)
            if isinstance(address, SqliteAddress)
            else _checks_of_server(database, address, settings)
        ),
        "signing keys": Check(
            lambda: database.read(lambda asked: _check_signing_keys(asked, settings, environ)), _TABLES | {"master key"}
        ),
        "certificate": Check(lambda: _check_certificate(settings)),
        "mail": Check(lambda: _check_mail(database, settings), _TABLES),
    }
    for name, check in checks.items():
        if check.needs.isdisjoint(finding.check for finding in findings if not finding.fine):
            findings.append(_finding(name, check.look))
    return findings


def _checks_of_file(database: Database, address: SqliteAddress) -> Checks:
    return {
        "database": Check(lambda: database.read(_check_integrity)),
        "durability": Check(lambda: database.read(_check_durability)),
        "disk": Check(lambda: _check_disk(address.path.parent)),
    }


def _checks_of_server(database: Database, address: PostgresAddress, settings: Settings) -> Checks:
    return {
        "database": Check(lambda: database.read(_check_server)),
        "durability": Check(lambda: database.read(_check_server_durability)),
        "leadership": Check(lambda: _check_leadership(address)),
        "clock": Check(lambda: database.read(_check_clock)),
        "connections": Check(lambda: database.read(lambda connection: _check_connections(connection, settings))),
        # News is said by a commit: where none is confirmed, none is heard.
        "changes": Check(lambda: _check_changes(database, address), _TABLES | {"leadership"}),
    }


class NotFine(Exception):
    """What a check has to complain about. The message says it to whoever runs the deployment."""


def _finding(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, fine=True, detail=check())
    except NotFine as complaint:
        return Finding(name, fine=False, detail=str(complaint))
    except (DatabaseFault, Unavailable, MasterKeyFault, OSError, ValueError) as fault:
        return Finding(name, fine=False, detail=str(fault))


def _check_sqlite() -> str:
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        raise NotFine(f"SQLite {sqlite3.sqlite_version} is too old: 3.35 is needed")
    return f"SQLite {sqlite3.sqlite_version}"


def _check_master_key(settings: Settings, environ: Mapping[str, str]) -> str:
    keys = load_master_keys(settings, environ)
    return f"{len(keys.keys)} at {master_key_path(settings)}, readable by its owner only"


def _check_there(database: Database, settings: Settings) -> str:
    if database.is_new():
        raise NotFine(f"{settings.database} is not there: start the server once")
    return "is there"


def _check_use(connection: Connection, settings: Settings) -> str:
    reason = why_not_used(connection)
    if reason is not None:
        raise NotFine(f"{settings.database} {reason}")
    return "may be started on"


def _check_integrity(connection: Connection) -> str:
    verdict = connection.execute(text("PRAGMA quick_check(1)")).scalar_one()
    if verdict != "ok":
        raise NotFine(f"damaged: {verdict}. Restore a backup")
    return "whole"


def _check_durability(connection: Connection) -> str:
    journal = connection.execute(text("PRAGMA journal_mode")).scalar_one()
    synchronous = connection.execute(text("PRAGMA synchronous")).scalar_one()
    if (journal, synchronous) != ("wal", 2):
        raise NotFine(f"journal_mode is {journal}, synchronous is {synchronous}: is the file on a network share?")
    return "write-ahead log, synced at every commit"


def _check_server(connection: Connection) -> str:
    return f"PostgreSQL {_setting(connection, 'server_version')}"


def _check_server_durability(connection: Connection) -> str:
    off = [name for name in ("fsync", "full_page_writes") if _setting(connection, name) != "on"]
    if off:
        raise NotFine(f"{' and '.join(off)} off: what was acknowledged is lost when the server's machine stops")
    standbys = _setting(connection, "synchronous_standby_names")
    return "synced at every commit" + (f", and on a standby ({standbys})" if standbys else ", on this server only")


def _check_leadership(address: PostgresAddress) -> str:
    # Imported by those who use it, as in `database_at`.
    from gatelodge_server.store.probing import prove  # noqa: PLC0415

    return f"proved by a commit in {prove(address) * 1000:.0f} ms"


def _check_clock(connection: Connection) -> str:
    before = system_clock()
    there = store_now(connection) or before
    return judge_clocks(before, there, system_clock())


def judge_clocks(before: Instant, there: Instant, after: Instant) -> str:
    """What to say of the database's clock, which was read between two looks at this machine's. Raises ``NotFine``."""
    ahead = max(before - there, 0) or min(after - there, 0)
    skew = abs(ahead)
    if skew > _SKEW_MAX:
        raise NotFine(
            f"this machine's is {skew / SECOND:.1f} s {'ahead of' if ahead > 0 else 'behind'} the database's: are both kept by "
            "NTP? If the database's is wrong, nodes date and end everything by a wrong clock. If this machine's is, the times "
            "in its log are wrong, and it makes and judges certificates by a wrong date"
        )
    return f"{skew / SECOND:.1f} s apart from the database's"


def _check_connections(connection: Connection, settings: Settings) -> str:
    # The second kind of reserved connections is there since PostgreSQL 16.
    reserved = text(
        "SELECT current_setting('superuser_reserved_connections')::int + "
        "coalesce(current_setting('reserved_connections', true), '0')::int"
    )
    of_role = text("SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user")
    of_database = text("SELECT datconnlimit FROM pg_database WHERE datname = current_database()")
    limits = {
        "max_connections": int(_setting(connection, "max_connections")) - connection.execute(reserved).scalar_one(),
        "the CONNECTION LIMIT of its role": connection.execute(of_role).scalar_one(),
        "the CONNECTION LIMIT of the database": connection.execute(of_database).scalar_one(),
    }
    # -1 is no limit.
    most, by = min((limit, name) for name, limit in limits.items() if limit >= 0)
    used = connection.execute(text("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'")).scalar_one()
    # One more each, which listens.
    wanted = settings.workers * (settings.database_pool + 1)
    if wanted > most:
        raise NotFine(f"this node may want {wanted}, {by} leaves {most}: lower database_pool or workers, or raise that")
    return f"{used} of {most} in use; this node wants {wanted} at most"


def _check_changes(database: Database, address: PostgresAddress) -> str:
    from gatelodge_server.store.probing import hear  # noqa: PLC0415

    begun = time.monotonic()
    sequence = database.read(last_change)
    took = time.monotonic() - begun
    if took > MAX_STALENESS / 2:
        raise NotFine(f"a reading of the change sequence took {took:.1f} s; after {MAX_STALENESS:.0f} s caches are not used")
    try:
        heard = hear(address)
    except DatabaseFault as fault:
        raise NotFine(f"{fault}: nodes hear of revocations half a second late. Is there a pooler in between?") from fault
    return f"at step {sequence}, read in {took * 1000:.0f} ms; news is heard after {heard * 1000:.0f} ms"


def _setting(connection: Connection, name: str) -> str:
    return str(connection.execute(select(func.current_setting(name))).scalar_one())


def _check_schema(connection: Connection) -> str:
    version = schema_version(connection)
    if version is not None and version > HEAD:
        raise NotFine(f"at version {version}, this program knows {HEAD}: use a newer one")
    if version != HEAD:
        raise NotFine(
            f"at version {version}, this program needs {HEAD}: run `gatelodge database upgrade`; until then nothing that is "
            "kept in the tables is looked at"
        )
    return f"at version {version}"


def _check_signing_keys(connection: Connection, settings: Settings, environ: Mapping[str, str]) -> str:
    vault, now = Vault(load_master_keys(settings, environ), system_entropy), time_of(connection, system_clock())
    keys = list_signing_keys(connection)
    check_master_keys(connection, vault)
    states = [key.state(now) for key in keys]
    if {key.purpose for key in keys if key.state(now) == "current"} != set(KeyPurpose):
        raise NotFine("none signs: start the server once")
    return ", ".join(f"{states.count(state)} {state}" for state in ("next", "current", "retiring") if state in states)


def _check_disk(directory: Path) -> str:
    free = shutil.disk_usage(directory).free
    if free < _SPARE_DISK:
        raise NotFine(f"{free >> 20} MiB are free: writes will soon be refused")
    return f"{free >> 30} GiB free"


def _check_certificate(settings: Settings) -> str:
    if settings.behind_proxy:
        return "the proxy's"
    path = settings.tls_cert or settings.data / "tls" / "server.pem"
    if not path.exists():
        raise NotFine(f"{path} is not there" + ("" if settings.tls_cert else ": the server makes it at its first start"))
    expiry = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    now = system_clock() // SECOND
    if expiry.astimezone(UTC).timestamp() < now + _CERTIFICATE_SOON.total_seconds():
        raise NotFine(f"expires at {expiry.isoformat()}: replace it")
    return f"good until {expiry.date().isoformat()}"


def _check_mail(database: Database, settings: Settings) -> str:
    (waiting, oldest_at, fault), now = database.read(lambda asked: (find_backlog(asked), time_of(asked, system_clock())))
    late = 0 if oldest_at is None else now - oldest_at
    backlog = f"{waiting} waiting, the oldest for {late // MINUTE} minutes" if waiting else "none waiting"
    backlog += f" (last fault: {fault})" if fault else ""
    way = _mail_way(settings)
    if late > _MAIL_LATE:
        raise NotFine(f"{way}; {backlog}. Is the server running, and does the mail server take its mails?")
    return f"{way}; {backlog}"


def _mail_way(settings: Settings) -> str:
    if settings.smtp is None:
        unsent = ": partners get none of them, set smtp" if settings.environment == "production" else ""
        return f"into files in {settings.data / 'outbox'}{unsent}"
    server = f"{settings.smtp.host}:{settings.smtp.port}"
    try:
        asyncio.run(SmtpTransport(settings.smtp, patience=_MAIL_PATIENCE).greet(settings.mail_from))
    except NotTaken as fault:
        raise NotFine(f"{server} does not answer as it should: {fault}") from fault
    return f"{server} answers"
