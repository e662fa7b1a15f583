"""What a start needs and does not find is made here, and what it finds is held to what was there before.

The database knows what its credentials are marked with (environment, brand, audience), and under which names (`iss`) tokens
were issued. So a command beside a server needs to be told neither, and tokens without expiry outlive a change of the URL.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from sqlalchemy import Connection

from gatelodge_server.core.secrets import Secret
from gatelodge_server.settings import Settings, default_audience
from gatelodge_server.store.database import Database, database_at
from gatelodge_server.store.deployment import (
    Marking,
    find_issuer,
    find_marking,
    keep_key_checks,
    list_key_checks,
    settle_marking,
)
from gatelodge_server.store.faults import DatabaseFault
from gatelodge_server.store.migrate import SchemaTooNew, upgrade
from gatelodge_server.store.relocation import why_not_used
from gatelodge_server.store.signing import list_signing_keys
from gatelodge_server.store.tiers import list_tiers
from gatelodge_server.vault import MasterKeyFault, MasterKeys, Vault, make_key_file, sync_directory, system_entropy

MASTER_KEY_VARIABLE = "GATELODGE_MASTER_KEY"
SMTP_PASSWORD_VARIABLE = "GATELODGE_SMTP_PASSWORD"  # noqa: S105 - a name
_KEY_CHECK: Final = b"key-check"


class StartFault(Exception):
    """The service cannot be started. The message says what to do."""


class _OtherMasterKey(StartFault):
    """The database is of another master key, for certain."""


def system_clock() -> int:
    """The wall clock, in milliseconds."""
    return time.time_ns() // 1_000_000


def prepare(settings: Settings, environ: Mapping[str, str]) -> Settings:
    """Make what a start needs and does not find: directory, master key, schema. The settings, with what the database knows.

    Raises ``StartFault``. A master key is made for an empty database only: a database that has lost its key is not opened with
    another, nor one of an environment as if it were of another. Of two starts that each make one at once, on two machines, the
    first to reach the database has it; the other takes its own back.
    """
    if bool(settings.smtp_user) != (SMTP_PASSWORD_VARIABLE in environ):
        raise StartFault(f"the setting smtp_user and the variable {SMTP_PASSWORD_VARIABLE} go together")
    try:
        settings.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        database = database_at(settings.database)
        database.make_room()
        is_made = MASTER_KEY_VARIABLE not in environ and _make_master_key(settings, database)
        keys = load_master_keys(settings, environ)
        try:
            return database.upgrade(lambda connection: _settle(connection, settings, keys))
        except _OtherMasterKey:
            if is_made:  # nothing was sealed under it, and the next start would take it for the right one
                master_key_path(settings).unlink()
                sync_directory(settings.data)
            raise
    except (MasterKeyFault, SchemaTooNew) as fault:
        raise StartFault(str(fault)) from fault
    except OSError as fault:
        raise StartFault(f"{fault.filename or settings.data} cannot be made or read: {fault.strerror}") from fault
    except DatabaseFault as fault:
        raise StartFault(f"{settings.database} cannot be used: {fault}") from fault


def _make_master_key(settings: Settings, database: Database) -> bool:
    """Make a key if there is none and the database is new; whether it was this start that made it."""
    path = master_key_path(settings)
    if path.exists():
        return False
    is_new = database.is_new()
    if is_new:
        return make_key_file(path, system_entropy)
    if not path.exists():  # looked at again: whoever has just made the database here has made the key before
        raise StartFault(
            f"{settings.database} is there, but its master key is not: put the key back at {path} or into "
            f"{MASTER_KEY_VARIABLE} (every machine that serves it needs a copy)"
        )
    return False


def _settle(connection: Connection, settings: Settings, keys: MasterKeys) -> Settings:
    reason = why_not_used(connection)
    if reason is not None:
        raise StartFault(f"{settings.database} {reason}")
    upgrade(connection)
    _try_master_keys(connection, settings, keys)
    return _as_known(connection, settings)


def _as_known(connection: Connection, settings: Settings) -> Settings:
    """The settings, where nobody states another, as the database knows the deployment."""
    stated = {name: getattr(settings, name) for name in Marking._fields if settings.states(name)}
    before = find_marking(connection) or Marking(settings.environment, settings.brand, settings.audience)
    wanted = before._replace(**stated)
    if "audience" not in stated and before.audience == default_audience(before.environment):
        wanted = wanted._replace(audience=default_audience(wanted.environment))
    known = settle_marking(connection, wanted)
    issuer = find_issuer(connection)
    for name, value in stated.items():
        if getattr(known, name) != value:
            raise StartFault(
                f"{settings.database} has credentials of the {name} {getattr(known, name)}, not {value}: "
                "each environment, brand and audience has a database of its own"
            )
    public_url = issuer if issuer is not None and not settings.states("public_url") else settings.public_url
    return replace(settings, **known._asdict(), public_url=public_url)


def check_registration_tier(settings: Settings) -> None:
    """Raise ``StartFault`` if partners were to be registered into a tier that is not there."""
    try:
        tiers = [tier.name for tier in database_at(settings.database).read(list_tiers)]
    except DatabaseFault as fault:
        raise StartFault(f"{settings.database} cannot be read: {fault}") from fault
    if settings.registration == "on" and settings.registration_tier not in tiers:
        raise StartFault(f"registration_tier: there is no tier {settings.registration_tier}, only {', '.join(tiers)}")


def _try_master_keys(connection: Connection, settings: Settings, keys: MasterKeys) -> None:
    """See that the database is of one of these master keys; from now on it is of all of them, so that one may take over.

    A key that was taken out of the list stays known to the database: another node may not have heard of its successor yet.
    """
    vault = Vault(keys, system_entropy)
    try:
        check_master_keys(connection, vault)
    except ValueError as fault:
        raise _OtherMasterKey(
            f"{settings.database}: the database was made under another master key than the present one: {fault}. Copy "
            f"master.key of a node that serves it to {master_key_path(settings)}, or put its line into {MASTER_KEY_VARIABLE}"
        ) from fault
    keep_key_checks(connection, vault.seal_under_each(b"", label=_KEY_CHECK))


def check_master_keys(connection: Connection, vault: Vault) -> None:
    """Raise ``ValueError`` unless the database can be used with these master keys.

    One of them must be the database's own, and what signs or will sign must open. What is only verified with needs no private
    half, so its master key may be gone. A database of an earlier version, or a new one, is nobody's own yet.
    """
    checks = list_key_checks(connection)
    if checks and not any(_opens(vault, sealed) for sealed in checks):
        raise ValueError("it knows none of the present master keys")
    now = system_clock()
    for key in list_signing_keys(connection):
        if key.state(now) in {"current", "next"}:
            vault.open(key.wrapped, label=b"signing-key:" + key.kid.encode("ascii"))


def _opens(vault: Vault, sealed: bytes) -> bool:
    try:
        vault.open(sealed, label=_KEY_CHECK)
    except ValueError:
        return False
    return True


def master_key_path(settings: Settings) -> Path:
    """Where the master key is kept, unless it comes from the environment."""
    return settings.data / "master.key"


def load_master_keys(settings: Settings, environ: Mapping[str, str]) -> MasterKeys:
    """The master keys. Raises ``MasterKeyFault``."""
    text = environ.get(MASTER_KEY_VARIABLE)
    if text is None:
        return MasterKeys.load(master_key_path(settings))
    return MasterKeys.parse(text.replace(",", "\n"), source=MASTER_KEY_VARIABLE)


def smtp_password(environ: Mapping[str, str]) -> Secret | None:
    """What to log in to the mail server with, if there is anything."""
    text = environ.get(SMTP_PASSWORD_VARIABLE)
    return Secret(text) if text is not None else None
