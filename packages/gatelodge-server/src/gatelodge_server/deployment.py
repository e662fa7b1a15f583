"""What a start needs and does not find is made here, and what it finds is held to what was there before.

The database knows what its credentials are marked with (environment, brand, audience), and under which names (`iss`) tokens
were issued. So a command beside a server needs to be told neither, and tokens without expiry outlive a change of the URL.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from sqlalchemy import Connection

from gatelodge_server.core.secrets import Secret
from gatelodge_server.settings import Settings, default_audience
from gatelodge_server.store.database import database_at
from gatelodge_server.store.deployment import Marking, find_issuer, find_marking, settle_marking
from gatelodge_server.store.faults import DatabaseFault
from gatelodge_server.store.migrate import SchemaTooNew, upgrade
from gatelodge_server.store.relocation import why_not_used
from gatelodge_server.store.signing import list_signing_keys
from gatelodge_server.store.tiers import list_tiers
from gatelodge_server.vault import MasterKeyFault, MasterKeys, Vault, system_entropy

MASTER_KEY_VARIABLE = "GATELODGE_MASTER_KEY"
SMTP_PASSWORD_VARIABLE = "GATELODGE_SMTP_PASSWORD"  # noqa: S105 - a name


class StartFault(Exception):
    """The service cannot be started. The message says what to do."""


def system_clock() -> int:
    """The wall clock, in milliseconds."""
    return time.time_ns() // 1_000_000


def prepare(settings: Settings, environ: Mapping[str, str]) -> Settings:
    """Make what a start needs and does not find: directory, master key, schema. The settings, with what the database knows.

    Raises ``StartFault``. A master key is made for an empty database only: a database that has lost its key is not opened with
    another, nor one of an environment as if it were of another.
    """
    if bool(settings.smtp_user) != (SMTP_PASSWORD_VARIABLE in environ):
        raise StartFault(f"the setting smtp_user and the variable {SMTP_PASSWORD_VARIABLE} go together")
    try:
        settings.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        database = database_at(settings.database)
        database.make_room()
        if MASTER_KEY_VARIABLE not in environ and not master_key_path(settings).exists():
            if not database.is_new():
                raise StartFault(
                    f"{settings.database} is there, but its master key is not: put the key back at "
                    f"{master_key_path(settings)} or into {MASTER_KEY_VARIABLE}"
                )
            MasterKeys.create(master_key_path(settings), system_entropy)
        keys = load_master_keys(settings, environ)
        return database.upgrade(lambda connection: _settle(connection, settings, keys))
    except (MasterKeyFault, SchemaTooNew) as fault:
        raise StartFault(str(fault)) from fault
    except OSError as fault:
        raise StartFault(f"{fault.filename or settings.data} cannot be made or read: {fault.strerror}") from fault
    except DatabaseFault as fault:
        raise StartFault(f"{settings.database} cannot be used: {fault}") from fault


def _settle(connection: Connection, settings: Settings, keys: MasterKeys) -> Settings:
    reason = why_not_used(connection)
    if reason is not None:
        raise StartFault(f"{settings.database} {reason}")
    upgrade(connection)
    _try_master_keys(connection, keys)
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


def _try_master_keys(connection: Connection, keys: MasterKeys) -> None:
    """Open what signs or will sign. What is only verified with needs no private half, so its master key may be gone."""
    vault, now = Vault(keys, system_entropy), system_clock()
    wrapped = [(key.kid, key.wrapped) for key in list_signing_keys(connection) if key.state(now) in {"current", "next"}]
    try:
        for kid, sealed in wrapped:
            vault.open(sealed, label=b"signing-key:" + kid.encode("ascii"))
    except ValueError as fault:
        raise StartFault(f"the database was made under another master key than the present one: {fault}") from fault


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
