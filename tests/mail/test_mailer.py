"""The mailer: what is queued arrives once, whatever a mail server does. Real servers on loopback, and a clock that is moved."""

import asyncio
import contextlib
import os

import pytest
import structlog
from backends import SqliteBackend
from given import AROUND, START, Clock, a_mail
from smtp import DROP, STALL, MailHost, free_port

from gatelodge.errors import Unavailable
from gatelodge_server.core.mails import mail_secret_label
from gatelodge_server.core.model import DAY, HOUR, MINUTE, SECOND, MailKind
from gatelodge_server.core.secrets import Secret
from gatelodge_server.mail.letters import Composer
from gatelodge_server.mail.mailer import AT_ONCE, CLAIM_TTL, Mailer
from gatelodge_server.mail.transports import (
    DirectoryTransport,
    Login,
    MailServer,
    Patience,
    Protection,
    SmtpTransport,
    delete_letters,
)
from gatelodge_server.store.outbox import queue_mail
from gatelodge_server.store.store import SqlStore
from gatelodge_server.vault import MasterKeys, Vault

CODE = "402317"
HASTY = Patience(connect=5.0, command=0.3, letter=5.0)


class FlakyStore(SqlStore):
    """A store that answers so many of the mailer's calls with a fault: it is not there, or has a mistake in it."""

    def __init__(self, driver):
        super().__init__(driver)
        self.failures = 0
        self.fault = Unavailable
        self.settle_failures = 0

    def _fail(self):
        if self.failures:
            self.failures -= 1
            raise self.fault

    async def claim_mails(self, **asked):
        self._fail()
        return await super().claim_mails(**asked)

    async def settle_mail(self, *asked, **more):
        self._fail()
        if self.settle_failures:
            self.settle_failures -= 1
            raise Unavailable
        return await super().settle_mail(*asked, **more)


@pytest.fixture
def backend(tmp_path):
    return SqliteBackend.create(tmp_path)


@pytest.fixture
async def store(backend):
    store = FlakyStore(backend.driver())
    yield store
    await store.close()


@pytest.fixture
async def store_with_clock(backend):
    """The store as a node finds it that shares it with others: it goes by a clock of its own, in which the tests begin."""
    store = SqlStore(backend.driver(), store_now=lambda _: START)
    yield store
    await store.close()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def vault():
    return Vault(MasterKeys((os.urandom(32),)), os.urandom)


@pytest.fixture
def queue(backend, vault):
    """Queue mails with a code, as registration does."""

    async def queue(*mails):
        driver = backend.driver()
        for mail in mails:
            sealed = vault.seal(CODE.encode(), label=mail_secret_label(mail.id))
            await driver.write(queue_mail, mail._replace(sealed=sealed))
        await driver.close()

    return queue


@pytest.fixture
def mailer_for(store, clock, vault):
    def mailer_for(transport, *, store=store, **changes):
        if isinstance(transport, MailHost):
            transport = to(transport)
        composer = Composer(sender="api@gate.example", public_url="https://api.gate.example", environment="uat")
        return Mailer(store=store, transport=transport, composer=composer, sealer=vault, clock=clock, poll=0.02, **changes)

    return mailer_for


@pytest.fixture
def logged():
    with structlog.testing.capture_logs() as events:
        yield events


@pytest.fixture
def state(backend):
    """What the outbox says of its mails: outcome, fault, when due, whether there is still a secret."""

    def state():
        return [
            (outcome, fault, due_at, sealed is not None)
            for outcome, fault, due_at, sealed in backend.rows("outbox", "outcome", "fault", "due_at", "sealed")
        ]

    return state


def to(host, protection=Protection.OPPORTUNISTIC, *, name="localhost", **changes):
    return SmtpTransport(MailServer(protection, name, host.port), **{"patience": HASTY, **changes})


@contextlib.asynccontextmanager
async def running(mailer):
    task = asyncio.create_task(mailer.run())
    try:
        yield task
    finally:
        mailer.stop()
        await task


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def events_of(logged):
    return [event["event"] for event in logged]


# --- Taken ---


