"""What a start needs and does not find is made here, and what it finds is held to what was there before.

The database knows which environment it is of, and under which names (`iss`) its tokens were issued. So a command beside a
server needs to be told neither, and tokens without expiry outlive a change of the public URL.
"""

import time
from collections.abc import Mapping
from pathlib import Path

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from gatelodge_server.core.secrets import Secret
from gatelodge_server.settings import Settings
from gatelodge_server.store.deployment import environment_of, list_issuers, note_issuer
from gatelodge_server.store.migrate import SchemaTooNew, upgrade
from gatelodge_server.store.signing import list_signing_keys
from gatelodge_server.store.sqlite import UPGRADE_TIMEOUT, sqlite_engine
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
        settings.database.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = not settings.database.exists()
        if MASTER_KEY_VARIABLE not in environ and not master_key_path(settings).exists():
            if not fresh:
                raise StartFault(
                    f"{settings.database} is there, but its master key is not: put the key back at "
                    f"{master_key_path(settings)} or into {MASTER_KEY_VARIABLE}"
                )
            MasterKeys.create(master_key_path(settings), system_entropy)
        engine = sqlite_engine(settings.database, lock_timeout=UPGRADE_TIMEOUT)
        try:
            upgrade(engine)
            _try_master_keys(engine, load_master_keys(settings, environ))
            return _as_known(engine, settings)
        finally:
            engine.dispose()
    except (MasterKeyFault, SchemaTooNew) as fault:
        raise StartFault(str(fault)) from fault
    except OSError as fault:
        raise StartFault(f"{fault.filename or settings.data} cannot be made or read: {fault.strerror}") from fault
    except DBAPIError as fault:
        raise StartFault(f"{settings.database} cannot be used: {fault.orig}") from fault


def _as_known(engine: Engine, settings: Settings) -> Settings:
    with engine.begin() as connection:
        environment = environment_of(connection, settings.environment)
        issuers = list_issuers(connection)
    if environment != settings.environment and settings.states("environment"):
        raise StartFault(f"{settings.database} is of the environment {environment}: each environment has a database of its own")
    return settings.known_as(environment, issuers)


def note_start(settings: Settings) -> None:
    """A server is about to serve: let commands and later starts know under which name it issues tokens.

    Raises ``StartFault``, also if partners were to be registered into a tier that is not there.
    """
    engine = sqlite_engine(settings.database)
    try:
        with engine.begin() as connection:
            tiers = [tier.name for tier in list_tiers(connection)]
            note_issuer(connection, settings.public_url, system_clock())
    except DBAPIError as fault:
        raise StartFault(f"{settings.database} cannot be written: {fault.orig}") from fault
    finally:
        engine.dispose()
    if settings.registration == "on" and settings.registration_tier not in tiers:
        raise StartFault(f"registration_tier: there is no tier {settings.registration_tier}, only {', '.join(tiers)}")


def _try_master_keys(engine: Engine, keys: MasterKeys) -> None:
    vault, now = Vault(keys, system_entropy), system_clock()
    with engine.connect() as connection:
        wrapped = [(key.kid, key.wrapped) for key in list_signing_keys(connection) if key.state(now) != "gone"]
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
