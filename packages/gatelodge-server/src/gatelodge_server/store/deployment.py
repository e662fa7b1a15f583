"""What a database knows of its deployment: the environment, and the names that tokens were issued under."""

from collections.abc import Sequence

from sqlalchemy import Connection, insert, select, update

from gatelodge_server.core.model import Instant
from gatelodge_server.store.tables import deployment, issuer


def environment_of(connection: Connection, wanted: str) -> str:
    """The environment of the database: ``wanted``, from now on and for good, if it has none yet."""
    bound = connection.execute(select(deployment.c.environment).with_for_update()).scalar_one_or_none()
    if bound is None:
        connection.execute(insert(deployment).values(environment=wanted))
        return wanted
    return str(bound)


def note_issuer(connection: Connection, url: str, now: Instant) -> None:
    """Tokens are issued under this name from now on."""
    if connection.execute(update(issuer).where(issuer.c.url == url).values(used_at=now)).rowcount == 0:
        connection.execute(insert(issuer).values(url=url, used_at=now))


def list_issuers(connection: Connection) -> Sequence[str]:
    """The names that tokens were issued under, the latest first."""
    return list(connection.execute(select(issuer.c.url).order_by(issuer.c.used_at.desc(), issuer.c.url)).scalars())