async def test_a_mail_arrives_once_and_its_secret_is_gone_from_the_outbox(queue, mailer_for, state, logged):
    mail = a_mail()
    await queue(mail)
    with MailHost() as host:
        mailer = mailer_for(host)
        assert await mailer.drain() == 1
        assert await mailer.drain() == 0
    (received,) = host.received
    assert (received.sender, received.recipients) == ("api@gate.example", ["dev@acme.example"])
    assert received.text.split().count(CODE) == 1
    assert received.message["Message-ID"] == f"<{mail.id.hex()}@gate.example>"
    assert state()[0][0] == "sent"
    assert not state()[0][3]
    assert events_of(logged) == ["mail_sent"]


@pytest.mark.parametrize("wrong", [-HOUR, HOUR])
async def test_p10_a_node_whose_clock_is_wrong_sends_what_lives_and_gives_up_what_is_over(
    store_with_clock, backend, queue, mailer_for, clock, state, wrong
):
    living, over = a_mail(), a_mail(created_at=START - HOUR, expires_at=START)
    await queue(living, over)
    clock.now = START + wrong
    with MailHost() as host:
        assert await mailer_for(host, store=store_with_clock).drain() == 2
    (received,) = host.received
    assert received.message["Message-ID"] == f"<{living.id.hex()}@gate.example>"
    assert sorted(outcome for outcome, *_ in state()) == ["given_up", "sent"]
    assert set(backend.rows("outbox", "ended_at")) == {(START,)}


@pytest.mark.parametrize("wrong", [-HOUR, HOUR])
async def test_p10_a_node_whose_clock_is_wrong_puts_a_mail_off_for_no_longer(
    store_with_clock, queue, mailer_for, clock, state, wrong
):
    await queue(a_mail())
    clock.now = START + wrong
    with MailHost() as host:
        host.rcpt = ["450 4.7.1 Greylisted, come again"]
        await mailer_for(host, store=store_with_clock).drain()
    ((_, _, due_at, _),) = state()
    assert due_at == START + 5 * SECOND


async def test_two_mailers_send_each_mail_once(queue, mailer_for):
    await queue(*(a_mail() for _ in range(20)))
    with MailHost() as host:
        await asyncio.gather(mailer_for(host).drain(), mailer_for(host).drain())
    assert len(host.received) == len({one.message["Message-ID"] for one in host.received}) == 20


async def test_a_wake_is_enough_and_so_is_the_next_look(queue, mailer_for):
    with MailHost() as host:
        async with running(mailer_for(host)):
            await queue(a_mail())
            await until(lambda: len(host.received) == 1)
        slow_to_look = mailer_for(host)
        slow_to_look._poll = 3600
        async with running(slow_to_look):
            await queue(a_mail())
            slow_to_look.wake()
            await until(lambda: len(host.received) == 2)


# --- Deferred ---


async def test_a_server_that_greylists_gets_it_again_after_a_while(queue, mailer_for, clock, state):
    await queue(a_mail())
    with MailHost() as host:
        host.rcpt = ["450 4.7.1 Greylisted, come again", "451 4.7.1 Not yet"]
        mailer = mailer_for(host)
        await mailer.drain()
        assert state() == [(None, "450 to RCPT: 4.7.1 Greylisted, come again", START + 5 * SECOND, True)]
        clock.forward(5 * SECOND - 1)
        assert await mailer.drain() == 0
        clock.forward(1)
        await mailer.drain()
        assert state()[0][2] == clock.now + 15 * SECOND
        clock.forward(15 * SECOND)
        await mailer.drain()
    assert len(host.received) == 1
    assert host.attempts == 3


async def test_a_server_that_is_slow_is_not_waited_for_and_does_not_hold_up_the_rest(queue, mailer_for, state):
    await queue(*(a_mail(recipient=f"p{at}@acme.example", created_at=START - 9 + at) for at in range(6)))
    with MailHost() as host:
        host.rcpt = [STALL, STALL]
        async with running(mailer_for(host)):
            await until(lambda: len(host.received) == 4)
            await until(lambda: sum(fault is not None for _, fault, _, _ in state()) == 2)
    assert {fault for _, fault, _, _ in state() if fault} == {"the mail server took too long"}


