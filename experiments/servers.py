"""Real servers for experiments, each a context manager: nodes of the product, and what they stand on and behind.

===================  ==========================================================================
`postgres_server`    PostgreSQL, durable, 18 from the wheel or 15 from Debian (`tests.postgres`)
`Nodes`, `Node`      processes of `gatelodge serve` that share a database and a master key
`PatroniCluster`     PostgreSQL that fails over (`experiments.patroni`)
`HaProxy`            a load balancer (`experiments.haproxy`)
`Cut`                a wire between two of them (`experiments.cut`)
`FakeClock`          another time of day for any of them
===================  ==========================================================================

``python -m experiments.servers`` starts those that need Debian's packages and prints what came up.
"""

import base64
import functools
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Self

from tests import processes
from tests.harness import PROGRAM, Server, run_command
from tests.postgres import DURABLE, PostgresServer

from experiments.cut import Cut
from experiments.daemon import status_of, wait_for
from experiments.haproxy import Backend, HaProxy
from experiments.patroni import DEBIAN_PROGRAMS, Member, PatroniCluster

__all__ = [
    "DEBIAN_PROGRAMS",
    "Backend",
    "Cut",
    "FakeClock",
    "HaProxy",
    "Member",
    "Node",
    "Nodes",
    "PatroniCluster",
    "PostgresServer",
    "postgres_server",
    "wait_for",
]

_HOUR: Final = 3600.0
_NONE: Final[Mapping[str, str]] = MappingProxyType({})


class FakeClock:
    """A time of day that is off by so many seconds, for programs that are started with ``environ`` (libfaketime).

    The offset stands in a file that is read at every look, so ``set`` moves the clock of what runs. The monotonic clock, on
    which timers run, is left as it is.
    """

    def __init__(self, offset: float = 0.0) -> None:
        self._path = processes.working_directory("clock") / "offset"
        self._path.parent.chmod(0o755)  # whoever a program runs as
        self.set(offset)

    @property
    def environ(self) -> dict[str, str]:
        """What makes a program look at this clock."""
        found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
        assert found, "libfaketime is not installed"
        return {
            "LD_PRELOAD": str(found[0]),
            "FAKETIME_TIMESTAMP_FILE": str(self._path),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_DONT_RESET": "1",
        }

    def set(self, offset: float) -> None:
        """Move it, at once and for everybody who looks at it."""
        draft = self._path.with_suffix(".draft")
        draft.write_text(f"{offset:+.3f}\n")
        draft.chmod(0o644)
        draft.replace(self._path)

    def set_before_hour(self, seconds: float) -> None:
        """Move it ahead, so that a full hour (UTC) begins in so many seconds."""
        self.set(before_hour(seconds, now=time.time()))


def before_hour(seconds: float, *, now: float) -> float:
    """By how much a clock has to be ahead of ``now`` so that a full hour begins in so many seconds."""
    return -(now + seconds) % _HOUR


def postgres_server(
    *, programs: Path | None = None, clock: FakeClock | None = None, settings: Mapping[str, str] = _NONE
) -> PostgresServer:
    """A durable PostgreSQL: the wheel's, or the one of ``programs``. ``settings`` are added, to break it for a control."""
    environ = clock.environ if clock is not None else None
    return PostgresServer(settings={**DURABLE, **settings}, programs=programs, environ=environ)


class Node(Server):
    """One process of `gatelodge serve`, with its workers. Its data directory is its own; the rest it shares with the others."""

    def start(self, *args: str) -> None:
        """Start, and return when it listens."""
        super().start(*args)
        assert self.process is not None
        processes.end_at_end(self.process)

    @property
    def pid(self) -> int:
        """The process id of the process, or of the parent of its workers."""
        assert self.process is not None
        return self.process.pid

    def freeze(self) -> None:
        """SIGSTOP for it and its workers."""
        processes.freeze(self.pid)

    def thaw(self) -> None:
        """Let them go on."""
        processes.thaw(self.pid)

    @property
    def backend(self) -> Backend:
        """What a proxy has to know of it."""
        return Backend(self.port, self.authority if self.authority.exists() else None)


