"""Requests that race: with each other over several processes and nodes, and with whatever ends the session that they are about."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Self, TypeAlias

import httpx2
import psutil
import pytest
from harness import Server
from nodes import several_nodes
from outside import (
    add_partner,
    ask,
    company,
    create_company,
    log_in,
    outcome,
    refresh,
    run_sql,
    until,
    whoami,
)
from plans import workers_of

pytestmark = pytest.mark.each_database
WORKERS = {"sqlite": ("--workers", "3"), "postgresql": ()}
"""Three processes of one node, or one of each of two."""
PROCESSES = {"sqlite": 3, "postgresql": 2}
RACERS = 64
MEGABYTE = 1 << 20


Stream: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def race(nodes: Sequence[Server], request: bytes) -> list[bytes]:
    """Send one request over many connections, spread over the nodes and their workers, at the same moment."""
    opened: list[Stream] = []
    try:
        racers = [racer for node in nodes for racer in await spread(opened, node, RACERS // len(nodes))]
        for _, writer in racers:
            writer.write(request)
        return list(await asyncio.gather(*(reader.readuntil(b"\r\n") for reader, _ in racers)))
    finally:
        for _, writer in opened:
            writer.transport.abort()
        await asyncio.gather(*(writer.wait_closed() for _, writer in opened), return_exceptions=True)


async def spread(opened: list[Stream], node: Server, count: int) -> list[Stream]:
    """Open connections until of the last ones every worker has a good share: who takes one is up to the kernel."""
    deadline, tls, workers = time.monotonic() + 60, node.tls(), workers_of(node)
    streams: list[Stream] = []
    while True:
        streams.append(await asyncio.open_connection("127.0.0.1", node.port, ssl=tls))
        opened.append(streams[-1])
        if len(streams) >= count:
            shares = held_by(workers, {writer.get_extra_info("sockname")[1] for _, writer in streams[-count:]})
            if len(shares) == len(workers) and min(shares.values()) >= 4:
                return streams[-count:]
        assert time.monotonic() < deadline, "a worker never gets a connection"


def held_by(workers: list[psutil.Process], ports: set[int]) -> Counter[int]:
    return Counter(
        worker.pid
        for worker in workers
        for connection in worker.net_connections("tcp")
        if connection.raddr and connection.raddr.port in ports
    )


def test_r25_of_64_simultaneous_refreshes_one_wins_and_the_session_is_dead_for_good(tmp_path, database):
    with several_nodes(database, tmp_path / "data", *WORKERS[database]) as server:
        partner = add_partner(server.data)
        workers = [worker for node in server.nodes for worker in workers_of(node)]
        assert len(workers) == PROCESSES[database]
        with server.client() as client:
            spent = [log_in(client, partner.key)]
            spent.append(refresh(client, spent[0]["refreshToken"]).json())
        token = spent[1]["refreshToken"]
        body = b'{"refreshToken":"%s"}' % token.encode()
        head = b"POST /auth/refresh HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        answers = asyncio.run(race(server.nodes, head % len(body) + body))
        assert Counter(line.split()[1] for line in answers) == {b"200": 1, b"401": RACERS - 1}

        for node in server.nodes:
            with node.client() as client:
                assert outcome(refresh(client, token)) == (401, "refresh_token_reused")
                assert whoami(client, spent[1]["jwt"]) == (401, "credential_revoked")
        assert max(worker.memory_info().rss for worker in workers) < 120 * MEGABYTE

        # R26: no process remembers it, the disk does.
        server.kill()
    with Server(tmp_path / "data", port=server.port) as restarted, restarted.client() as client:
        for session in spent:
            assert outcome(refresh(client, session["refreshToken"])) == (401, "refresh_token_reused")
            assert whoami(client, session["jwt"]) == (401, "credential_revoked")
        assert whoami(client, log_in(client, partner.key)["jwt"]) == (200, None)
        assert ended_sessions(restarted) == 1


def ended_sessions(server: Server) -> int:
    return sum(event["action"] == "session.reuse" for event in ask("audit", data=server.data))


class Refresher:
    """Refreshes a session as fast as it can, and keeps everything that it is given."""

    def __init__(self, server: Server, session: dict[str, str]) -> None:
        self.given = [session]
        self.wins: list[float] = []
        self.verdict: tuple[int, str | None] | None = None
        self._client = server.client()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(30)
        self._client.close()

    def _run(self) -> None:
        while True:
            began = time.monotonic()
            answer = refresh(self._client, self.given[-1]["refreshToken"])
            if answer.status_code != 200:
                self.verdict = outcome(answer)
                return
            self.wins.append(began)
            self.given.append(answer.json())


ENDINGS = {
    "logout": "credential_revoked",
    "revoke": "credential_revoked",
    "rotate": "credential_rotated",
    "suspend": "partner_suspended",
    "deactivate": "credential_revoked",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_r27_nothing_that_a_racing_refresh_was_given_outlives_an_acknowledged_end(server, client, partner, heeded, ending):
    session = log_in(client, partner.key)
    commands = {
        "revoke": ("key", "revoke", partner.key_id),
        "rotate": ("key", "rotate", partner.key_id),
        "suspend": ("partner", "suspend", partner.id),
        "deactivate": ("partner", "deactivate", partner.id),
    }
    with Refresher(server, session) as refresher:
        until(lambda: len(refresher.wins) > 5, "some refreshes succeed")
        if ending == "logout":
            answer = client.post("/auth/logout", headers={"R-Auth": session["jwt"]})
            assert outcome(answer) == (204, None)
        else:
            ask(*commands[ending], data=server.data)
        acknowledged = time.monotonic()
    assert max(refresher.wins) < acknowledged
    status = 403 if ending == "suspend" else 401
    assert refresher.verdict == (status, ENDINGS[ending])
    for given in (refresher.given[-1], refresher.given[-2], refresher.given[0]):
        heeded(lambda jwt=given["jwt"]: whoami(client, jwt), (status, ENDINGS[ending]))
        assert outcome(refresh(client, given["refreshToken"])) == (status, ENDINGS[ending])


def test_r27_a_companys_racing_refresh_ends_with_its_company(server, client, partner):
    made = create_company(client, partner.key)
    with Refresher(server, log_in(client, made["apiKey"])) as refresher:
        until(lambda: len(refresher.wins) > 5, "some refreshes succeed")
        deleted = client.delete(f"/companies/{made['companyId']}", headers={"R-Auth": partner.key})
        assert outcome(deleted) == (204, None)
        acknowledged = time.monotonic()
    assert max(refresher.wins) < acknowledged
    assert refresher.verdict == (401, "credential_revoked")
    assert whoami(client, refresher.given[-1]["jwt"]) == (401, "credential_revoked")


def test_an_honest_client_that_refreshes_many_sessions_at_once_loses_none(server, client, partner):
    async def honest() -> list[httpx2.Response]:
        async with server.async_client() as many:
            sessions = [log_in(client, partner.key) for _ in range(16)]
            for _ in range(3):
                answers = await asyncio.gather(
                    *(many.post("/auth/refresh", json={"refreshToken": session["refreshToken"]}) for session in sessions)
                )
                assert {answer.status_code for answer in answers} == {200}
                sessions = [answer.json() for answer in answers]
            return answers

    assert len(asyncio.run(honest())) == 16


def test_of_many_simultaneous_creations_of_one_company_one_wins(server, client, partner):
    body = company()

    async def create() -> list[httpx2.Response]:
        async with server.async_client(headers={"R-Auth": partner.key}) as many:
            return await asyncio.gather(*(many.post("/companies", json=body) for _ in range(20)))

    outcomes = Counter(outcome(answer) for answer in asyncio.run(create()))
    assert outcomes == {(201, None): 1, (409, "company_exists"): 19}


def test_refreshes_leave_one_row_a_session(server, client, partner):
    session = log_in(client, partner.key)
    for _ in range(20):
        session = refresh(client, session["refreshToken"]).json()
    assert run_sql(server.data, "SELECT count(*) FROM session WHERE credential_id = :id", id=partner.key_id) == [(1,)]