async def test_a_server_that_hangs_up_in_the_middle_gets_it_again(queue, mailer_for, clock, state):
    await queue(a_mail())
    with MailHost() as host:
        host.data = [DROP]
        mailer = mailer_for(host)
        await mailer.drain()
        assert state()[0][0] is None
        assert host.received == []
        clock.forward(5 * SECOND)
        await mailer.drain()
    assert len(host.received) == 1


async def test_a_server_that_is_dead_gets_it_when_it_comes_up(queue, mailer_for, clock, state):
    await queue(a_mail())
    host = MailHost(port=free_port())
    mailer = mailer_for(host)
    await mailer.drain()
    assert "refused" in state()[0][1].lower() or "Connect" in state()[0][1]
    clock.forward(5 * SECOND)
    with host:
        await mailer.drain()
    assert len(host.received) == 1


async def test_a_transport_with_a_mistake_in_it_costs_a_try_and_no_more(queue, mailer_for, state):
    class Mistaken:
        async def send(self, letter):
            raise ZeroDivisionError(letter.text)

    await queue(a_mail())
    await mailer_for(Mistaken()).drain()
    assert state() == [(None, "ZeroDivisionError", START + 5 * SECOND, True)]


async def test_the_tries_fit_into_the_life_of_a_code_and_into_that_of_a_notice(queue, mailer_for, clock, state, logged):
    await queue(a_mail(), a_mail(expires_at=START + HOUR))
    mailer = mailer_for(MailHost(port=free_port()))
    tries = []
    while any(outcome is None for outcome, *_ in state()):
        clock.now = min(due_at for outcome, _, due_at, _ in state() if outcome is None)
        tries += [clock.now - START] * await mailer.drain()
    expected = [0, 5 * SECOND, 20 * SECOND, 65 * SECOND, 185 * SECOND, 485 * SECOND]
    assert tries == sorted(expected * 2 + [485 * SECOND + at * 15 * MINUTE for at in (1, 2, 3)])
    assert [(outcome, secret) for outcome, _, _, secret in state()] == [("given_up", False)] * 2
    assert events_of(logged).count("mail_given_up") == 2


# --- Given up ---


@pytest.mark.parametrize("phase", ["rcpt", "data"])
async def test_a_server_that_refuses_for_good_is_not_asked_again(queue, mailer_for, clock, state, phase):
    await queue(a_mail())
    with MailHost() as host:
        setattr(host, phase, ["550 5.1.1 Nobody of this name"])
        mailer = mailer_for(host)
        await mailer.drain()
        clock.forward(9 * MINUTE)
        assert await mailer.drain() == 0
    assert host.received == []
    ((outcome, fault, _, secret),) = state()
    assert (outcome, fault, secret) == ("given_up", f"550 to {phase.upper()}: 5.1.1 Nobody of this name", False)


@pytest.mark.parametrize("offset", AROUND)
async def test_a_mail_whose_time_is_over_is_given_up_unsent(queue, mailer_for, clock, state, offset):
    mail = a_mail()
    await queue(mail)
    clock.now = mail.expires_at + offset
    with MailHost() as host:
        await mailer_for(host).drain()
    assert len(host.received) == (0 if offset >= 0 else 1)
    assert state()[0][0] == ("given_up" if offset >= 0 else "sent")


@pytest.mark.parametrize("changes", [{"recipient": "nobody"}, {"recipient": "a@b.example\r\nRCPT TO:<c@d.example>"}])
async def test_an_address_that_is_none_is_given_up_unsent(queue, mailer_for, state, changes):
    await queue(a_mail(**changes))
    with MailHost() as host:
        await mailer_for(host).drain()
    assert (host.attempts, state()[0][0]) == (0, "given_up")


async def test_a_code_sealed_under_a_key_that_is_gone_is_given_up_and_the_rest_goes_on(backend, queue, mailer_for, state):
    mail = a_mail()
    driver = backend.driver()
    await driver.write(queue_mail, mail._replace(sealed=os.urandom(60)))
    await driver.write(queue_mail, a_mail())
    await driver.close()
    await queue(a_mail())
    with MailHost() as host:
        await mailer_for(host).drain()
    assert len(host.received) == 1
    assert sorted(outcome for outcome, *_ in state()) == ["given_up", "given_up", "sent"]


