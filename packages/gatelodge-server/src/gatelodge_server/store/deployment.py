"""What a database knows of its deployment: how its credentials are marked, and the names that tokens were issued under."""

from typing import NamedTuple

from sqlalchemy import Connection, select, update

from gatelodge_server.core.model import Instant
from gatelodge_server.store.races import insert_unless_there
from gatelodge_server.store.tables import deployment, issuer, partner

_THE_ONE = 1


class Marking(NamedTuple):
    """What every credential is marked with: a database is of one environment, brand and audience for good."""

    environment: str
    brand: str
    audience: str


def settle_marking(connection: Connection, wanted: Marking) -> Marking:
    """The marking of the database. It is ``wanted`` from now on if there is no partner yet: nothing has been marked."""
    row = connection.execute(select(deployment).with_for_update()).one_or_none()
    if row is None:
        insert_unless_there(connection, deployment, {"id": _THE_ONE, **wanted._asdict()})
        row = connection.execute(select(deployment).with_for_update()).one()
    known = Marking(row.environment, row.brand, row.audience)
    if known != wanted and connection.execute(select(partner.c.id).limit(1)).one_or_none() is None:
        connection.execute(update(deployment).values(wanted._asdict()))
        return wanted
    return known


def find_marking(connection: Connection) -> Marking | None:
    """The marking of the database, if it has one."""
    row = connection.execute(select(deployment.c.environment, deployment.c.brand, deployment.c.audience)).one_or_none()
    return Marking(*row) if row is not None else None


def note_issuer(connection: Connection, url: str, now: Instant) -> None:
    """Tokens are issued under this name from now on."""
    insert_unless_there(connection, issuer, {"url": url, "used_at": now})
    connection.execute(update(issuer).where(issuer.c.url == url).values(used_at=now))


def is_issuer(connection: Connection, url: str) -> bool:
    """Whether tokens were ever issued under this name."""
    return connection.execute(select(issuer.c.url).where(issuer.c.url == url)).one_or_none() is not None


def find_issuer(connection: Connection) -> str | None:
    """The name that tokens were last issued under."""
    return connection.execute(
        select(issuer.c.url).order_by(issuer.c.used_at.desc(), issuer.c.url).limit(1)
    ).scalar_one_or_none()
