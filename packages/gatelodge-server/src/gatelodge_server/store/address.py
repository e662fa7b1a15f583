"""Where the data are: an embedded file, or a PostgreSQL server. The first word of the address says which.

`sqlite:///PATH`, or `postgresql://USER@HOST:PORT/NAME` as libpq writes it (PostgreSQL 15 manual, 34.1.1.2), with several hosts
if there are: then the one that takes writes is looked for. A password may stand in the address. It is wrapped as soon as it is
read, and nothing that is shown has it. `PGPASSWORD` and a password file work as they do everywhere.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit

from gatelodge_server.core.secrets import Secret

_SQLITE: Final = "sqlite:///"
_SCHEMES: Final = frozenset({"postgresql", "postgres"})
_HOSTS: Final = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]*)(?::\d{1,5})?")


@dataclass(frozen=True, slots=True)
class SqliteAddress:
    """A file. ``str`` gives its path."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def url(self) -> str:
        """As ``parse_address`` reads it."""
        return f"{_SQLITE}{self.path}"


@dataclass(frozen=True, slots=True)
class PostgresAddress:
    """A database on a PostgreSQL server. ``url`` has no password, and may be shown; ``str`` gives it."""

    url: str
    password: Secret | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return self.url

    def __reduce__(self) -> tuple[object, ...]:
        # To the workers of a server, through a pipe of its own.
        return _revive, (self.url, None if self.password is None else self.password.reveal())


Address: TypeAlias = SqliteAddress | PostgresAddress


def parse_address(text: str) -> Address:
    """Read an address. Raises ``ValueError``, whose text does not repeat it: there may be a password in it."""
    if text.startswith(_SQLITE) and len(text) > len(_SQLITE):
        return SqliteAddress(Path(text.removeprefix(_SQLITE)))
    parts = urlsplit(text)
    if parts.scheme not in _SCHEMES or not text.isprintable():
        raise ValueError("must be sqlite:///PATH or postgresql://USER@HOST:PORT/NAME")
    user, _, hosts = parts.netloc.rpartition("@")
    user, has_password, password = user.partition(":")
    if not all(_HOSTS.fullmatch(host) for host in hosts.split(",")) or parts.fragment:
        raise ValueError("must have hosts as in postgresql://USER@HOST:PORT,HOST:PORT/NAME, and what is special in it as %XX")
    if not parts.path.strip("/"):
        raise ValueError("must name a database, as in postgresql://USER@HOST:PORT/NAME")
    if any(name == "password" for name, _ in parse_qsl(parts.query)):
        raise ValueError("must not have its password among the parameters: USER:PASSWORD@HOST, PGPASSWORD or a password file")
    rest = text.partition("://")[2].removeprefix(parts.netloc)
    url = f"postgresql://{f'{user}@' if user else ''}{hosts}{rest}"
    return PostgresAddress(url, Secret(unquote(password)) if has_password else None)


def _revive(url: str, password: str | None) -> PostgresAddress:
    return PostgresAddress(url, None if password is None else Secret(password))