async def test_letters_beyond_ascii_before_the_at_need_a_server_that_takes_them(queue, mailer_for, state):
    await queue(a_mail(recipient="jörg@acme.example"))
    with MailHost(takes_utf8=False) as host:
        await mailer_for(host).drain()
    assert host.received == []
    assert "SMTPUTF8" in state()[0][1]
    await queue(a_mail(recipient="jörg@bücher.example"))
    with MailHost() as host:
        await mailer_for(host).drain()
    (received,) = host.received
    assert received.recipients == ["jörg@xn--bcher-kva.example"]
    assert "SMTPUTF8" in received.options


async def test_r64_a_domain_beyond_ascii_goes_out_in_its_ascii_form(queue, mailer_for):
    await queue(a_mail(recipient="dev@bücher.example"))
    with MailHost(takes_utf8=False) as host:
        await mailer_for(host).drain()
    (received,) = host.received
    assert received.recipients == ["dev@xn--bcher-kva.example"]
    assert received.message["To"] == "dev@xn--bcher-kva.example"


# --- TLS and logging in ---


@pytest.mark.parametrize(
    ("encryption", "protection"),
    [("starttls", Protection.STARTTLS), ("implicit", Protection.IMPLICIT)],
    ids=["starttls", "smtps"],
)
async def test_a_letter_goes_over_tls_to_a_server_whose_certificate_is_good(queue, mailer_for, encryption, protection):
    await queue(a_mail())
    with MailHost(encryption=encryption, password="hunter2") as host:
        login = Login("api", Secret("hunter2"))
        await mailer_for(to(host, protection, tls=host.trusting(), login=login)).drain()
    (received,) = host.received
    assert received.is_encrypted
    assert received.user == "api"


@pytest.mark.parametrize("wrong", ["authority", "name"])
@pytest.mark.parametrize(
    ("encryption", "protection"),
    [("starttls", Protection.STARTTLS), ("implicit", Protection.IMPLICIT)],
    ids=["starttls", "smtps"],
)
async def test_a_server_whose_certificate_is_not_good_gets_nothing(queue, mailer_for, state, encryption, protection, wrong):
    await queue(a_mail())
    with MailHost(encryption=encryption, name="elsewhere.example" if wrong == "name" else "localhost") as host:
        tls = host.trusting() if wrong == "name" else MailHost().trusting()
        await mailer_for(to(host, protection, tls=tls)).drain()
    assert (host.attempts, host.received) == (0, [])
    ((outcome, fault, _, _),) = state()
    assert outcome is None
    assert "certificate" in fault.lower()


async def test_without_a_context_of_their_own_strict_modes_trust_the_systems_authorities_only(queue, mailer_for, state):
    await queue(a_mail())
    with MailHost(encryption="implicit") as host:
        await mailer_for(to(host, Protection.IMPLICIT)).drain()
    assert host.received == []
    assert "certificate" in state()[0][1].lower()


async def test_a_server_without_starttls_gets_nothing_where_starttls_was_asked_for(queue, mailer_for, state):
    await queue(a_mail())
    with MailHost() as host:
        await mailer_for(to(host, Protection.STARTTLS)).drain()
    assert host.attempts == 0
    assert state()[0][0] is None
    assert "STARTTLS" in state()[0][1]


async def test_where_tls_is_taken_as_it_comes_any_certificate_will_do(queue, mailer_for):
    await queue(a_mail())
    with MailHost(encryption="starttls", name="elsewhere.example") as host:
        await mailer_for(host).drain()
    (received,) = host.received
    assert received.is_encrypted


async def test_a_login_that_is_refused_is_said_aloud_and_tried_again(queue, mailer_for, clock, state, logged):
    await queue(a_mail())
    with MailHost(password="right") as host:
        await mailer_for(to(host, login=Login("api", Secret("hunter2")))).drain()
        assert (host.attempts, host.received) == (0, [])
        assert host.refused_logins > 0
        assert state()[0][0] is None
        assert ("mail_login_refused", "error") in [(event["event"], event["log_level"]) for event in logged]
        clock.forward(5 * SECOND)
        await mailer_for(to(host, login=Login("api", Secret("right")))).drain()
    assert len(host.received) == 1
    assert "hunter2" not in repr(logged) + repr(state())


