"""What a database knows of its deployment: its marking, its master keys, and the names that tokens were issued under."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sqlalchemy import Connection, select, update

from gatelodge_server.core.model import Instant
from gatelodge_server.store.races import insert_unless_there
from gatelodge_server.store.tables import deployment, issuer, key_check, partner

_THE_ONE = 1
_MARKING = select(deployment.c.environment, deployment.c.brand, deployment.c.audience)


class Marking(NamedTuple):
    """What every credential is marked with: a database is of one environment, brand and audience for good."""

    environment: str
    brand: str
    audience: str


def settle_marking(connection: Connection, wanted: Marking) -> Marking:
    """The marking of the database. It is ``wanted`` from now on if there is no partner yet: nothing has been marked.

    Whoever makes a partner holds the marking (``hold_marking``), so nobody marks anything with one that is being changed.
    """
    if find_marking(connection) == wanted:  # as nearly always: then nothing is locked, which who makes a partner waits for
        return wanted
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
    row = connection.execute(_MARKING).one_or_none()
    return Marking(*row) if row is not None else None


def hold_marking(connection: Connection) -> Marking | None:
    """The same, and it stays so until the commit. Others may hold it too. To be asked for before anything else is locked."""
    row = connection.execute(_MARKING.with_for_update(read=True)).one_or_none()
    return Marking(*row) if row is not None else None


def list_key_checks(connection: Connection) -> Sequence[bytes]:
    """What was sealed under each master key that this database has been opened with."""
    return connection.execute(select(key_check.c.sealed).order_by(key_check.c.key_id)).scalars().all()


def keep_key_checks(connection: Connection, sealed: Mapping[bytes, bytes]) -> None:
    """Let the database be opened with these master keys too: what each has sealed, by the key's id."""
    known = set(connection.execute(select(key_check.c.key_id)).scalars())
    for key_id in sorted(sealed.keys() - known):
        insert_unless_there(connection, key_check, {"key_id": key_id, "sealed": sealed[key_id]})


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
