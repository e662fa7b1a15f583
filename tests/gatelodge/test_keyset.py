"""Where keys come from: the decisions without I/O, then a real issuer on a loopback socket."""

import asyncio
import contextlib
import json
import logging
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import URLError

import pytest
import trustme
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gatelodge import KeysUnavailable, RemoteKeys, StaticKeys, Verifier, https_fetch
from gatelodge.keyset import JWKS_MAX_BYTES, KeyRing, Known, Pending, Stale, Unknown, read_jwks
from gatelodge.tokens import VerificationKey, generate_private_key, public_jwk

COOLDOWN, MAX_AGE, TIMEOUT = 10.0, 600.0, 5.0
URL = "https://issuer.example/jwks.json"


def jwks(*issuers):
    return json.dumps({"keys": [issuer.jwk for issuer in issuers]}).encode()


class Clock:
    """A monotonic clock that stands still; it can tell that it was read so many times."""

    def __init__(self, now=1000.0):
        self.now = now
        self.reads = 0
        self.alarm = None
        self.rang = threading.Event()

    def __call__(self):
        self.reads += 1
        if self.reads == self.alarm:
            self.rang.set()
        return self.now


def landed():
    """Wait until no fetch is under way any more."""
    for thread in threading.enumerate():
        if thread.name == "gatelodge-keys":
            thread.join()


# --- Static keys ---


def test_static_keys_are_found_by_their_kid(issuer, stranger):
    keys = StaticKeys([issuer.verification_key, stranger.verification_key])
    assert keys.find(issuer.kid) == issuer.verification_key
    assert keys.find("other") is None


async def test_static_keys_are_found_by_coroutines_too(issuer):
    keys = StaticKeys.from_jwks(jwks(issuer))
    assert await keys.find_async(issuer.kid) == issuer.verification_key
    assert await keys.find_async("other") is None


def test_r18_two_keys_of_one_kid_are_refused(issuer, stranger):
    twin = VerificationKey(issuer.kid, "ES256", stranger.key.public_key())
    with pytest.raises(ValueError, match="same kid"):
        StaticKeys([issuer.verification_key, twin])
    with pytest.raises(ValueError, match="same kid"):
        StaticKeys.from_jwks({"keys": [issuer.jwk, issuer.jwk]})


def test_keys_of_kinds_unknown_are_left_out_and_the_others_used(issuer):
    others = [{"kty": "AKP", "alg": "ML-DSA-44", "kid": "pq"}, issuer.jwk | {"use": "enc", "kid": "enc"}]
    assert set(read_jwks({"keys": [*others, issuer.jwk]})) == {issuer.kid}


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b"{}",
        b'{"keys":{}}',
        b'{"keys":[]}',
        b'{"keys":[7]}',
        b'{"keys":[{"kty":"oct","alg":"HS256","kid":"k"}]}',
        b'{"keys":[],"keys":[]}',
        b"\xef\xbb\xbf{}",
        {},
        {"keys": "all"},
    ],
)
def test_a_document_that_is_no_key_set_is_refused(document):
    with pytest.raises(ValueError):
        StaticKeys.from_jwks(document)


def test_r18_a_key_set_that_gives_a_private_key_away_is_refused(issuer):
    for name in ("d", "k"):
        with pytest.raises(ValueError, match="private"):
            read_jwks({"keys": [issuer.jwk | {name: "AA"}]})


# --- The decisions ---


@pytest.fixture
def ring():
    return KeyRing(cooldown=COOLDOWN, max_age=MAX_AGE, flight_limit=TIMEOUT)


def test_the_first_to_ask_launches_and_the_next_waits_along(ring, issuer):
    answer = ring.ask(issuer.kid, 0.0)
    assert isinstance(answer, Pending)
    assert answer.launch is not None
    assert ring.ask(issuer.kid, 1.0) == Pending(None)
    ring.land(answer.launch, {issuer.kid: issuer.verification_key})
    assert ring.ask(issuer.kid, 2.0) == Known(issuer.verification_key, None)
    assert ring.settle(issuer.kid, 2.0) == issuer.verification_key