@pytest.mark.parametrize("password", ["right", None], ids=["a login is wanted", "none is taken"])
async def test_settings_that_do_not_fit_the_server_are_said_aloud_too(queue, mailer_for, state, logged, password):
    await queue(a_mail())
    login = None if password else Login("api", Secret("hunter2"))
    with MailHost(password=password) as host:
        await mailer_for(to(host, login=login)).drain()
    assert state()[0][0] is None
    assert "mail_login_refused" in events_of(logged)


@pytest.mark.parametrize("name", ["mail.example", "10.0.0.1"])
def test_no_transport_is_made_that_would_send_a_password_over_a_wire_without_checked_tls(name):
    with pytest.raises(ValueError, match="password"):
        SmtpTransport(MailServer(Protection.OPPORTUNISTIC, name, 25), login=Login("api", Secret("x")))
    SmtpTransport(MailServer(Protection.OPPORTUNISTIC, "127.0.0.1", 25), login=Login("api", Secret("x")))


# --- Starting, stopping, and a store that is away ---


async def test_what_is_on_its_way_when_the_service_stops_is_finished(queue, mailer_for, state):
    await queue(*(a_mail() for _ in range(AT_ONCE)))
    with MailHost() as host:
        mailer = mailer_for(host)
        async with running(mailer):
            await until(lambda: host.attempts > 0)
    assert {outcome for outcome, *_ in state()} == {"sent"}
    assert len(host.received) == AT_ONCE


async def test_what_takes_longer_than_the_grace_is_cut_off_and_due_again_when_its_claim_lapses(queue, mailer_for, clock, state):
    await queue(a_mail())
    with MailHost() as host:
        host.rcpt = [STALL]
        async with running(mailer_for(to(host, patience=Patience()), grace=0.05)):
            await until(lambda: host.attempts == 1)
        assert state() == [(None, None, START + CLAIM_TTL, True)]
        clock.forward(CLAIM_TTL)
        await mailer_for(host).drain()
    assert len(host.received) == 1


def test_a_claim_outlasts_whatever_a_letter_may_take():
    assert (Patience().letter + 5) * SECOND < CLAIM_TTL


async def test_a_store_that_is_away_is_waited_for(queue, mailer_for, store, state):
    await queue(a_mail())
    with MailHost() as host:
        store.failures = 3
        async with running(mailer_for(host)):
            await until(lambda: host.attempts == 1 or store.failures == 0)
            await until(lambda: state()[0][0] == "sent")
    assert len(host.received) == 1


async def test_a_letter_that_was_taken_while_the_store_is_away_is_not_sent_again(queue, mailer_for, store, state):
    await queue(a_mail())
    with MailHost() as host:
        store.settle_failures = 3
        await mailer_for(host).drain()
    assert (len(host.received), store.settle_failures, state()[0][0]) == (1, 0, "sent")


async def test_a_mistake_in_the_store_ends_nothing(queue, mailer_for, store, clock, state, logged):
    await queue(a_mail())
    store.fault = ZeroDivisionError
    with MailHost() as host:
        mailer = mailer_for(host)
        store.failures = 1
        assert await mailer.drain() == 0
        host.rcpt = [STALL]
        async with running(mailer):
            await until(lambda: host.attempts == 1)
            store.failures = 1_000_000
            await until(lambda: "mail_deferred" in events_of(logged))
            await until(lambda: events_of(logged)[-1] == "mailer_failed")
            store.failures = 0
            clock.forward(CLAIM_TTL)  # nothing could be said of it, so it is due when its claim lapses
            await until(lambda: host.received)
    assert state()[0][0] == "sent"


async def test_no_more_are_on_their_way_at_once_than_may_be(queue, mailer_for, logged, state):
    await queue(*(a_mail() for _ in range(AT_ONCE + 1)))
    with MailHost() as host:
        host.rcpt = [STALL] * AT_ONCE
        mailer = mailer_for(to(host, patience=Patience()), grace=0.0)
        async with running(mailer):
            await until(lambda: host.attempts == AT_ONCE)
            mailer.wake()
            await asyncio.sleep(0)
            assert sum(due_at > START for _, _, due_at, _ in state()) == AT_ONCE
    assert host.received == []


# --- Files ---


