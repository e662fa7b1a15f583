"""What happens below a request: TLS, plain HTTP, framing, heads without end."""

import json
import socket
import ssl
import threading
import warnings

import psutil
import pytest
from outside import bearer, connect, exchange, fresh, is_closed, log_in, outcome, read_answer, until, whoami

MEGABYTE = 1 << 20


# --- TLS ------------------------------------------------------------------------------------------------------------------


def client_of(version: ssl.TLSVersion, authority) -> ssl.SSLContext:
    """A client that speaks this version and no other, however weak."""
    context = ssl.create_default_context(cafile=str(authority))
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = version
    return context


def speak(context: ssl.SSLContext, port: int) -> str | None:
    """The version of TLS that was agreed upon; ``None`` if none was."""
    try:
        with context.wrap_socket(socket.create_connection(("127.0.0.1", port), 10), server_hostname="127.0.0.1") as secure:
            return secure.version()
    except (ssl.SSLError, ConnectionError):
        return None


@pytest.fixture
def lax_port(server):
    """A port where every version of TLS is taken: what shows that the client could."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.data / "tls" / "server.pem", server.data / "tls" / "server.key")
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            try:
                context.wrap_socket(connection, server_side=True).close()
            except (ssl.SSLError, ConnectionError):
                connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1], ids=["1.0", "1.1"])
def test_r47_old_tls_is_refused(server, lax_port, version):
    context = client_of(version, server.authority)
    assert speak(context, lax_port) in {"TLSv1", "TLSv1.1"}
    assert speak(context, server.port) is None


@pytest.mark.parametrize(
    ("version", "name"), [(ssl.TLSVersion.TLSv1_2, "TLSv1.2"), (ssl.TLSVersion.TLSv1_3, "TLSv1.3")], ids=["1.2", "1.3"]
)
def test_r47_present_tls_is_taken(server, version, name):
    assert speak(client_of(version, server.authority), server.port) == name


def test_the_certificate_is_good_for_the_names_of_this_host_and_not_without_its_authority(server):
    for name in ("localhost", "127.0.0.1", socket.gethostname()):
        with socket.create_connection(("127.0.0.1", server.port), 10) as plain:
            server.tls().wrap_socket(plain, server_hostname=name).close()
    for context, name in ((ssl.create_default_context(), "localhost"), (server.tls(), "elsewhere.example")):
        with socket.create_connection(("127.0.0.1", server.port), 10) as plain, pytest.raises(ssl.SSLCertVerificationError):
            context.wrap_socket(plain, server_hostname=name)


def test_a_connection_that_says_nothing_or_nonsense_keeps_nobody_waiting(server, client):
    silent = [connect(server, tls=False) for _ in range(20)]
    for connection in silent[:10]:
        connection.sendall(b"\x16nonsense")
    assert client.get("/healthz").status_code == 200
    for connection in silent:
        connection.close()
    assert client.get("/healthz").status_code == 200


# --- plain HTTP -----------------------------------------------------------------------------------------------------------


def plain(server, method: str, path: str, credential: str = "", body: bytes = b""):
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    if credential:
        head += f"R-Auth: {credential}\r\n"
    return exchange(server, head.encode() + b"\r\n" + body, tls=False)


@pytest.mark.parametrize("path", ["/companies", "/auth/login", "/docs", "/healthz", "/nowhere", "/.well-known/jwks.json"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_r46_plain_http_is_refused_and_not_redirected(server, partner, method, path):
    answer = plain(server, method, path, partner.key, b"{}")
    assert answer.status == 403
    assert answer.headers["content-type"] == "application/problem+json"
    assert json.loads(answer.body)["code"] == "https_required"
    assert answer.headers["x-request-id"] == json.loads(answer.body)["requestId"]
    assert "location" not in answer.headers
    assert "strict-transport-security" not in answer.headers  # anybody on the way could have written it


def test_r46_plain_http_never_authenticates(server, client, partner):
    opened = server.log_path.read_text().count("session.opened")
    body = json.dumps({"apiKey": partner.key}).encode()
    assert plain(server, "POST", "/auth/login", body=body).status == 403
    assert plain(server, "POST", "/auth/login", body=json.dumps({"apiKey": "x"}).encode()).body.count(b"https_required")
    session = log_in(client, partner.key)
    assert plain(server, "POST", "/auth/logout", session["jwt"]).status == 403
    body = json.dumps({"refreshToken": session["refreshToken"]}).encode()
    assert plain(server, "POST", "/auth/refresh", body=body).status == 403
    assert whoami(client, session["jwt"]) == (200, None)
    assert outcome(client.post("/auth/refresh", json={"refreshToken": session["refreshToken"]})) == (200, None)
    assert server.log_path.read_text().count("session.opened") == opened + 1
    assert partner.key not in server.log_path.read_text()


def test_over_tls_the_browser_is_told_to_stay_there(client):
    assert client.get("/healthz").headers["strict-transport-security"] == "max-age=31536000"
    assert client.get("/healthz").headers["x-content-type-options"] == "nosniff"


# --- framing --------------------------------------------------------------------------------------------------------------

LOGIN = b"POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
MISFRAMED = {
    "length-and-chunked": LOGIN + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG",
    "chunked-and-length": LOGIN + b"Transfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\nG",
    "two-lengths": LOGIN + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} ",
    "list-of-lengths": LOGIN + b"Content-Length: 2, 3\r\n\r\n{} ",
    "negative-length": LOGIN + b"Content-Length: -1\r\n\r\n",
    "signed-length": LOGIN + b"Content-Length: +2\r\n\r\n{}",
    "hexadecimal-length": LOGIN + b"Content-Length: 0x2\r\n\r\n{}",
    "endless-length": LOGIN + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n{}",
    "very-long-length": LOGIN + b"Content-Length: " + b"9" * 6000 + b"\r\n\r\n{}",
    "unknown-transfer": LOGIN + b"Transfer-Encoding: gzip\r\n\r\n{}",
    "chunked-not-last": LOGIN + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "chunked-with-control": LOGIN + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "bad-chunk-size": LOGIN + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n{}\r\n0\r\n\r\n",
    "bad-chunk-end": LOGIN + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}X\r\n0\r\n\r\n",
    "huge-chunk-size": LOGIN + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 20 + b"\r\n{}\r\n0\r\n\r\n",
    "nul-in-a-value": b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-A: a\0b\r\n\r\n",
    "cr-in-a-value": b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-A: a\rb\r\n\r\n",
    "nul-in-a-name": b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-\0A: b\r\n\r\n",
    "space-before-the-colon": b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-A : b\r\n\r\n",
    "folded": b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-A: a\r\n b\r\n\r\n",
    "no-name": b"GET /healthz HTTP/1.1\r\nHost: x\r\n: b\r\n\r\n",
    "space-in-the-path": b"GET /heal thz HTTP/1.1\r\nHost: x\r\n\r\n",
    "nul-in-the-path": b"GET /heal\0thz HTTP/1.1\r\nHost: x\r\n\r\n",
    "not-ascii-in-the-path": b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    "no-path": b"GET HTTP/1.1\r\nHost: x\r\n\r\n",
    "an-old-version": b"GET /healthz HTTP/3.7\r\nHost: x\r\n\r\n",
    "the-preface-of-http-2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no-http": b"\r\n\r\nEHLO me\r\n\r\n",
    "a-tunnel": b"CONNECT elsewhere.example:443 HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("case", MISFRAMED)
def test_r49_a_request_that_could_be_read_in_two_ways_is_refused_and_the_connection_ends(server, case):
    smuggled = fresh("/smuggled-")
    follows = f"GET {smuggled} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    with connect(server) as connection:
        connection.sendall(MISFRAMED[case] + follows)
        assert read_answer(connection).status == 400
        assert is_closed(connection)
    assert smuggled not in server.log_path.read_text()


def test_well_framed_requests_share_a_connection(server):
    body = b'{"apiKey": "nonsense"}'
    with connect(server) as connection:
        connection.sendall(LOGIN + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert read_answer(connection).status == 401
        connection.sendall(
            LOGIN + b"Transfer-Encoding: chunked\r\n\r\n%x;extension=1\r\n%s\r\n0\r\nTrailer: x\r\n\r\n" % (len(body), body)
        )
        assert read_answer(connection).status == 401
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
        assert [read_answer(connection).status for _ in range(1)] == [200]


def test_a_trailer_is_no_header(server, partner):
    body = json.dumps({"companyName": "x", "country": "DE", "taxNumber": fresh("T")}).encode()
    start = b"POST /companies HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
    chunks = b"\r\n%x\r\n%s\r\n0\r\n" % (len(body), body)
    credential = b"R-Auth: %s\r\n" % partner.key.encode()
    assert exchange(server, start + chunks + credential + b"\r\n").status == 401
    # A second credential there is none either.
    assert exchange(server, start + credential + chunks + b"R-Auth: another\r\n\r\n").status == 201


def test_a_wish_for_another_protocol_is_not_granted(server):
    for upgrade in (b"websocket", b"h2c"):
        head = (
            b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: " + upgrade + b"\r\nSec-WebSocket-Key: x\r\n"
        )
        assert exchange(server, head + b"Sec-WebSocket-Version: 13\r\n\r\n").status == 200


def test_http_1_0_is_answered_and_hung_up(server):
    with connect(server) as connection:
        connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert read_answer(connection).status == 200
        assert is_closed(connection)


# --- heads without end ----------------------------------------------------------------------------------------------------

ENDLESS = {
    "one-header": (b"GET /companies HTTP/1.1\r\nHost: x\r\nR-Auth: ", b"x"),
    "many-headers": (b"GET /companies HTTP/1.1\r\nHost: x\r\n", b"X-A: b\r\n"),
    "path": (b"GET /", b"x"),
    "query": (b"GET /companies?", b"x=y&"),
    "trailers": (LOGIN + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X-A: b\r\n"),
    "one-trailer": (LOGIN + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX-A: ", b"x"),
    "a-chunks-extension": (LOGIN + b"Transfer-Encoding: chunked\r\n\r\n2;x=", b"y"),
}


def flood(server, start: bytes, more: bytes, size: int) -> bytes:
    """Send a head of so many bytes, as far as it is taken; the first bytes of the answer, or nothing if it was cut off."""
    block = more * (16384 // len(more))
    with connect(server) as connection:
        connection.settimeout(10)
        try:
            connection.sendall(start)
            for _ in range(size // len(block)):
                connection.sendall(block)
            return connection.recv(4096)
        except (ConnectionError, ssl.SSLError):
            pass
        try:
            return connection.recv(4096)
        except (ConnectionError, ssl.SSLError):
            return b""


@pytest.mark.parametrize("case", ENDLESS)
def test_r14_a_head_of_ten_megabytes_is_cut_off_and_not_kept(server, case):
    process = psutil.Process(server.process.pid)
    flood(server, *ENDLESS[case], 2 * MEGABYTE)  # whatever is made at first use is there before we look
    grown = []
    for _ in range(3):
        before = process.memory_info().rss
        answer = flood(server, *ENDLESS[case], 10 * MEGABYTE)
        assert answer == b"" or answer.split()[1] in {b"431", b"400", b"413"}
        grown.append(process.memory_info().rss - before)
    # The allocator may take a page for itself now and then; what is kept would be kept each time.
    assert min(grown) < MEGABYTE
    assert sum(grown) < 10 * MEGABYTE


def test_a_head_that_is_too_large_is_told_so(server):
    for path, header in (("/healthz", "x" * 33_000), ("/" + "x" * 33_000, "x")):
        with connect(server) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nX-A: {header}\r\n\r\n".encode())
            assert read_answer(connection).status == 431
            assert is_closed(connection)


@pytest.mark.parametrize("case", ["one-header", "many-headers", "path", "query"])
def test_a_head_that_is_too_large_already_is_not_waited_for(server, case):
    start, more = ENDLESS[case]
    with connect(server) as connection:
        connection.sendall(start)
        for _ in range(5):
            connection.sendall(more * (8192 // len(more)))
        assert read_answer(connection).status == 431


@pytest.mark.parametrize(
    ("request_bytes", "status", "code"),
    [
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, "malformed_request"),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-A: " + b"x" * 33_000 + b"\r\n\r\n", 431, "head_too_large"),
    ],
)
def test_r45_what_is_no_request_is_refused_in_the_form_of_all_refusals(server, request_bytes, status, code):
    answer = exchange(server, request_bytes)
    problem = json.loads(answer.body)
    assert (answer.status, answer.headers["Content-Type"]) == (status, "application/problem+json")
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["requestId"] == answer.headers["X-Request-Id"]


def test_a_head_of_thirty_thousand_bytes_is_taken(server):
    assert exchange(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-A: " + b"x" * 30_000 + b"\r\n\r\n").status == 200


# --- the id of a request --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["a", "A" * 64, "3f1c:9.b_c-D", "01a201bb-1c72-7510-9e07-31eb84392526"])
def test_a_sane_request_id_is_given_back(client, given):
    for path in ("/healthz", "/companies", "/nowhere"):
        assert client.get(path, headers={"X-Request-Id": given}).headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", ["", "A" * 65, "two words", "ü", "<script>", 'quote"', "semi;colon", "new\\nline", "100%"])
def test_any_other_request_id_is_replaced(client, given):
    answer = client.get("/companies", headers={"X-Request-Id": given.encode()})
    assert answer.headers["x-request-id"] not in {given, ""}
    assert outcome(answer) == (401, "credential_required")


def test_every_answer_has_an_id_of_its_own(client):
    answers = [client.get(path) for path in ("/healthz", "/nowhere", "/docs", "/openapi.json", "/companies") * 2]
    answers += [client.delete("/healthz"), client.get("/companies", headers=bearer("nonsense"))]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert all(ids)
    assert len(set(ids)) == len(ids)


def test_a_request_that_stops_half_way_ends_no_other(server, client):
    with connect(server) as connection:
        connection.sendall(LOGIN + b"Content-Length: 100\r\n\r\n{")
        assert client.get("/healthz").status_code == 200
    assert until(lambda: client.get("/healthz").status_code == 200, "it still answers")