def test_a_ring_that_never_had_keys_is_stale_while_it_cools_down(ring):
    ring.land(ring.ask("k", 0.0).launch, None)
    for now in [0.0, COOLDOWN - 1, COOLDOWN - 0.001]:
        assert ring.ask("k", now) == Stale()
    assert ring.ask("k", COOLDOWN).launch is not None
    with pytest.raises(KeysUnavailable):
        ring.settle("k", COOLDOWN)


@pytest.fixture
def stocked(ring, issuer):
    ring.land(ring.ask(issuer.kid, 0.0).launch, {issuer.kid: issuer.verification_key})
    return ring


def test_an_unknown_kid_asks_the_issuer_once_in_a_cooldown(stocked):
    for now in [0.0, COOLDOWN - 0.001]:
        assert stocked.ask("forged", now) == Unknown()
    flight = stocked.ask("forged", COOLDOWN).launch
    assert flight is not None
    stocked.land(flight, None)
    for now in [COOLDOWN, 2 * COOLDOWN - 0.001]:
        assert stocked.ask("forged", now) == Unknown()
    assert stocked.ask("forged", 2 * COOLDOWN).launch is not None


def test_a_set_is_refreshed_from_half_its_age_while_it_serves(stocked, issuer):
    key, half = issuer.verification_key, MAX_AGE / 2
    assert stocked.ask(issuer.kid, half - 0.001) == Known(key, None)
    answer = stocked.ask(issuer.kid, half)
    assert answer.key == key
    assert answer.launch is not None
    assert stocked.ask(issuer.kid, half + 1) == Known(key, None)
    stocked.land(answer.launch, None)
    assert stocked.ask(issuer.kid, half + COOLDOWN - 0.001) == Known(key, None)
    assert stocked.ask(issuer.kid, half + COOLDOWN).launch is not None


def test_a_set_serves_until_its_age_and_not_at_it(stocked, issuer):
    for now in [MAX_AGE - 1, MAX_AGE - 0.001]:
        answer = stocked.ask(issuer.kid, now)
        assert answer.key == issuer.verification_key
        assert stocked.settle(issuer.kid, now) == issuer.verification_key
    stocked.land(answer.launch or stocked._launched, None)
    for now in [MAX_AGE, MAX_AGE + 1]:
        assert stocked.ask(issuer.kid, now) == Stale()
        with pytest.raises(KeysUnavailable):
            stocked.settle(issuer.kid, now)


def test_an_age_counts_from_the_launch_and_not_from_the_landing(ring, issuer):
    flight = ring.ask(issuer.kid, 0.0).launch
    ring.land(flight, {issuer.kid: issuer.verification_key})  # whenever that was
    with pytest.raises(KeysUnavailable):
        ring.settle(issuer.kid, MAX_AGE)


def test_a_flight_is_given_up_at_its_limit(issuer):
    ring = KeyRing(cooldown=1.0, max_age=MAX_AGE, flight_limit=TIMEOUT)
    assert ring.ask("k", 0.0).launch is not None
    assert ring.ask("k", TIMEOUT - 0.001) == Pending(None)
    assert ring.ask("k", TIMEOUT).launch is not None


def test_an_older_answer_that_comes_late_changes_nothing(ring, issuer, stranger):
    old = ring.ask("k", 0.0).launch
    new = ring.ask("k", COOLDOWN).launch
    ring.land(new, {stranger.kid: stranger.verification_key})
    ring.land(old, {issuer.kid: issuer.verification_key})
    assert ring.settle(stranger.kid, COOLDOWN) == stranger.verification_key
    assert ring.settle(issuer.kid, COOLDOWN) is None


def test_an_older_answer_that_comes_late_is_better_than_none(ring, issuer):
    old = ring.ask("k", 0.0).launch
    new = ring.ask("k", COOLDOWN).launch
    ring.land(old, {issuer.kid: issuer.verification_key})
    assert ring.ask("other", COOLDOWN) == Pending(None)  # the newer one is still under way
    ring.land(new, None)
    assert ring.settle(issuer.kid, MAX_AGE - 0.001) == issuer.verification_key
    with pytest.raises(KeysUnavailable):
        ring.settle(issuer.kid, MAX_AGE)