async def test_without_a_mail_server_mails_are_kept_in_files_that_only_the_owner_can_read(queue, mailer_for, tmp_path, state):
    shown = []
    mail = a_mail(created_at=START + 7)
    await queue(mail)
    directory = tmp_path / "data" / "outbox"
    mailer = mailer_for(DirectoryTransport(directory, show=shown.append))
    mailer._clock.forward(9)
    await mailer.drain()
    (path,) = directory.iterdir()
    assert path.name == f"20260528T202640.007Z-{mail.id.hex()}.eml"
    assert (path.stat().st_mode & 0o777, directory.stat().st_mode & 0o777) == (0o600, 0o700)
    assert CODE.encode() in path.read_bytes()
    assert shown[0].split().count(CODE) == 1
    assert "To: dev@acme.example" in shown[0]
    assert state()[0][0] == "sent"


async def test_a_directory_that_cannot_be_written_to_costs_a_try(queue, mailer_for, tmp_path, state):
    (tmp_path / "outbox").write_text("in the way")
    await queue(a_mail())
    await mailer_for(DirectoryTransport(tmp_path / "outbox")).drain()
    ((outcome, fault, due_at, secret),) = state()
    assert (outcome, due_at, secret) == (None, START + 5 * SECOND, True)
    assert "File exists" in fault


async def test_a_file_that_cannot_have_its_name_leaves_nothing_behind(queue, mailer_for, tmp_path, state):
    mail = a_mail()
    await queue(mail)
    in_the_way = tmp_path / "outbox" / f"20260528T202640.000Z-{mail.id.hex()}.eml"
    in_the_way.mkdir(parents=True)
    await mailer_for(DirectoryTransport(tmp_path / "outbox")).drain()
    assert list((tmp_path / "outbox").iterdir()) == [in_the_way]
    assert state()[0][0] is None


@pytest.mark.parametrize("offset", AROUND)
async def test_files_that_are_older_than_asked_are_deleted_and_whatever_else_lies_there_stays(
    queue, mailer_for, tmp_path, offset
):
    directory = tmp_path / "outbox"
    delete_letters(directory, before=START)  # there is none yet
    await queue(a_mail(created_at=START + offset))
    mailer = mailer_for(DirectoryTransport(directory))
    mailer._clock.forward(9)
    await mailer.drain()
    (letter,) = directory.iterdir()
    draft = letter.with_name(f".{letter.name}.4711")  # of a process that was killed
    others = [directory / name for name in ("notes.eml", "20200101T000000.000Z.eml", f"{letter.name}.bak", f"my-{letter.name}")]
    for path in (draft, *others):
        path.touch()
    delete_letters(directory, before=START)
    assert set(directory.iterdir()) == {*others, *([letter, draft] if offset >= 0 else [])}


async def test_a_console_that_is_gone_keeps_no_mail_back(queue, mailer_for, tmp_path, state):
    def show(text):
        raise BrokenPipeError

    await queue(a_mail())
    await mailer_for(DirectoryTransport(tmp_path / "outbox", show=show)).drain()
    assert state()[0][0] == "sent"


# --- What gets out ---


async def test_nothing_that_is_logged_or_kept_holds_the_code_even_if_the_server_says_it(
    queue, mailer_for, state, logged, capfd
):
    await queue(*(a_mail() for _ in range(3)))
    with MailHost() as host:
        host.data = [f"554 We do not like {CODE}", f"451 Too many of {CODE}"]
        await mailer_for(host).drain()
    assert [outcome for outcome, *_ in sorted(state(), key=repr)].count("given_up") == 1
    said = repr(logged) + repr(state()) + "".join(capfd.readouterr())
    assert "We do not like …" in said
    assert CODE not in said


@pytest.mark.parametrize("kind", [kind for kind in MailKind if kind not in {MailKind.VERIFICATION, MailKind.RECOVERY}])
async def test_every_notice_can_be_sent(backend, mailer_for, kind):
    facts = {"displayName": "Acme", "partnerId": "acme", "endsAt": str(START + DAY), "startedAt": str(START)}
    driver = backend.driver()
    await driver.write(queue_mail, a_mail(kind, facts=facts))
    await driver.close()
    with MailHost() as host:
        assert await mailer_for(host).drain() == 1
    assert len(host.received) == 1
