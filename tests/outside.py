"""What the tests of the outside share: commands, raw connections, a proxy that loses answers, a way to wait."""

import contextlib
import http.client
import json
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email import message_from_bytes, policy
from email.message import EmailMessage
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
from click.testing import Result
from harness import Server
from sqlalchemy import Connection, text
from typer.testing import CliRunner

from gatelodge_server.cli import app
from gatelodge_server.settings import load_settings
from gatelodge_server.store.database import database_at

RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
PATIENCE = 20.0
"""Seconds after which something that was waited for is taken not to come."""

_numbers = count(1)


def fresh(what: str = "") -> str:
    """A word that nobody in this process has used before."""
    return f"{what}{os.getpid()}x{next(_numbers)}"


def until(happened: Callable[[], Any], what: str) -> Any:
    """Ask again and again until the answer is true; the answer."""
    deadline = time.monotonic() + PATIENCE
    while True:
        answer = happened()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.02)


# --- commands -------------------------------------------------------------------------------------------------------------


def command(*args: str, data: Path | None = None, environ: Mapping[str, str] | None = None) -> Result:
    """Run a command of `gatelodge`, without the cost of a process of its own."""
    cleared: dict[str, str | None] = {name: None for name in os.environ if name.startswith("GATELODGE_")}
    where = ["--data", str(data)] if data is not None else []
    return CliRunner().invoke(app, [*args, *where], env={**cleared, **(environ or {})})


def ask(*args: str, data: Path, environ: Mapping[str, str] | None = None) -> Any:
    """What a command answers in JSON; it must succeed."""
    done = command(*args, "--json", data=data, environ=environ)
    assert done.exit_code == 0, (args, done.stderr, done.exception)
    return json.loads(done.stdout)


def run_sql(data: Path, statement: str, **values: object) -> list[tuple[Any, ...]]:
    """Run a statement on the database of a deployment, whichever that is, behind its back; the rows that it gives."""

    def verb(connection: Connection) -> list[tuple[Any, ...]]:
        done = connection.execute(text(statement), values)
        return [tuple(row) for row in done] if done.returns_rows else []

    return database_at(load_settings({"data": str(data)}, {}).database).upgrade(verb)


@dataclass(frozen=True)
class Partner:
    """A partner and its API key."""

    id: str
    key: str

    @property
    def key_id(self) -> str:
        return id_of(self.key)


def id_of(key: str) -> str:
    """The public id in an API key."""
    return key.split("_")[3]


def add_partner(data: Path, name: str | None = None, **environ: str) -> Partner:
    """Add a partner whom no other test knows."""
    added = ask("partner", "add", name or fresh("Partner "), "--email", "dev@partner.example", data=data, environ=environ)
    return Partner(added["partnerId"], added["apiKey"])


# --- calls ----------------------------------------------------------------------------------------------------------------


def company(**changes: Any) -> dict[str, Any]:
    """A body for a new company, with a tax number of its own."""
    return {"companyName": "Müller & Söhne GmbH", "country": "DE", "taxNumber": fresh("T"), **changes}


