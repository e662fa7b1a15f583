"""Deployments on either database: data directories that know theirs, and nodes that share one."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import Server
from outside import fresh
from postgres import postgres

DATABASES = ("sqlite", "postgresql")
HEARD_WITHIN = {"sqlite": 0.0, "postgresql": 2.0}
"""Seconds within which a process heeds what another one has changed: with SQLite before that one is answered, with PostgreSQL
when it has heard of it. That is promised for a second (P3); the machine that runs all tests at once is given two."""


def settle(data: Path, database: str) -> Path:
    """Make a data directory whose settings name its database, so that neither a server nor a command need be told."""
    data.mkdir(mode=0o700)
    if database == "postgresql":
        (data / "gatelodge.toml").write_text(f'database = "{postgres().create(fresh("journey_"))}"\n')
    return data


class TwoNodes(Server):
    """Two nodes of a deployment on PostgreSQL. Each has a directory, a certificate and a port of its own; what is asked of
    both as of one server is asked of the first.
    """

    def __init__(self, data: Path, *args: str, **options: Any) -> None:
        super().__init__(data, *args, **options)
        self.other = Server(data.with_name(f"{data.name}-other"), *args, **options)

    @property
    def nodes(self) -> Sequence[Server]:
        return self, self.other

    def start(self, *args: str) -> None:
        """Start one after the other: the first makes what both need."""
        super().start(*args)
        if not self.other.data.exists():
            self._share()
        try:
            self.other.start(*args)
        except BaseException:
            super().kill()
            raise

    def _share(self) -> None:
        self.other.data.mkdir(mode=0o700)
        for name in ("gatelodge.toml", "master.key"):
            shutil.copy(self.data / name, self.other.data / name)
        # Whichever node sends a mail, it is found in one place.
        (self.data / "outbox").mkdir(mode=0o700, exist_ok=True)
        (self.other.data / "outbox").symlink_to(self.data / "outbox")

    def kill(self) -> None:
        """SIGKILL for both."""
        for node in self.nodes:
            Server.kill(node)

    def stop(self) -> int:
        """SIGTERM to both; the worse of their exit codes."""
        return max((Server.stop(node) for node in self.nodes), key=abs)


def on_database(database: str, data: Path, *args: str, **options: Any) -> Server:
    """A server that keeps everything there."""
    return Server(settle(data, database), *args, **options)


def several_nodes(database: str, data: Path, *args: str, **options: Any) -> Server:
    """As many servers as a database allows: one with SQLite, two nodes with PostgreSQL."""
    settle(data, database)
    return Server(data, *args, **options) if database == "sqlite" else TwoNodes(data, *args, **options)


def two_processes(database: str, data: Path, *args: str, **options: Any) -> Server:
    """A deployment that two processes serve: workers of one server with SQLite, nodes with PostgreSQL."""
    workers = ("--workers", "2") if database == "sqlite" else ()
    return several_nodes(database, data, *args, *workers, **options)
