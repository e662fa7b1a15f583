"""The sample API behind the gate, called from outside; and servers of several workers, each of which is asked."""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import psutil
from harness import Server
from outside import PATIENCE, REGISTER, ask, bearer, outcome, until

T = TypeVar("T")

SEARCH = "/api/v2/Partners/PlansSearchAsync/VIN"
ASKED = {"searchCriteria": {"vin": "1HGBH41JXMN109186", "mileage": 55555, "stateShortName": "TX"}}
GOOD = (200, None)
EXCEEDED = (429, "quota_exceeded")


# As it is published, but for the address of the API and for the token, which the shell puts in.
SEED = """curl -X POST https://HOST/api/v2/Partners/PlansSearchAsync/VIN \\
-H "Authorization: Bearer $YOUR_ACCESS_TOKEN" \\
-H "Content-Type: application/json" \\
-d '{
"searchCriteria": {
"vin": "1HGBH41JXMN109186",
"mileage": 55555,
"stateShortName": "TX"
}
}'"""


@dataclass(frozen=True)
class Said:
    """What a curl line has printed: status, headers by lower-case name, body."""

    status: int
    headers: dict[str, list[str]]
    body: Any


class Curl:
    """Runs curl lines in a shell, as they are written. What they do not say, whom to trust, stands in curl's own settings."""

    def __init__(self, home: Path) -> None:
        assert shutil.which("curl"), "curl is needed: the published example is a curl command"
        self._home = home

    def __call__(self, line: str, server: Server, token: str = "") -> Said:
        settings = ["silent", "show-error", f'cacert = "{server.authority}"', r'write-out = "\n%{http_code}\n%{header_json}"']
        (self._home / ".curlrc").write_text("\n".join(settings))
        environment = {"PATH": os.environ["PATH"], "CURL_HOME": str(self._home), "YOUR_ACCESS_TOKEN": token}
        script = line.replace("HOST", f"127.0.0.1:{server.port}")
        done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        body, status, headers = done.stdout.split("\n", 2)
        return Said(int(status), json.loads(headers), json.loads(body))


@dataclass(frozen=True)
class Token:
    """An access token and its id."""

    id: str
    text: str


def issue_token(data: Path, partner_id: str) -> Token:
    issued = ask("token", "issue", partner_id, data=data)
    return Token(issued["tokenId"], issued["token"])


def rotate_token(data: Path, token: Token, *args: str) -> Token:
    issued = ask("token", "rotate", token.id, *args, data=data)
    return Token(issued["tokenId"], issued["token"])


def search(
    client: httpx2.Client, credential: str, by: Callable[[str], dict[str, str]] = bearer, **fields: Any
) -> httpx2.Response:
    """The call of the published example, with more fields in its body if any are named."""
    return client.post(SEARCH, json={**ASKED, **fields}, headers=by(credential))


def judged(client: httpx2.Client, credential: str, by: Callable[[str], dict[str, str]] = bearer) -> tuple[int, str | None]:
    """How a credential is judged by the gate."""
    return outcome(search(client, credential, by))


def used(client: httpx2.Client, key: str) -> tuple[int, int]:
    """How many calls the Usage of a partner counts, in its hour and in its day."""
    answer = client.get(f"{REGISTER}/Usage", headers=bearer(key))
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    return usage["hour"]["used"], usage["day"]["used"]


def within_an_hour(measure: Callable[[], T]) -> T:
    """What a measure gives that begins and ends in the same hour by UTC; it is done again if the hour turns meanwhile."""
    while True:
        hour = _hour()
        try:
            measured = measure()
        except AssertionError:
            if _hour() == hour:
                raise
        else:
            if _hour() == hour:
                return measured


def _hour() -> datetime:
    return datetime.now(UTC).replace(minute=0, second=0, microsecond=0)


# --- workers --------------------------------------------------------------------------------------------------------------


def workers_of(server: Server) -> list[psutil.Process]:
    """The processes that serve."""
    assert server.process is not None
    parent = psutil.Process(server.process.pid)
    children = [child for child in parent.children(recursive=True) if "resource_tracker" not in " ".join(child.cmdline())]
    return children or [parent]


def worker_of(client: httpx2.Client, workers: Sequence[psutil.Process]) -> int:
    """The process that answers on a client's only connection: which one takes a connection is up to the kernel."""
    answer = client.get("/healthz")
    port = answer.extensions["network_stream"].get_extra_info("client_addr")[1]
    (pid,) = {
        worker.pid
        for worker in workers
        for connection in worker.net_connections("tcp")
        if connection.raddr and connection.raddr.port == port
    }
    return pid


@contextlib.asynccontextmanager
async def every_node(server: Server) -> AsyncIterator[list[httpx2.AsyncClient]]:
    """An asynchronous client of each node."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(node.async_client()) for node in server.nodes]


@contextlib.contextmanager
def every_worker(server: Server) -> Iterator[list[httpx2.Client]]:
    """A client of each process that serves, on every node, whose one connection stays with it."""
    with contextlib.ExitStack() as stack:
        yield [client for node in server.nodes for client in stack.enter_context(_every_worker_of(node))]


@contextlib.contextmanager
def _every_worker_of(server: Server) -> Iterator[list[httpx2.Client]]:
    workers = workers_of(server)
    one = httpx2.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=None)
    found: dict[int, httpx2.Client] = {}
    with contextlib.ExitStack() as stack:

        def is_whole() -> bool:
            client = server.client(limits=one)
            pid = worker_of(client, workers)
            if pid in found:
                client.close()
            else:
                stack.callback(client.close)
                found[pid] = client
            return len(found) == len(workers)

        until(is_whole, f"each of {len(workers)} workers answers (for {PATIENCE} s)")
        yield list(found.values())
        assert {worker_of(client, workers) for client in found.values()} == set(found), "a connection went elsewhere"