@pytest.mark.parametrize("wrong", [{"cooldown": 0.0}, {"max_age": 0.0}, {"flight_limit": 0.0}, {"max_age": -1.0}])
def test_a_ring_without_a_limit_cannot_be_made(wrong):
    with pytest.raises(ValueError, match="positive"):
        KeyRing(**{"cooldown": 1.0, "max_age": 1.0, "flight_limit": 1.0} | wrong)


class AnyOrder(RuleBasedStateMachine):
    """Whatever the order of asking, landing and crashing: what is promised holds."""

    keys = {name: VerificationKey.from_jwk(public_jwk(generate_private_key()) | {"kid": name}) for name in "abc"}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.ring = KeyRing(cooldown=3, max_age=20, flight_limit=5)
        self.now = 0
        self.flights = []
        self.launches = []
        self.applied = None

    @rule(step=st.integers(1, 12))
    def pass_time(self, step):
        self.now += step

    @rule(kid=st.sampled_from("abcx"))
    def ask(self, kid):
        answer = self.ring.ask(kid, self.now)
        if isinstance(answer, Known):
            assert answer.key is self.applied[1][kid]
            assert self.now - self.applied[0].launched_at < 20
        if isinstance(answer, Unknown):
            assert kid not in self.applied[1]
        if isinstance(answer, Stale):
            assert self.applied is None or self.now - self.applied[0].launched_at >= 20
        launch = getattr(answer, "launch", None)
        if launch is not None:
            assert not self.launches or self.now - self.launches[-1].launched_at >= 3
            self.launches.append(launch)
            self.flights.append(launch)

    @precondition(lambda self: self.flights)
    @rule(data=st.data(), names=st.none() | st.sets(st.sampled_from("abc")))
    def land(self, data, names):
        flight = self.flights.pop(data.draw(st.integers(0, len(self.flights) - 1)))
        keys = None if names is None else {name: self.keys[name] for name in names}
        self.ring.land(flight, keys)
        if keys is not None and (self.applied is None or flight.sequence > self.applied[0].sequence):
            self.applied = flight, keys

    @invariant()
    def a_settled_answer_is_the_newest_applied_or_none_at_all(self):
        for kid in "abcx":
            if self.applied is None or self.now - self.applied[0].launched_at >= 20:
                with pytest.raises(KeysUnavailable):
                    self.ring.settle(kid, self.now)
            else:
                assert self.ring.settle(kid, self.now) == self.applied[1].get(kid)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


# --- The driver, over a fetch that the test holds in its hand ---


