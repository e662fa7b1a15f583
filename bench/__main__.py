"""``python -m bench``: wrk on one core, the server on the other, 64 connections kept alive.

Each figure is the median of several runs, and stands beside two of the same run on the same machine: the same server's constant
answer, and the same handler with its store left out. Nothing is judged by time in the tests; here it is all that is judged.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx2
from rich.console import Console
from rich.table import Table

from bench.servers import LOAD_CORE, PRODUCT, WITHOUT_STORE, Running, running
from gatelodge.keyset import StaticKeys
from gatelodge.tokens import TokenRules, VerificationKey, generate_private_key, public_jwk, sign_token
from gatelodge.verify import Verifier

CONNECTIONS = 64
SCRIPT = Path(__file__).with_name("load.lua")


@dataclass(frozen=True, slots=True)
class Figure:
    """What a load came to."""

    rate: float
    median_ms: float
    p99_ms: float
    refused: int


def wrk_program() -> str:
    """Where wrk is; it is installed if that can be done."""
    found = shutil.which("wrk")
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        print("installing wrk (Debian package)", file=sys.stderr)
        subprocess.run(["apt-get", "install", "--yes", "--quiet", "wrk"], check=True, stdout=subprocess.DEVNULL)
        found = shutil.which("wrk")
    if found is None:
        sys.exit("wrk is needed to make load: install it (Debian: apt-get install wrk)")
    return found


def load(server: Running, path: str, *, seconds: float, **environ: str) -> Figure:
    """Load one path for so long."""
    command = [wrk_program(), "-t1", f"-c{CONNECTIONS}", f"-d{seconds:g}s", "-s", str(SCRIPT), server.url + path]
    done = subprocess.run(
        command,
        env={**os.environ, **environ, "TARGET": path},
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {LOAD_CORE}),
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    requests, microseconds, refused, median, p99 = map(int, line.split()[1:])
    return Figure(requests / microseconds * 1e6, median / 1e3, p99 / 1e3, refused)


def fresh_tokens(server: Running, key: str, count: int, path: Path, client: httpx2.Client) -> None:
    """Log in so often, and leave the refresh tokens in a file (which is gone with the run)."""
    headers = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "192.0.2.7"}
    answers = [client.post(server.url + "/auth/login", json={"apiKey": key}, headers=headers) for _ in range(count)]
    path.write_text("".join(answer.raise_for_status().json()["refreshToken"] + "\n" for answer in answers))


class Bench:
    """One run."""

    def __init__(self, scratch: Path, *, seconds: float, rounds: int) -> None:
        self._scratch = scratch
        self._seconds = seconds
        self._rounds = rounds
        self._figures: dict[tuple[str, str], list[Figure]] = {}
        self.memory: dict[str, float] = {}

    def measure(self, name: str, program: tuple[str, ...], *, plain: bool = True) -> None:
        """Start a server and load it with all that there is, in turns."""
        data = self._scratch / name.replace(" ", "-")
        key = _add_partner(data)
        with running(program, data, plain=plain) as server, httpx2.Client(trust_env=False, verify=False) as client:
            tokens = self._scratch / "tokens"
            body = f'{{"apiKey":"{key}"}}'
            load(server, "/auth/login", seconds=1, LOAD="login", BODY=body)
            for _ in range(self._rounds):
                self._add(name, "constant", load(server, "/healthz", seconds=self._seconds, LOAD="get"))
                self._add(name, "login", load(server, "/auth/login", seconds=self._seconds, LOAD="login", BODY=body))
                fresh_tokens(server, key, 2 * CONNECTIONS, tokens, client)
                self._add(
                    name, "refresh", load(server, "/auth/refresh", seconds=self._seconds, LOAD="refresh", TOKENS=str(tokens))
                )
            self.memory[name] = server.memory()

    def _add(self, server: str, work: str, figure: Figure) -> None:
        if figure.refused:
            sys.exit(f"{figure.refused} requests of {work} were refused by the server {server}: nothing was measured")
        self._figures.setdefault((server, work), []).append(figure)

    def figure(self, server: str, work: str) -> Figure:
        """The median of the runs."""
        runs = sorted(self._figures[server, work], key=lambda figure: figure.rate)
        return runs[len(runs) // 2]


def _add_partner(data: Path) -> str:
    command = [*PRODUCT, "partner", "add", "Acme Motors", "--email", "dev@acme.example", "--json", "--data", str(data)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.partition('"apiKey": "')[2].partition('"')[0]


def in_process() -> Table:
    """What the light package costs by itself."""
    key = generate_private_key()
    jwk = public_jwk(key)
    rules = TokenRules.for_sessions(issuer="https://lodge.example", audience="partner-api-uat")
    claims: dict[str, object] = {
        "iss": rules.issuer, "aud": rules.audience, "sub": "acme-motors", "iat": 1, "exp": 4_000_000_000, "jti": "j" * 22,
        "client_id": "c" * 12, "sid": "5" * 32, "env": "uat", "kind": "partner", "partner": "acme-motors", "tier": "starter",
        "scope": "api companies",
    }  # fmt: skip
    token = sign_token(claims, key=key, kid=jwk["kid"], typ="at+jwt")
    keys = StaticKeys([VerificationKey.from_jwk(jwk)])
    seen, unseen = Verifier(keys, rules), Verifier(keys, rules, remembered=0)
    table = Table(title="in process, µs each", title_justify="left", box=None)
    for column in ("what", "µs", "target"):
        table.add_column(column, justify="left" if column == "what" else "right")
    work: list[tuple[str, Callable[[], object], str]] = [
        ("sign a session JWT", lambda: sign_token(claims, key=key, kid=jwk["kid"], typ="at+jwt"), "-"),
        ("verify at first sight", lambda: unseen.verify(token), "≤ 120"),
        ("verify a token seen before", lambda: seen.verify(token), "≤ 3"),
    ]
    for name, call, target in work:
        runs = timeit.repeat(call, number=2000, repeat=7)
        table.add_row(name, f"{statistics.median(runs) / 2000 * 1e6:.1f}", target)
    return table


TARGET_RATE, TARGET_RATIO = 5_000, 0.5
PLAIN, BARE, TLS = "SQLite, durable", "without a store", "SQLite, durable, over TLS"


def report(bench: Bench) -> tuple[Table, bool]:
    """The figures side by side; whether the targets are met."""
    table = Table(title="one core, 64 connections, requests a second", title_justify="left", box=None)
    for column in ("server", "work", "per second", "of constant", "of no store", "median ms", "p99 ms", "target"):
        table.add_column(column, justify="left" if column in {"server", "work"} else "right")
    met = True
    for server in (PLAIN, BARE, TLS):
        for work in ("constant", "login", "refresh"):
            figure = bench.figure(server, work)
            of_constant = figure.rate / bench.figure(server, "constant").rate
            of_bare = figure.rate / bench.figure(BARE, work).rate if server == PLAIN and work != "constant" else None
            judged = of_bare is not None
            fine = not judged or (figure.rate >= TARGET_RATE and (of_bare or 0) >= TARGET_RATIO)
            met = met and fine
            table.add_row(
                server,
                work,
                f"{figure.rate:,.0f}",
                f"{of_constant:.2f}",
                f"{of_bare:.2f}" if of_bare is not None else "",
                f"{figure.median_ms:.1f}",
                f"{figure.p99_ms:.1f}",
                f"{'met' if fine else 'MISSED'} (≥ {TARGET_RATE:,}, ≥ {TARGET_RATIO})" if judged else "",
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
    console = Console(width=140)
    with tempfile.TemporaryDirectory(prefix="gatelodge-bench-") as scratch:
        bench = Bench(Path(scratch), seconds=given.seconds, rounds=given.rounds)
        bench.measure(PLAIN, PRODUCT)
        bench.measure(BARE, WITHOUT_STORE)
        bench.measure(TLS, PRODUCT, plain=False)
    table, met = report(bench)
    console.print(table)
    console.print(f"\nmemory of the worker after the load: {bench.memory[PLAIN]:.0f} MB (target: under 120)\n")
    console.print(in_process())
    sys.exit(0 if met and bench.memory[PLAIN] < 120 else 1)


if __name__ == "__main__":
    main()
