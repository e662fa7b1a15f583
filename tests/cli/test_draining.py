"""How a server that is told to stop lets go: readiness first, everything served meanwhile, no connection broken."""

import http.client
import json
import os
import signal
import socket
import threading

import psutil
import pytest
from harness import Server
from outside import PATIENCE, add_partner, bearer, connect, is_closed, log_in, read_answer, until

LONG = {"GATELODGE_DRAIN": "10m"}
"""Nothing that is waited for here is waited for by the clock."""


@pytest.fixture
def draining(tmp_path):
    """Starts servers that drain until they are told again."""
    running = []

    def start(*args, **environ):
        server = Server(tmp_path / "data", *args, environ={**LONG, **environ})
        running.append(server)
        server.start()
        return server

    yield start
    for server in running:
        server.kill()


def told(server):
    """What the processes of a server say that they were told, and what each does then."""
    lines = [json.loads(line) for line in server.log_path.read_text().splitlines() if '"told_to_stop"' in line]
    return [(line["signal"], line["then"]) for line in lines]


def ask(server, path):
    """The answer on a connection of its own: its status, and what it says of the connection."""
    with connect(server) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answer = read_answer(connection)
        return answer.status, answer.headers["connection"]


def ready(server):
    with server.client() as client:
        answer = client.get("/readyz")
    if answer.status_code != 200:
        assert answer.json()["code"] == "about_to_stop"
        assert int(answer.headers["retry-after"]) >= 1
    return answer.status_code == 200


def ended(server):
    """Whether it has ended, sooner than a request under way would be waited for."""
    server.process.wait(timeout=PATIENCE / 2)
    server.process.stdout.close()
    return "Traceback" not in server.log_path.read_text()


def test_readiness_goes_first_and_everything_is_served_meanwhile(draining):
    server = draining()
    partner = add_partner(server.data)
    assert ready(server)
    assert ask(server, "/healthz") == (200, None)
    server.process.send_signal(signal.SIGTERM)
    until(lambda: told(server), "the server drains")
    assert not ready(server)
    assert ask(server, "/healthz") == (200, "close")
    with server.client() as client:
        answer = client.post("/auth/login", json={"apiKey": partner.key})
    assert (answer.status_code, answer.headers["connection"]) == (200, "close")
    assert told(server) == [("SIGTERM", "drain")]
    server.process.send_signal(signal.SIGTERM)
    assert ended(server)
    assert told(server) == [("SIGTERM", "drain"), ("SIGTERM", "stop")]


def test_a_connection_that_is_kept_gets_one_more_answer_which_says_that_it_is_the_last(draining):
    server = draining()
    with connect(server) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_answer(connection).headers["connection"] is None
        server.process.send_signal(signal.SIGTERM)
        until(lambda: told(server), "the server drains")
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        last = read_answer(connection)
        assert (last.status, last.headers["connection"]) == (200, "close")
        assert is_closed(connection)


def test_an_interrupt_from_the_keyboard_does_not_drain(draining):
    server = draining()
    server.process.send_signal(signal.SIGINT)
    assert ended(server)
    assert told(server) == [("SIGINT", "stop")]


def test_the_drain_ends_by_itself_and_what_was_leased_of_a_quota_is_given_back(draining):
    server = draining("--sample-api", GATELODGE_DRAIN="1s")
    partner = add_partner(server.data)
    vin = {"searchCriteria": {"vin": "1HGBH41JXMN109186", "mileage": 55555, "stateShortName": "TX"}}
    server.process.send_signal(signal.SIGTERM)
    until(lambda: told(server), "the server drains")
    with server.client() as client:
        assert client.post("/api/v2/Partners/PlansSearchAsync/VIN", json=vin, headers=bearer(partner.key)).status_code == 200
    assert ended(server)
    assert told(server) == [("SIGTERM", "drain")]
    server.start()
    with server.client() as client:
        usage = client.get("/api/v2/Partners/Register/Usage", headers=bearer(partner.key)).json()
    assert usage["usage"]["day"]["used"] == 1