class Fetches:
    """A fetch whose answers are given one by one; `...` in place of an answer means: wait until released."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.calls = 0
        self.release = threading.Event()
        self.entered = threading.Event()
        self.released = 0

    def __call__(self, url):
        self.calls += 1
        answer = self.answers.pop(0)
        self.entered.set()
        if isinstance(answer, tuple):
            _, answer = answer
            waited_for = self.release.wait(20)
            self.released += 1
            assert waited_for
        if isinstance(answer, Exception):
            raise answer
        return answer


def remote(fetch, clock, **settings):
    return RemoteKeys(
        URL, **{"cooldown": COOLDOWN, "max_age": MAX_AGE, "timeout": TIMEOUT, "fetch": fetch, "clock": clock} | settings
    )


def test_keys_are_fetched_when_first_asked_for_and_then_kept(issuer):
    fetch, clock = Fetches(jwks(issuer)), Clock()
    keys = remote(fetch, clock)
    assert fetch.calls == 0
    for _ in range(3):
        assert keys.find(issuer.kid) == issuer.verification_key
    assert fetch.calls == 1


async def test_keys_are_fetched_for_coroutines_too(issuer):
    fetch = Fetches(jwks(issuer))
    keys = remote(fetch, Clock())
    for _ in range(3):
        assert await keys.find_async(issuer.kid) == issuer.verification_key
    assert fetch.calls == 1


def test_a_new_key_is_found_as_soon_as_a_token_names_it(issuer, stranger):
    fetch, clock = Fetches(jwks(issuer), jwks(issuer, stranger)), Clock()
    keys = remote(fetch, clock)
    assert keys.find(issuer.kid)
    clock.now += COOLDOWN
    assert keys.find(stranger.kid) == stranger.verification_key
    assert fetch.calls == 2


def test_forged_kids_cannot_make_us_flood_the_issuer(issuer):
    fetch, clock = Fetches(*[jwks(issuer)] * 4), Clock()
    keys = remote(fetch, clock)
    for step in range(4):
        for number in range(100):
            assert keys.find(f"forged{number}") is None
        assert fetch.calls == step + 1
        clock.now += COOLDOWN


def test_fifty_threads_share_one_fetch(issuer):
    fetch, clock = Fetches((..., jwks(issuer))), Clock()
    clock.alarm, clock.rang = 50, fetch.release  # released when the fiftieth has asked
    keys, found = remote(fetch, clock, timeout=20.0), []
    threads = [threading.Thread(target=lambda: found.append(keys.find(issuer.kid))) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [issuer.verification_key] * 50
    assert fetch.calls == 1


async def test_fifty_coroutines_share_one_fetch_and_the_loop_runs_on(issuer):
    """If the first to ask blocked the loop, the fiftieth could not ask, and nobody would release the fetch."""
    fetch, clock = Fetches((..., jwks(issuer))), Clock()
    clock.alarm, clock.rang = 50, fetch.release
    keys = remote(fetch, clock, timeout=20.0)
    found = await asyncio.gather(*(keys.find_async(issuer.kid) for _ in range(50)))
    assert found == [issuer.verification_key] * 50
    assert fetch.calls == 1


async def test_threads_and_coroutines_share_one_fetch(issuer):
    fetch, clock = Fetches((..., jwks(issuer))), Clock()
    clock.alarm, clock.rang = 20, fetch.release
    keys = remote(fetch, clock, timeout=20.0)
    finds = [
        asyncio.to_thread(keys.find, issuer.kid) if number % 4 == 0 else keys.find_async(issuer.kid) for number in range(20)
    ]
    assert await asyncio.gather(*finds) == [issuer.verification_key] * 20
    assert fetch.calls == 1


async def test_a_caller_that_is_cancelled_takes_nobody_along(issuer):
    fetch, clock = Fetches((..., jwks(issuer))), Clock()
    keys = remote(fetch, clock, timeout=20.0)
    first, second = (asyncio.create_task(keys.find_async(issuer.kid)) for _ in range(2))
    await asyncio.to_thread(fetch.entered.wait)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    fetch.release.set()
    assert await second == issuer.verification_key
    assert fetch.calls == 1


def test_a_fetch_that_outlives_the_loop_of_its_caller_lands_all_the_same(issuer, caplog):
    fetch, clock = Fetches((..., jwks(issuer))), Clock()
    keys = remote(fetch, clock, timeout=20.0)

    async def ask_and_leave():
        asking = asyncio.create_task(keys.find_async(issuer.kid))
        await asyncio.to_thread(fetch.entered.wait)
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking

    asyncio.run(ask_and_leave())
    fetch.release.set()
    landed()
    assert keys.find(issuer.kid) == issuer.verification_key
    assert fetch.calls == 1
    assert caplog.records == []


@pytest.mark.parametrize("way", ["sync", "async"])
async def test_a_slow_old_answer_never_replaces_a_newer_one(issuer, stranger, way):
    fetch, clock = Fetches((..., jwks(issuer)), jwks(stranger)), Clock()
    keys = remote(fetch, clock, timeout=0.05)
    find = keys.find_async if way == "async" else lambda kid: asyncio.to_thread(keys.find, kid)
    with pytest.raises(KeysUnavailable):
        await find(issuer.kid)
    assert (fetch.calls, fetch.released) == (1, 0)  # given up, though it still hangs
    clock.now += COOLDOWN
    while True:
        with contextlib.suppress(KeysUnavailable):  # a slow machine may need longer than the timeout
            assert await find(stranger.kid) == stranger.verification_key
            break
    fetch.release.set()
    landed()
    assert await find(issuer.kid) is None
    assert await find(stranger.kid) == stranger.verification_key
    assert fetch.calls == 2


def test_a_refresh_keeps_nobody_waiting(issuer, stranger):
    fetch, clock = Fetches(jwks(issuer), (..., jwks(stranger))), Clock()
    keys = remote(fetch, clock)
    keys.find(issuer.kid)
    clock.now += MAX_AGE / 2
    for _ in range(3):
        assert keys.find(issuer.kid) == issuer.verification_key  # the refresh hangs meanwhile
    fetch.release.set()
    landed()
    assert keys.find(issuer.kid) is None  # retired by the issuer, and known to be
    assert keys.find(stranger.kid) == stranger.verification_key
    assert fetch.calls == 2


@pytest.mark.parametrize("fault", [OSError("down"), b"<html>", b'{"keys":[]}', RuntimeError("a bug of the fetch"), "not bytes"])
def test_a_failing_issuer_is_forgiven_until_the_age_is_reached_and_then_nothing_is_believed(issuer, fault, caplog):
    fetch, clock = Fetches(jwks(issuer), *[fault] * 3, jwks(issuer)), Clock()
    keys, begin = remote(fetch, clock), clock.now
    verifier = Verifier(keys, issuer.session_rules, clock=lambda: issuer.now)
    text = issuer.token()
    for clock.now in [begin, begin + MAX_AGE / 2, begin + MAX_AGE - 0.001]:
        assert verifier.verify(text).partner == "acme-motors"
        landed()
    assert fetch.calls == 3
    clock.now = begin + MAX_AGE
    with pytest.raises(KeysUnavailable):  # not even a token that is remembered
        verifier.verify(text)
    assert fetch.calls == 3  # it cools down
    clock.now += COOLDOWN
    with pytest.raises(KeysUnavailable):
        verifier.verify(text)
    clock.now += COOLDOWN
    assert verifier.verify(text).partner == "acme-motors"
    assert fetch.calls == 5
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


@pytest.mark.parametrize(
    ("url", "plain_http", "good"),
    [
        ("https://issuer.example/jwks.json", "never", True),
        ("https://127.0.0.1/jwks.json", "never", True),
        ("http://issuer.example/jwks.json", "never", False),
        ("http://issuer.example/jwks.json", "loopback", False),
        ("http://127.0.0.1:8080/jwks.json", "never", False),
        ("http://127.0.0.1:8080/jwks.json", "loopback", True),
        ("http://127.9.9.9/jwks.json", "loopback", True),
        ("http://[::1]:8080/jwks.json", "loopback", True),
        ("http://localhost/jwks.json", "loopback", True),
        ("http://localhost.example/jwks.json", "loopback", False),
        ("http://10.0.0.1/jwks.json", "loopback", False),
        ("http://0.0.0.0/jwks.json", "loopback", False),
        ("file:///etc/passwd", "loopback", False),
        ("file://localhost/etc/passwd", "loopback", False),
        ("ftp://127.0.0.1/jwks.json", "loopback", False),
        ("data:application/json,{}", "loopback", False),
        ("https:///jwks.json", "never", False),
        ("https://user@issuer.example/jwks.json", "never", False),
        ("https://:secret@issuer.example/jwks.json", "never", False),
        ("https://issuer.example/jwks.json#x", "never", False),
        ("issuer.example/jwks.json", "never", False),
        ("", "never", False),
    ],
)
def test_r3_keys_come_over_https_or_from_this_very_host_if_asked_for(url, plain_http, good):
    if good:
        assert RemoteKeys(url, plain_http=plain_http)
    else:
        with pytest.raises(ValueError, match="issuer's URL"):
            RemoteKeys(url, plain_http=plain_http)


# --- The driver, over a real socket ---


class Origin:
    """An issuer on a loopback socket. `answer` is (status, headers, body); the paths that were asked for are kept."""

    def __init__(self, context=None):
        self.answer = 200, {"Content-Type": "application/jwk-set+json"}, b"{}"
        self.paths = []
        origin = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                origin.paths.append(self.path)
                status, headers, body = origin.answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):
                    for chunk in [body] if isinstance(body, bytes) else body:
                        self.wfile.write(chunk)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if context is not None:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.server.handle_error = lambda *_: None
        scheme = "http" if context is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self.server.server_address[1]}/jwks.json"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def origin():
    with Origin() as origin:
        yield origin


def over_http(origin, **settings):
    return RemoteKeys(origin.url, plain_http="loopback", clock=Clock(), **settings)


@pytest.mark.parametrize("media_type", ["application/jwk-set+json", "application/json", "Application/JSON; charset=utf-8"])
def test_keys_come_over_a_socket(origin, issuer, media_type):
    origin.answer = 200, {"Content-Type": media_type}, jwks(issuer)
    assert over_http(origin).find(issuer.kid) == issuer.verification_key
    assert origin.paths == ["/jwks.json"]


async def test_keys_come_over_tls_from_an_issuer_whose_ca_is_known(issuer):
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with Origin(context) as origin:
        origin.answer = 200, {"Content-Type": "application/json"}, jwks(issuer)
        trusting = ssl.create_default_context()
        authority.configure_trust(trusting)
        keys = RemoteKeys(origin.url, fetch=https_fetch(context=trusting))
        assert await keys.find_async(issuer.kid) == issuer.verification_key
        with pytest.raises(KeysUnavailable):
            await RemoteKeys(origin.url).find_async(issuer.kid)
        assert len(origin.paths) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_r3_a_redirect_is_not_followed(origin, issuer, status):
    with Origin() as other:
        other.answer = 200, {"Content-Type": "application/json"}, jwks(issuer)
        origin.answer = status, {"Location": other.url, "Content-Type": "application/json"}, jwks(issuer)
        with pytest.raises(KeysUnavailable):
            over_http(origin).find(issuer.kid)
        assert other.paths == []


@pytest.mark.parametrize("status", [203, 206, 400, 404, 500, 503])
def test_only_a_200_brings_keys(origin, issuer, status):
    origin.answer = status, {"Content-Type": "application/json"}, jwks(issuer)
    with pytest.raises(KeysUnavailable):
        over_http(origin).find(issuer.kid)


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "text/html"}, {"Content-Type": "text/plain"}])
def test_only_json_brings_keys(origin, issuer, headers):
    origin.answer = 200, headers, jwks(issuer)
    with pytest.raises(KeysUnavailable):
        over_http(origin).find(issuer.kid)


@pytest.mark.parametrize(("surplus", "good"), [(-1, True), (0, True), (1, False)])
def test_a_key_set_has_64_kib_at_most(origin, issuer, surplus, good):
    body = jwks(issuer).ljust(JWKS_MAX_BYTES + surplus)
    origin.answer = 200, {"Content-Type": "application/json"}, body
    keys = over_http(origin)
    if good:
        assert keys.find(issuer.kid) == issuer.verification_key
    else:
        with pytest.raises(KeysUnavailable):
            keys.find(issuer.kid)


def test_an_endless_answer_is_cut_off(origin, issuer):
    def endless():
        while True:
            yield b" " * 4096

    origin.answer = 200, {"Content-Type": "application/json"}, endless()
    with pytest.raises(KeysUnavailable):
        over_http(origin).find(issuer.kid)
    landed()


def test_an_answer_that_drips_is_cut_off_when_its_time_is_over(origin):
    """Each drip comes within the socket's timeout; the sum of them does not."""
    pause = threading.Event()

    def drip():
        while not pause.wait(0.02):
            yield b" "

    origin.answer = 200, {"Content-Type": "application/json"}, drip()
    with pytest.raises(TimeoutError):
        https_fetch(timeout=0.2)(origin.url)
    pause.set()


def test_plain_http_to_this_host_does_not_go_through_a_proxy(origin, issuer, monkeypatch):
    origin.answer = 200, {"Content-Type": "application/json"}, jwks(issuer)
    with Origin() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        assert over_http(origin).find(issuer.kid) == issuer.verification_key
        assert proxy.paths == []


def test_an_issuer_that_is_not_there_is_unavailable():
    with Origin() as origin:
        gone = origin.url
    with pytest.raises(KeysUnavailable):
        RemoteKeys(gone, plain_http="loopback").find("k")


@pytest.mark.parametrize(
    "url", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:application/json,{}", "gopher://127.0.0.1/"]
)
def test_r3_the_fetch_itself_opens_nothing_but_http(url):
    with pytest.raises(URLError, match="unknown url type"):
        https_fetch()(url)
