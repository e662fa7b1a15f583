"""Following the feed: one thread, one request at a time, and nothing believed that is too old."""

import asyncio
import gc
import json
import os
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import parse_qs, urlsplit

import pytest

from gatelodge import CredentialRevoked, RemoteRevocations, RevocationsUnavailable, StaticKeys, Verifier
from gatelodge.revocations import JwtMarks, Source

NOW = 1_780_000_000.0
SOURCE = Source("https://issuer.example", "uat")
JWT = JwtMarks(SOURCE, kid="key-1", session="5e55", credential_id="k3y", company=None, partner="acme", epoch=0)
URL = "https://issuer.example/auth/revocations"
PATIENCE = 10


class Clock:
    """Seconds that stand still until they are moved."""

    def __init__(self):
        self.now = 1_000.0

    def __call__(self):
        return self.now


class Issuer:
    """Answers requests when it is let, and remembers what was asked."""

    def __init__(self):
        self.asked = []
        self.entries = []
        self.sequence = 1
        self.fault = None
        self.source = SOURCE
        self.max_staleness = 10
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        self.changed = threading.Condition()
        self.holding = threading.Event()
        self.holding.set()
        self.fetched = threading.Semaphore(0)

    def __call__(self, url):
        query = {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
        with self.lock:
            self.under_way += 1
            self.most_under_way = max(self.under_way, self.most_under_way)
            self.asked.append(query)
        self.fetched.release()
        try:
            assert self.holding.wait(PATIENCE)
            with self.changed:
                # A long poll: until there is something, or for as long as was asked.
                self.changed.wait_for(lambda: self.fault or query.get("after") != f"{self.sequence}.a", float(query["wait"]))
            if self.fault:
                raise self.fault
            begins = query.get("after") is None
            return json.dumps(
                {
                    **self.source._asdict(),
                    "sequence": self.sequence,
                    "position": f"{self.sequence}.a",
                    "reset": begins,
                    "more": False,
                    "maxStaleness": self.max_staleness,
                    "revocations": self.entries,
                }
            ).encode()
        finally:
            with self.lock:
                self.under_way -= 1

    def change(self, fault=None, **entry):
        with self.changed:
            self.fault = fault
            if entry:
                self.sequence += 1
                known = {"sequence": self.sequence, "kind": "session", "subject": "5e55", "code": "credential_revoked"}
                self.entries = [{**known, "endsAt": None, "epoch": None, "until": None, **entry}]
            self.changed.notify_all()

    def wait_for_requests(self, count):
        for _ in range(count):
            assert self.fetched.acquire(timeout=PATIENCE)


@pytest.fixture
def issuer_of_feed():
    return Issuer()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def follow(issuer_of_feed, clock):
    made = []

    def make(**options):
        options = {"fetch": issuer_of_feed, "clock": clock, "wall_clock": lambda: NOW, "cooldown": 0.01, **options}
        made.append(RemoteRevocations(URL, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()
    issuer_of_feed.holding.set()
    issuer_of_feed.change(fault=OSError("over"))
    for one in made:
        if one._thread is not None and one._pid == os.getpid():
            one._thread.join(PATIENCE)


def until(happened):
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def is_let_in(revocations):
    try:
        revocations.check(JWT, NOW)
    except (CredentialRevoked, RevocationsUnavailable) as refused:
        return type(refused)
    return True


def test_the_first_question_waits_for_the_beginning_and_is_answered_by_it(follow, issuer_of_feed):
    revocations = follow()
    assert is_let_in(revocations) is True
    first = issuer_of_feed.asked[0]
    assert first["wait"] == "0.000"
    assert "after" not in first
    assert revocations.sequence == 1


def test_what_is_revoked_is_refused_as_soon_as_the_feed_has_told_it_and_acknowledged_with_the_next_request(
    follow, issuer_of_feed
):
    revocations = follow(name="stock")
    assert is_let_in(revocations) is True
    issuer_of_feed.wait_for_requests(2)
    issuer_of_feed.change(subject="5e55")
    issuer_of_feed.wait_for_requests(1)
    assert is_let_in(revocations) is CredentialRevoked
    assert [one.get("after") for one in issuer_of_feed.asked] == [None, "1.a", "2.a"]
    names = {one["verifier"] for one in issuer_of_feed.asked}
    assert len(names) == 1
    assert names.pop().startswith("stock-")


def test_two_verifiers_have_two_names(follow, issuer_of_feed):
    for _ in range(2):
        follow().check(JWT, NOW)
    assert len({one["verifier"] for one in issuer_of_feed.asked}) == 2


def test_an_issuer_that_was_never_heard_is_believed_nothing(follow, issuer_of_feed):
    issuer_of_feed.fault = ConnectionRefusedError()
    assert is_let_in(follow()) is RevocationsUnavailable


@pytest.mark.parametrize("body", [b"", b"{}", b"<html>"])
def test_an_answer_that_is_none_counts_as_none(follow, body):
    assert is_let_in(follow(fetch=lambda _: body)) is RevocationsUnavailable


@pytest.mark.parametrize(("asked_for", "wait"), [(0.5, "0.150"), (10, "2.500"), (1000, "2.500")])
def test_a_request_waits_for_a_part_of_the_staleness_that_the_issuer_asks_for(follow, issuer_of_feed, asked_for, wait):
    issuer_of_feed.max_staleness = asked_for
    assert is_let_in(follow()) is True
    issuer_of_feed.wait_for_requests(2)
    assert issuer_of_feed.asked[1]["wait"] == wait


@pytest.mark.parametrize(
    "foreign", [SOURCE._replace(issuer="https://other.example"), SOURCE._replace(environment="production")]
)
def test_another_deployments_feed_lets_nobody_in_and_the_log_says_so_once(follow, issuer_of_feed, caplog, foreign):
    issuer_of_feed.source = foreign
    revocations = follow()
    assert [is_let_in(revocations) for _ in range(3)] == [RevocationsUnavailable] * 3
    assert [one.levelname for one in caplog.records] == ["ERROR"]
    assert foreign.issuer in caplog.text


def test_a_feed_that_becomes_another_deployments_is_believed_no_more_and_read_anew(follow, issuer_of_feed):
    revocations = follow()
    assert is_let_in(revocations) is True
    issuer_of_feed.source = SOURCE._replace(issuer="https://other.example")
    issuer_of_feed.change(subject="other")
    until(lambda: is_let_in(revocations) is RevocationsUnavailable)
    until(lambda: sum("after" not in one for one in issuer_of_feed.asked) == 2)
    issuer_of_feed.source = SOURCE
    issuer_of_feed.change(subject="other")
    until(lambda: is_let_in(revocations) is True)


@pytest.mark.parametrize("offset", [-0.001, 0, 0.001])
def test_an_issuer_that_is_heard_no_more_is_believed_until_the_maximum_staleness(follow, issuer_of_feed, clock, offset):
    revocations = follow()
    assert is_let_in(revocations) is True
    issuer_of_feed.change(fault=ConnectionResetError())
    asked = len(issuer_of_feed.asked)
    until(lambda: len(issuer_of_feed.asked) > asked + 1)
    clock.now += 10 + offset
    assert is_let_in(revocations) is (True if offset < 0 else RevocationsUnavailable)
    issuer_of_feed.change(fault=None)
    until(lambda: is_let_in(revocations) is True)


def test_a_process_that_was_frozen_believes_nothing_before_it_has_asked_anew(follow, issuer_of_feed, clock):
    """What was on its way when it froze arrives as it wakes, and is from before."""
    revocations = follow()
    assert is_let_in(revocations) is True
    issuer_of_feed.wait_for_requests(2)
    issuer_of_feed.holding.clear()
    clock.now += 60
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(is_let_in, revocations)
        issuer_of_feed.entries = []
        issuer_of_feed.change()
        # The old answer comes now; the question is not answered with it, but with that of the next request.
        issuer_of_feed.wait_for_requests(1)
        assert not asked.done()
        assert issuer_of_feed.asked[-1]["wait"] == "0.000"
        issuer_of_feed.change(subject="5e55")
        issuer_of_feed.holding.set()
        assert asked.result(PATIENCE) is CredentialRevoked


def test_fifty_who_ask_at_once_make_one_request(follow, issuer_of_feed):
    revocations = follow()
    issuer_of_feed.holding.clear()
    with ThreadPoolExecutor(50) as pool:
        asked = [pool.submit(is_let_in, revocations) for _ in range(50)]
        issuer_of_feed.wait_for_requests(1)
        issuer_of_feed.holding.set()
        assert {one.result(PATIENCE) for one in asked} == {True}
    assert issuer_of_feed.most_under_way == 1
    assert sum("after" not in one for one in issuer_of_feed.asked) == 1


async def test_coroutines_wait_without_holding_up_the_loop_and_one_that_goes_takes_nothing_along(follow, issuer_of_feed):
    revocations = follow()
    issuer_of_feed.holding.clear()
    asked = [asyncio.create_task(revocations.check_async(JWT, NOW)) for _ in range(3)]
    while not issuer_of_feed.asked:
        await asyncio.sleep(0)
    asked[0].cancel()
    issuer_of_feed.holding.set()
    assert await asyncio.gather(*asked[1:]) == [None, None]
    issuer_of_feed.change(subject="5e55")
    await asyncio.to_thread(until, lambda: revocations.sequence == issuer_of_feed.sequence)
    with pytest.raises(CredentialRevoked):
        await revocations.check_async(JWT, NOW)


async def test_coroutines_are_refused_when_nothing_is_heard(follow, issuer_of_feed):
    issuer_of_feed.fault = OSError("nobody there")
    with pytest.raises(RevocationsUnavailable):
        await follow().check_async(JWT, NOW)


def test_an_issuer_that_does_not_answer_is_not_asked_all_the_time(follow, issuer_of_feed):
    issuer_of_feed.fault = OSError("nobody there")
    revocations = follow(cooldown=3600.0)
    assert [is_let_in(revocations) for _ in range(5)] == [RevocationsUnavailable] * 5
    assert len(issuer_of_feed.asked) == 1


def test_an_issuer_that_answers_at_once_with_nothing_is_not_asked_all_the_time(follow, issuer_of_feed):
    """As one does that is about to stop."""
    nothing = json.dumps(
        {
            **SOURCE._asdict(),
            "sequence": 1,
            "position": "1.a",
            "reset": False,
            "more": False,
            "maxStaleness": 10,
            "revocations": [],
        }
    ).encode()
    asked = []
    thrice = threading.Event()

    def fetch(url):
        asked.append(url)
        if len(asked) > 2:
            thrice.set()
        return nothing

    revocations = follow(fetch=fetch, cooldown=3600.0)
    revocations.check(JWT, NOW)
    assert not thrice.wait(0.2)
    assert len(asked) == 2


def test_one_that_is_closed_asks_no_more_and_believes_nothing_when_that_is_old(follow, issuer_of_feed, clock):
    revocations = follow()
    assert is_let_in(revocations) is True
    revocations.close()
    issuer_of_feed.change(subject="other")
    revocations._thread.join(PATIENCE)
    assert is_let_in(revocations) is True
    clock.now += 10
    assert is_let_in(revocations) is RevocationsUnavailable


def test_it_follows_before_anybody_asks_once_it_is_started(follow, issuer_of_feed):
    follow().start()
    issuer_of_feed.wait_for_requests(2)


def test_it_follows_through_a_with_block_and_no_longer(issuer_of_feed):
    with RemoteRevocations(URL, fetch=issuer_of_feed) as revocations:
        issuer_of_feed.wait_for_requests(2)
    issuer_of_feed.change(subject="other")
    revocations._thread.join(PATIENCE)
    assert not revocations._thread.is_alive()


def test_one_that_nobody_holds_any_more_follows_no_more(issuer_of_feed):
    """With the request that was under way it is gone, thread and all."""
    revocations = RemoteRevocations(URL, fetch=issuer_of_feed)
    assert is_let_in(revocations) is True
    thread, gone = revocations._thread, weakref.ref(revocations)
    issuer_of_feed.wait_for_requests(2)
    del revocations
    issuer_of_feed.change(subject="other")
    thread.join(PATIENCE)
    assert not thread.is_alive()
    gc.collect()
    assert gone() is None


def test_one_that_nobody_holds_while_it_rests_follows_no_more():
    def fetch(_):
        raise OSError("nobody there")

    revocations = RemoteRevocations(URL, fetch=fetch, cooldown=0.05)
    assert is_let_in(revocations) is RevocationsUnavailable
    thread = revocations._thread
    del revocations
    thread.join(PATIENCE)
    assert not thread.is_alive()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_process_that_was_forked_follows_by_itself_and_under_a_name_of_its_own(follow, issuer_of_feed):
    revocations = follow()
    assert is_let_in(revocations) is True
    known = issuer_of_feed.asked[0]["verifier"]
    reader, writer = os.pipe()
    with revocations._lock:  # as some other thread may hold it at that moment
        pid = os.fork()
        if pid == 0:
            signal.alarm(PATIENCE)  # one that hangs ends too
            verdict = b"deaf"
            try:
                asked = len(issuer_of_feed.asked)
                issuer_of_feed.lock = threading.Lock()
                issuer_of_feed.changed = threading.Condition()
                revocations.start()
                until(lambda: len(issuer_of_feed.asked) > asked)
                verdict = b"same" if issuer_of_feed.asked[-1]["verifier"] == known else b"fine"
            finally:
                os.write(writer, verdict)
                os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer)
    with os.fdopen(reader, "rb") as said:
        assert said.read() == b"fine"


@pytest.mark.parametrize(
    "options",
    [{"max_staleness": 0.0}, {"cooldown": 0.0}, {"timeout": -1.0}, {"name": ""}, {"name": "x" * 31}, {"name": "a b"}],
)
def test_options_that_make_no_sense_are_told(options):
    with pytest.raises(ValueError):
        RemoteRevocations(URL, **options)


@pytest.mark.parametrize("url", ["http://issuer.example/x", "https://", "https://user@issuer.example/", "ftp://x/"])
def test_only_https_is_followed(url):
    with pytest.raises(ValueError):
        RemoteRevocations(url)


def test_the_real_clock_goes_on(issuer_of_feed):
    revocations = RemoteRevocations(URL, fetch=issuer_of_feed)
    assert is_let_in(revocations) is True
    assert revocations._clock() > 0
    revocations.close()
    issuer_of_feed.change(fault=OSError("over"))
    revocations._thread.join(PATIENCE)


# --- in a verifier ---


class Known:
    """Revocations that are at hand."""

    def __init__(self):
        self.refusal = None
        self.asked = []

    def check(self, jwt, now):
        self.asked.append((jwt, now))
        if self.refusal:
            raise self.refusal

    async def check_async(self, jwt, now):
        self.check(jwt, now)


async def test_a_verifier_asks_for_every_request_also_of_a_jwt_that_it_knows(issuer):
    known = Known()
    verifier = Verifier(
        StaticKeys([issuer.verification_key]), issuer.session_rules, revocations=known, clock=lambda: float(issuer.now)
    )
    jwt = issuer.token(epoch=4)
    for _ in range(2):
        assert verifier.verify(jwt).partner == "acme-motors"
        assert (await verifier.verify_async(jwt)).partner == "acme-motors"
    claims = issuer.claims()
    marks = JwtMarks(
        Source(claims["iss"], claims["env"]), issuer.kid, claims["sid"], claims["client_id"], None, "acme-motors", 4
    )
    assert known.asked == [(marks, issuer.now)] * 4
    for refusal in (CredentialRevoked, RevocationsUnavailable):
        known.refusal = refusal
        with pytest.raises(refusal):
            verifier.verify(jwt)
        with pytest.raises(refusal):
            await verifier.verify_async(jwt)


def test_only_a_genuine_jwts_holder_is_told_that_it_is_revoked(issuer, stranger):
    known = Known()
    known.refusal = CredentialRevoked
    verifier = Verifier(StaticKeys([issuer.verification_key]), issuer.session_rules, revocations=known, clock=lambda: 0.0)
    with pytest.raises(Exception, match="not valid here"):
        verifier.verify(stranger.token())
    assert known.asked == []


def test_a_verifier_with_records_needs_no_revocations_and_takes_none(issuer):
    with pytest.raises(ValueError, match="records"):
        Verifier(StaticKeys([issuer.verification_key]), issuer.session_rules, records=object(), revocations=Known())