# --- several workers ------------------------------------------------------------------------------------------------------


def listens(process):
    return any(each.status == psutil.CONN_LISTEN for each in psutil.Process(process.pid).net_connections())


@pytest.mark.parametrize("whom", ["the-parent", "the-group"])
def test_all_workers_drain_whoever_was_told_and_a_second_signal_ends_it(draining, whom):
    server = draining("--workers", "2")
    send = server.process.send_signal if whom == "the-parent" else lambda sign: os.killpg(server.process.pid, sign)
    send(signal.SIGTERM)
    # Each worker hears of it from its parent; if it was told with the whole group before, that is no second signal.
    heard = [("SIGTERM", "drain")] * 2 + [("SIGTERM", "go_on")] * (2 if whom == "the-group" else 0)
    until(lambda: sorted(told(server)) == heard, "both workers drain")
    # The parent has let go of the socket: it closes when the workers close it, and nobody waits in vain.
    assert not listens(server.process)
    for _ in range(20):
        assert not ready(server)
        assert ask(server, "/healthz") == (200, "close")
    server.process.send_signal(signal.SIGTERM)
    assert ended(server)
    assert sorted(told(server)) == sorted([*heard, *[("SIGUSR1", "stop")] * 2])


def test_workers_whose_parent_is_gone_give_the_port_free_at_once(draining):
    server = draining("--workers", "2")
    server.process.send_signal(signal.SIGKILL)
    until(lambda: told(server) == [("SIGUSR1", "stop")] * 2, "both workers stop")
    until(lambda: is_free(server.port), "the port is free")


def is_free(port):
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


# --- under load -----------------------------------------------------------------------------------------------------------


class Caller(threading.Thread):
    """Asks over one connection as fast as it can. When an answer is the last one there it goes to the next server."""

    def __init__(self, servers, credential):
        super().__init__(daemon=True)
        self._servers = list(servers)
        self._credential = credential
        self.answers = 0
        self.faults = []
        self.moved = threading.Event()
        self.over = threading.Event()

    def run(self):
        try:
            while self._servers and not self.over.is_set():
                self._use(self._servers[0])
                self._servers.pop(0)
                self.moved.set()
        except (OSError, http.client.HTTPException) as fault:
            self.faults.append(repr(fault))

    def _use(self, server):
        connection = http.client.HTTPSConnection("127.0.0.1", server.port, context=server.tls(), timeout=PATIENCE)
        try:
            while not self.over.is_set():
                connection.request("GET", "/companies", headers={"R-Auth": self._credential})
                answer = connection.getresponse()
                answer.read()
                if answer.status != 200:
                    self.faults.append(answer.status)
                self.answers += 1
                if answer.headers["connection"] == "close":
                    return
        finally:
            connection.close()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_clients_that_reuse_connections_hard_see_no_broken_one_over_a_restart(tmp_path, workers):
    issuer = "https://localhost:1"
    options = {"environ": {"GATELODGE_DRAIN": "2s"}, "public_url": issuer}
    first = Server(tmp_path / "data", "--workers", workers, **options)
    second = Server(tmp_path / "data", "--workers", workers, **options)
    with first, second:
        partner = add_partner(first.data)
        with first.client() as client:
            session = log_in(client, partner.key)["jwt"]
        callers = [Caller([first, second], session) for _ in range(8)]
        for caller in callers:
            caller.start()
        until(lambda: all(caller.answers > 5 for caller in callers), "all of them are at it")
        first.process.terminate()
        for caller in callers:
            caller.moved.wait(PATIENCE)
        first.process.wait(timeout=PATIENCE)
        before = [caller.answers for caller in callers]
        until(lambda: all(caller.answers > count + 5 for caller, count in zip(callers, before, strict=True)), "they go on")
        for caller in callers:
            caller.over.set()
        for caller in callers:
            caller.join(PATIENCE)
        assert [caller.faults for caller in callers] == [[]] * 8