class Nodes:
    """The nodes of one deployment: one database, one master key, one public URL. They are ended together.

    Each may be given a ``database`` of its own, which is the same one by another way (through a `Cut`).
    """

    def __init__(
        self, root: Path, database: str, *, program: Sequence[str] = PROGRAM, environ: Mapping[str, str] = _NONE
    ) -> None:
        self.root = root
        self.database = database
        self.all: list[Node] = []
        self._program = program
        key = base64.urlsafe_b64encode(os.urandom(32)).decode().rstrip("=")
        self._environ = {"GATELODGE_MASTER_KEY": key, **environ}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.all:
            if node.process is not None and node.process.poll() is None:
                node.kill()

    def add(
        self,
        *args: str,
        database: str | None = None,
        clock: FakeClock | None = None,
        environ: Mapping[str, str] = _NONE,
        program: Sequence[str] | None = None,
    ) -> Node:
        """Another node, not yet started. ``args`` are flags of `gatelodge serve`."""
        own = {**self._environ, "GATELODGE_DATABASE": database or self.database, **environ}
        if clock is not None:
            own |= clock.environ
        node = Node(self.root / f"node-{len(self.all)}", *args, environ=own, program=program or self._program)
        self.all.append(node)
        return node

    def start(self, count: int, *args: str) -> Sequence[Node]:
        """Add nodes and start them, one after the other."""
        added = [self.add(*args) for _ in range(count)]
        for node in added:
            node.start()
        return added

    def run(self, *args: str) -> Any:
        """Run a command of `gatelodge` on their database; what it answers in JSON. It must succeed."""
        environ = {**self._environ, "GATELODGE_DATABASE": self.database}
        done = run_command(*args, "--json", data=self.root / "commands", environ=environ)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def _say(begun: float, text: str) -> None:
    print(f"{time.monotonic() - begun:6.1f} s  {text}", flush=True)


def _check_clock(begun: float, root: Path) -> None:
    clock = FakeClock()
    with postgres_server(programs=DEBIAN_PROGRAMS, clock=clock) as server:
        look = "SELECT current_setting('server_version_num')::int / 10000, extract(epoch FROM now()), date_part('hour', now())"
        clock.set_before_hour(1.5)
        [[version, now, hour]] = server.run_sql(look)
        ahead = float(now) - time.time()
        wait_for("the next hour", lambda: server.run_sql(look)[0][2] != hour, timeout=10)
        _say(begun, f"PostgreSQL {version} of Debian, its clock {ahead:.0f} s ahead, has seen a full hour pass")
        begun_waiting = time.monotonic()
        server.run_sql("SELECT pg_sleep(0.5)")
        assert 0.5 <= time.monotonic() - begun_waiting < 5, "its timers do not run as they should"
    # A program that is shown another time from its start, and while it runs.
    clock.set(86_400)
    with Nodes(root / "clock", f"sqlite:///{root}/clock.db") as nodes:
        node = nodes.add(clock=clock)
        node.start()
        with node.client() as client:
            dates = [client.get("/healthz").headers["date"]]
            clock.set(2 * 86_400)
            wait_for("another date", lambda: client.get("/healthz").headers["date"][:16] != dates[0][:16], timeout=10)
            dates.append(client.get("/healthz").headers["date"])
        _say(begun, f"a node whose clock is a day ahead, then two: {' · '.join(dates)}")


def _check_balancer(begun: float, root: Path) -> None:
    for kind, args in (("TLS", ()), ("plain", ("--behind-proxy", "127.0.0.0/8"))):
        with Nodes(root / kind, f"sqlite:///{root}/{kind}.db") as nodes:
            one, other = nodes.start(2, *args)
            with HaProxy([one.backend, other.backend]) as proxy:
                ready = functools.partial(_is_ready, proxy)
                wait_for("a node behind HAProxy", ready)
                one.kill()
                # At once, before any check has noticed: the connection fails, and another node takes the request.
                assert all(ready() for _ in range(20)), proxy.log()
                one.start()
                other.kill()
                wait_for("the node that came back", ready)
                one.kill()
                wait_for("nobody", functools.partial(_is_not_ready, proxy))
        _say(begun, f"HAProxy before two nodes that speak {kind}: one was killed, and no request failed")


def _is_ready(proxy: HaProxy) -> bool:
    return status_of(proxy.port, "/readyz") == 200


def _is_not_ready(proxy: HaProxy) -> bool:
    return not _is_ready(proxy)


def _check_cluster(begun: float) -> None:
    with PatroniCluster() as cluster:
        _say(begun, f"Patroni: {len(cluster.members)} members, {cluster.leader().name} leads")
        cluster.create("lodge")
        cluster.run_sql("CREATE TABLE seen (number int)", "INSERT INTO seen VALUES (1)", database="lodge")
        for what, harm, cure in (
            ("killed", Member.kill, Member.start),
            ("cut off", Member.partition, Member.heal),
            ("bereft of its PostgreSQL", Member.kill_postgres, None),
        ):
            old = cluster.leader()
            harm(old)
            new, took = cluster.wait_leader(other_than=old)
            assert cluster.run_sql("SELECT number FROM seen", database="lodge") == [["1"]]
            if cure is not None:
                cure(old)
            whole = cluster.wait_whole()
            _say(
                begun, f"{old.name} was {what}: {new.name} leads after {took:.1f} s, and {old.name} follows {whole:.1f} s later"
            )


def main() -> int:
    """Start what needs Debian's packages, one after the other; an exception tells what does not work."""
    begun = time.monotonic()
    root = processes.working_directory("servers")
    _check_clock(begun, root)
    _check_balancer(begun, root)
    _check_cluster(begun)
    return 0


if __name__ == "__main__":
    sys.exit(main())