def bearer(credential: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {credential}"}


def r_auth(credential: str) -> dict[str, str]:
    return {"R-Auth": credential}


def log_in(client: httpx2.Client, key: str) -> dict[str, str]:
    """The four fields of a login, which must succeed."""
    answer = client.post("/auth/login", json={"apiKey": key})
    assert answer.status_code == 200, answer.text
    return answer.json()


def refresh(client: httpx2.Client, token: str, **headers: str) -> httpx2.Response:
    return client.post("/auth/refresh", json={"refreshToken": token}, headers=headers)


def create_company(client: httpx2.Client, credential: str, **changes: Any) -> dict[str, str]:
    """The id and the key of a new company."""
    answer = client.post("/companies", json=company(**changes), headers=bearer(credential))
    assert answer.status_code == 201, answer.text
    return answer.json()


def outcome(answer: httpx2.Response) -> tuple[int, str | None]:
    """Status and code of an answer; a refusal must be a problem document that agrees with itself."""
    if answer.status_code < 400:
        return answer.status_code, None
    return answer.status_code, problem(answer)["code"]


def problem(answer: httpx2.Response) -> dict[str, Any]:
    """The problem document of a refusal, once its form is as it must be."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    body = answer.json()
    required = {"type", "title", "status", "detail", "code", "requestId"}
    assert required <= set(body) <= required | {"errors", "violated-policies"}, body
    assert body["status"] == answer.status_code
    assert body["requestId"] == answer.headers["x-request-id"]
    assert answer.headers["cache-control"] == "no-store"
    if answer.status_code == 401:
        assert answer.headers["www-authenticate"].startswith("Bearer ")
    if answer.status_code in {429, 503}:
        assert int(answer.headers["retry-after"]) >= 1
    return body


def whoami(client: httpx2.Client, credential: str) -> tuple[int, str | None]:
    """How a credential is judged at this moment. A company's is known, but may not list companies: 403."""
    return outcome(client.get("/companies", params={"limit": "1"}, headers=r_auth(credential)))


# --- registration ---------------------------------------------------------------------------------------------------------

REGISTER = "/api/v2/Partners/Register"


def registration(to: str, **changes: Any) -> dict[str, Any]:
    """A body for a Register."""
    return {"contactEmail": to, "displayName": "Acme Motors", "agreedToTerms": True, **changes}


def register(client: httpx2.Client, to: str, **changes: Any) -> httpx2.Response:
    return client.post(REGISTER, json=registration(to, **changes))


def mails_to(server: Server, to: str) -> list[EmailMessage]:
    """The mails to an address that lie in the server's outbox, the oldest first."""
    files = sorted((server.data / "outbox").glob("*.eml"))
    read = [message_from_bytes(file.read_bytes(), policy=policy.default) for file in files]
    return [mail for mail in read if mail["To"] == to]


def next_mail_to(server: Server, to: str, count: int) -> EmailMessage:
    """The mail after the first ``count``; it may still be under way."""
    return until(lambda: mails_to(server, to)[count:], f"mail {count + 1} to {to}")[0]


def code_for(server: Server, client: httpx2.Client, to: str, **changes: Any) -> str:
    """Register, and read the code in the mail."""
    count = len(mails_to(server, to))
    answer = register(client, to, **changes)
    assert answer.status_code == 202, answer.text
    return code_in(next_mail_to(server, to, count))


def code_in(mail: EmailMessage) -> str:
    """The code in the text of a mail."""
    part = mail.get_body(("plain",))
    assert part is not None
    return re.findall(r"\b\d{6}\b", part.get_content())[0]


# --- connections ----------------------------------------------------------------------------------------------------------


def connect(server: Server, *, tls: bool = True, source: str | None = None) -> socket.socket:
    """A connection to a server."""
    plain = socket.create_connection(("127.0.0.1", server.port), 30, (source, 0) if source else None)
    return server.tls().wrap_socket(plain, server_hostname="127.0.0.1") if tls else plain


@dataclass(frozen=True)
class RawAnswer:
    """An answer as it came over a raw connection."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes


def read_answer(connection: socket.socket, method: str = "GET") -> RawAnswer:
    """The next answer on a connection."""
    response = http.client.HTTPResponse(connection, method=method)
    try:
        response.begin()
        return RawAnswer(response.status, response.headers, response.read())
    finally:
        response.close()


def exchange(server: Server, request: bytes, *, tls: bool = True) -> RawAnswer:
    """The answer to bytes that no decent client would send."""
    with connect(server, tls=tls) as connection:
        connection.sendall(request)
        return read_answer(connection)


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side hangs up, having said nothing more."""
    try:
        return connection.recv(1) == b""
    except (ConnectionError, ssl.SSLError):
        return True


class LosingProxy:
    """Forwards bytes, until it is told to lose an answer: then it swallows what the server says next, and cuts."""

    def __init__(self, port: int) -> None:
        self._behind = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._losing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def lose_next_answer(self) -> None:
        self._losing.set()

    def _start(self, work: Callable[..., None], *args: socket.socket) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._behind))
                self._start(self._forward, client, server)
                self._start(self._answer, server, client)

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        with server, client, contextlib.suppress(OSError):
            while data := server.recv(65536):
                if self._losing.is_set():
                    self._losing.clear()
                    client.shutdown(socket.SHUT_RDWR)
                    server.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)


@contextlib.contextmanager
def losing_proxy(server: Server) -> Iterator[LosingProxy]:
    proxy = LosingProxy(server.port)
    try:
        yield proxy
    finally:
        proxy.close()


def lose_answer(server: Server, method: str, path: str, body: Any, headers: Mapping[str, str]) -> None:
    """Send a request that the server answers, and whose answer never arrives."""
    with losing_proxy(server) as proxy:
        connection = http.client.HTTPSConnection("127.0.0.1", proxy.port, context=server.tls(), timeout=30)
        try:
            # An exchange that arrives: from here on nothing of the handshake is still on its way.
            connection.request("GET", "/healthz")
            assert connection.getresponse().read()
            proxy.lose_next_answer()
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json", **headers})
            try:
                connection.getresponse()
            except (http.client.HTTPException, OSError):
                return
            raise AssertionError("the answer arrived")
        finally:
            connection.close()
