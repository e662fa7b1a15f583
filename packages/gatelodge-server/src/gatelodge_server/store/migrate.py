"""The schema's version: looked up cheaply at every start, moved on by Alembic when it is behind."""

from pathlib import Path
from typing import Final

from sqlalchemy import Connection, inspect, text

HEAD: Final = "0008"
"""The newest migration. A test holds it to what Alembic finds in ``migrations/versions``."""
_SCRIPTS: Final = Path(__file__).with_name("migrations")


class SchemaTooNew(Exception):
    """The database was made by a newer version of this program."""


def schema_version(connection: Connection) -> str | None:
    """The migration that the database is at; ``None`` if it is empty."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    version = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
    return None if version is None else str(version)


def upgrade(connection: Connection) -> bool:
    """Bring the schema to ``HEAD``; whether there was something to do. Raises ``SchemaTooNew``."""
    version = schema_version(connection)
    if version == HEAD:
        return False
    if version is not None and version > HEAD:
        raise SchemaTooNew(f"the database is at version {version}, this program knows {HEAD}: use a newer one")
    # Alembic takes a third of a second to import, and all but the first start do without it.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    return True
