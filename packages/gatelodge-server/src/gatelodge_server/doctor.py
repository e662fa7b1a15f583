"""`gatelodge doctor`: whatever would keep the service from working, looked for without changing anything."""

import asyncio
import shutil
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, timedelta
from typing import Final

from cryptography import x509
from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError

from gatelodge_server.core.model import MINUTE, SECOND, Duration, KeyPurpose
from gatelodge_server.deployment import load_master_keys, master_key_path, system_clock
from gatelodge_server.mail.transports import NotTaken, Patience, SmtpTransport
from gatelodge_server.settings import Settings
from gatelodge_server.store.migrate import HEAD, schema_version
from gatelodge_server.store.outbox import find_backlog
from gatelodge_server.store.signing import list_signing_keys
from gatelodge_server.store.sqlite import sqlite_engine
from gatelodge_server.vault import MasterKeyFault, Vault, system_entropy

_OLDEST_SQLITE: Final = (3, 35, 0)
"""The first with `RETURNING`."""
_SPARE_DISK: Final = 256 * 1024 * 1024
_MAIL_LATE: Final[Duration] = 15 * MINUTE
_MAIL_PATIENCE: Final = Patience(connect=3.0, command=3.0, letter=5.0)
_CERTIFICATE_SOON: Final = timedelta(days=21)


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
    """Make every check, whatever the others find."""
    findings = [_finding("sqlite", _check_sqlite)]
    findings.append(_finding("master key", lambda: _check_master_key(settings, environ)))
    if not settings.database.exists():
        findings.append(Finding("database", False, f"{settings.database} is not there: start the server once"))  # noqa: FBT003
        return findings
    engine = sqlite_engine(settings.database, begin="BEGIN")
    try:
        findings += [
            _finding("database", lambda: _check_integrity(engine)),
            _finding("schema", lambda: _check_schema(engine)),
            _finding("durability", lambda: _check_durability(engine)),
            _finding("signing keys", lambda: _check_signing_keys(engine, settings, environ)),
            _finding("disk", lambda: _check_disk(settings)),
            _finding("certificate", lambda: _check_certificate(settings)),
            _finding("mail", lambda: _check_mail(engine, settings)),
        ]
    finally:
        engine.dispose()
    return findings


class _NotFine(Exception):
    """What a check has to complain about."""


def _finding(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, fine=True, detail=check())
    except _NotFine as complaint:
        return Finding(name, fine=False, detail=str(complaint))
    except (MasterKeyFault, OSError, ValueError) as fault:
        return Finding(name, fine=False, detail=str(fault))
    except SQLAlchemyError as fault:
        return Finding(name, fine=False, detail=str(getattr(fault, "orig", fault)))


def _check_sqlite() -> str:
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        raise _NotFine(f"SQLite {sqlite3.sqlite_version} is too old: 3.35 is needed")
    return f"SQLite {sqlite3.sqlite_version}"


def _check_master_key(settings: Settings, environ: Mapping[str, str]) -> str:
    keys = load_master_keys(settings, environ)
    return f"{len(keys.keys)} at {master_key_path(settings)}, readable by its owner only"


def _check_integrity(engine: Engine) -> str:
    with engine.connect() as connection:
        verdict = connection.execute(text("PRAGMA quick_check(1)")).scalar_one()
    if verdict != "ok":
        raise _NotFine(f"damaged: {verdict}. Restore a backup")
    return "whole"


def _check_schema(engine: Engine) -> str:
    version = schema_version(engine)
    if version != HEAD:
        raise _NotFine(f"at version {version}, this program has {HEAD}: run `gatelodge database upgrade`")
    return f"at version {version}"


def _check_durability(engine: Engine) -> str:
    with engine.connect() as connection:
        journal = connection.execute(text("PRAGMA journal_mode")).scalar_one()
        synchronous = connection.execute(text("PRAGMA synchronous")).scalar_one()
    if (journal, synchronous) != ("wal", 2):
        raise _NotFine(f"journal_mode is {journal}, synchronous is {synchronous}: is the file on a network share?")
    return "write-ahead log, synced at every commit"


def _check_signing_keys(engine: Engine, settings: Settings, environ: Mapping[str, str]) -> str:
    vault, now = Vault(load_master_keys(settings, environ), system_entropy), system_clock()
    with engine.connect() as connection:
        keys = list_signing_keys(connection)
    for key in (key for key in keys if key.state(now) in {"current", "next"}):  # the others are only verified with
        vault.open(key.wrapped, label=b"signing-key:" + key.kid.encode("ascii"))
    states = [key.state(now) for key in keys]
    if {key.purpose for key in keys if key.state(now) == "current"} != set(KeyPurpose):
        raise _NotFine("none signs: start the server once")
    return ", ".join(f"{states.count(state)} {state}" for state in ("next", "current", "retiring") if state in states)


def _check_disk(settings: Settings) -> str:
    free = shutil.disk_usage(settings.database.parent).free
    if free < _SPARE_DISK:
        raise _NotFine(f"{free >> 20} MiB are free: writes will soon be refused")
    return f"{free >> 30} GiB free"


def _check_certificate(settings: Settings) -> str:
    if settings.behind_proxy:
        return "the proxy's"
    path = settings.tls_cert or settings.data / "tls" / "server.pem"
    if not path.exists():
        raise _NotFine(f"{path} is not there" + ("" if settings.tls_cert else ": the server makes it at its first start"))
    expiry = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    now = system_clock() // SECOND
    if expiry.astimezone(UTC).timestamp() < now + _CERTIFICATE_SOON.total_seconds():
        raise _NotFine(f"expires at {expiry.isoformat()}: replace it")
    return f"good until {expiry.date().isoformat()}"


def _check_mail(engine: Engine, settings: Settings) -> str:
    with engine.connect() as connection:
        waiting, oldest_at, fault = find_backlog(connection)
    late = 0 if oldest_at is None else system_clock() - oldest_at
    backlog = f"{waiting} waiting, the oldest for {late // MINUTE} minutes" if waiting else "none waiting"
    backlog += f" (last fault: {fault})" if fault else ""
    way = _mail_way(settings)
    if late > _MAIL_LATE:
        raise _NotFine(f"{way}; {backlog}. Is the server running, and does the mail server take its mails?")
    return f"{way}; {backlog}"


def _mail_way(settings: Settings) -> str:
    if settings.smtp is None:
        unsent = ": partners get none of them, set smtp" if settings.environment == "production" else ""
        return f"into files in {settings.data / 'outbox'}{unsent}"
    server = f"{settings.smtp.host}:{settings.smtp.port}"
    try:
        asyncio.run(SmtpTransport(settings.smtp, patience=_MAIL_PATIENCE).greet(settings.mail_from))
    except NotTaken as fault:
        raise _NotFine(f"{server} does not answer as it should: {fault}") from fault
    return f"{server} answers"
