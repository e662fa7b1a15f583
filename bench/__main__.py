"""``python -m bench``: wrk on one core, with PostgreSQL beside it, the server on the other, 64 connections kept alive.

Each figure stands beside two of the same round on the same machine: the same server's constant answer, and the same handler
with its store left out. A rate is judged by the best round, since others may use the machine meanwhile; a ratio by the median.
Nothing is judged by time in the tests; here it is all that is judged.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import httpx2
from rich.console import Console
from rich.table import Table
from tests.postgres import PostgresServer

from bench.overhead import gated, in_process
from bench.servers import LOAD_CORE, PRODUCT, WITHOUT_STORE, YARDSTICK, Running, running
from bench.wrk import CONNECTIONS, Figure, load

PLAIN, BARE, TLS, POSTGRES = "SQLite, durable", "without a store", "SQLite, durable, over TLS", "PostgreSQL, durable"
TARGETS = {PLAIN: (5_000, 0.5), POSTGRES: (8_000, 0.6)}
"""Logins and refreshes a second, and the part of the rate without a store."""
MACHINE = "yardstick: bare uvicorn"
SERVERS = {
    PLAIN: (PRODUCT, True),
    POSTGRES: (PRODUCT, True),
    BARE: (WITHOUT_STORE, True),
    TLS: (PRODUCT, False),
    MACHINE: (YARDSTICK, True),
}
WORKS = {"constant": ("/healthz", "get"), "login": ("/auth/login", "login"), "refresh": ("/auth/refresh", "refresh")}
"""What is asked for, and how: a path, and the name of the load in the script."""


def fresh_tokens(server: Running, key: str, count: int, path: Path, client: httpx2.Client) -> None:
    """Log in so often, and leave the refresh tokens in a file (which is gone with the run)."""
    headers = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "192.0.2.7"}
    answers = [client.post(server.url + "/auth/login", json={"apiKey": key}, headers=headers) for _ in range(count)]
    path.write_text("".join(answer.raise_for_status().json()["refreshToken"] + "\n" for answer in answers))


class Bench:
    """One run. All servers are up and take turns, so that each round compares like with like however the machine drifts."""

    def __init__(self, scratch: Path, *, seconds: float, rounds: int) -> None:
        self._scratch = scratch
        self._seconds = seconds
        self._rounds = rounds
        self._figures: dict[tuple[str, str], list[Figure]] = {}
        self.memory: dict[str, float] = {}

    def run(self) -> None:
        """Start the servers and load each with all that there is, in turns."""
        with ExitStack() as stack:
            database = stack.enter_context(PostgresServer())
            assert database.process is not None
            os.sched_setaffinity(database.process.pid, {LOAD_CORE})
            own = self._scratch / POSTGRES.replace(" ", "-")
            own.mkdir(mode=0o700)
            (own / "gatelodge.toml").write_text(f'database = "{database.create("bench")}"\n')
            keys = {name: _add_partner(self._scratch / name.replace(" ", "-")) for name in SERVERS}
            client = stack.enter_context(httpx2.Client(trust_env=False, verify=False))
            servers = {
                name: stack.enter_context(running(program, self._scratch / name.replace(" ", "-"), plain=plain))
                for name, (program, plain) in SERVERS.items()
            }
            for name, server in servers.items():
                load(server, "/auth/login", seconds=1, LOAD="login", BODY=f'{{"apiKey":"{keys[name]}"}}')
            for _ in range(self._rounds):
                for work in WORKS:
                    for name, server in servers.items():
                        self._figures.setdefault((name, work), []).append(self._measure(server, work, keys[name], client))
            self.memory = {name: server.memory() for name, server in servers.items()}

    def _measure(self, server: Running, work: str, key: str, client: httpx2.Client) -> Figure:
        tokens = self._scratch / "tokens"
        if work == "refresh":
            fresh_tokens(server, key, 2 * CONNECTIONS, tokens, client)
        path, sort = WORKS[work]
        body = f'{{"apiKey":"{key}"}}'
        figure = load(server, path, seconds=self._seconds, LOAD=sort, BODY=body, TOKENS=str(tokens))
        if figure.refused:
            sys.exit(f"{figure.refused} requests of {work} were refused: nothing was measured")
        return figure

    def figure(self, server: str, work: str) -> Figure:
        """The median of the rounds."""
        return sorted(self._figures[server, work], key=lambda figure: figure.rate)[self._rounds // 2]

    def best(self, server: str, work: str) -> float:
        """The highest rate of the rounds."""
        return max(figure.rate for figure in self._figures[server, work])

    def ratio(self, this: tuple[str, str], that: tuple[str, str]) -> float:
        """How one rate stands to another: the median over the rounds, each compared with its own neighbour."""
        pairs = zip(self._figures[this], self._figures[that], strict=True)
        return statistics.median(one.rate / other.rate for one, other in pairs)


def _add_partner(data: Path) -> str:
    command = [*PRODUCT, "partner", "add", "Acme Motors", "--email", "dev@acme.example", "--json", "--data", str(data)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.partition('"apiKey": "')[2].partition('"')[0]


def report(bench: Bench) -> tuple[Table, bool]:
    """The figures side by side; whether the targets are met."""
    table = Table(title="one core, 64 connections, requests a second", title_justify="left", box=None)
    for column in (
        "server",
        "work",
        "median",
        "best",
        "of constant",
        "of no store",
        "of yardstick",
        "median ms",
        "p99 ms",
        "target",
    ):
        table.add_column(column, justify="left" if column in {"server", "work"} else "right")
    met = True
    for server in SERVERS:
        for work in WORKS:
            figure, best = bench.figure(server, work), bench.best(server, work)
            rate, part = TARGETS.get(server, (0, 0.0)) if work != "constant" else (0, 0.0)
            of_bare = bench.ratio((server, work), (BARE, work)) if rate else None
            fine = of_bare is None or (best >= rate and of_bare >= part)
            met = met and fine
            table.add_row(
                server,
                work,
                f"{figure.rate:,.0f}",
                f"{best:,.0f}",
                f"{bench.ratio((server, work), (server, 'constant')):.2f}",
                f"{of_bare:.2f}" if of_bare is not None else "",
                f"{bench.ratio((server, work), (MACHINE, work)):.2f}",
                f"{figure.median_ms:.1f}",
                f"{figure.p99_ms:.1f}",
                f"{'met' if fine else 'MISSED'} (≥ {rate:,}, ≥ {part})" if rate else "",
            )
    return table, met


def main() -> None:
    """Measure, print, and say by the exit code whether the targets are met."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5, help="of each load")
    parser.add_argument("--rounds", type=int, default=3, help="how often each load is run")
    given = parser.parse_args()
    if (os.cpu_count() or 1) <= LOAD_CORE:
        sys.exit("two cores are needed: one for the server, one for the load")
    console = Console(width=150)
    console.print("targets are judged by the best round for a rate or a time, by the median for a ratio\n")
    with tempfile.TemporaryDirectory(prefix="gatelodge-bench-") as scratch:
        bench = Bench(Path(scratch), seconds=given.seconds, rounds=given.rounds)
        bench.run()
    table, met = report(bench)
    console.print(table)
    console.print(f"\nmemory of the worker after the load: {bench.memory[PLAIN]:.0f} MB (target: under 120)\n")
    with tempfile.TemporaryDirectory(prefix="gatelodge-bench-") as scratch:
        gate, gate_met = gated(Path(scratch), seconds=given.seconds, rounds=given.rounds)
    verifier, verifier_met = in_process()
    console.print(gate)
    console.print()
    console.print(verifier)
    sys.exit(0 if met and gate_met and verifier_met and bench.memory[PLAIN] < 120 else 1)


if __name__ == "__main__":
    main()
