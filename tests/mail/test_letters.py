"""What a letter says, and that nothing a stranger says makes it say more."""

import email
import email.policy
import json
import re
import shlex
from datetime import UTC, datetime
from pathlib import Path

import pytest
from given import START, a_mail
from hypothesis import given
from hypothesis import strategies as st
from smtp import MailHost

from gatelodge_server.core.mails import FACTS, is_final, next_attempt_at
from gatelodge_server.core.model import HOUR, MINUTE, SECOND, MailKind
from gatelodge_server.core.secrets import Secret
from gatelodge_server.mail import letters
from gatelodge_server.mail.letters import Composer, Undeliverable, one_line
from gatelodge_server.mail.transports import MailServer, Protection, SmtpTransport

CODE = "402317"
HOSTILE = [
    "Acme\r\nBcc: victim@example.com",
    "Acme\nRCPT TO:<victim@example.com>",
    "Acme\r\n.\r\nMAIL FROM:<x@example.com>",
    "Acme\u2028Bcc: victim@example.com\u2029\x85\x0b\x0c\x1c\x1d\x1e",
    "Acme\x00\x1b[2J\x9b31m\u202e\ud800",
    "<script>alert(1)</script>&amp;\"'",
    "{{ code }} {% raw %} =?utf-8?q?Bcc:_x?=",
    "https://evil.example/login www.evil.example a@evil.example",
    "x" * 5000,
]
HEADERS = {"From", "To", "Subject", "Date", "Message-ID", "Auto-Submitted", "MIME-Version", "Content-Type"}


def compose(mail, code=CODE, **changes):
    settings = {"sender": "api@gate.example", "public_url": "https://api.gate.example:8443", "environment": "uat"} | changes
    return Composer(**settings).compose(mail, Secret(code) if code is not None else None)


def parsed(letter):
    return email.message_from_bytes(letter.message, policy=email.policy.default)


def parts(letter):
    message = parsed(letter)
    return message.get_body(("plain",)).get_content(), message.get_body(("html",)).get_content()


def filled(kind, text="Acme Motors"):
    return {name: str(START + HOUR) if name.endswith("At") else text for name in FACTS[kind]}


# --- Codes ---


@pytest.mark.parametrize("kind", [MailKind.VERIFICATION, MailKind.RECOVERY])
def test_the_code_stands_once_on_a_line_of_its_own(kind):
    plain, page = parts(compose(a_mail(kind, facts=filled(kind))))
    assert re.findall(r"\b\d{6}\b", plain) == [CODE]
    assert f"Your code is {CODE}" in plain.splitlines()
    assert re.findall(r"\b\d{6}\b", page) == [CODE]
    assert "10 minutes" in plain
    assert "28 May 2026, 20:36:40 UTC" in plain


@pytest.mark.parametrize("recipient", ["dev@acme.example", "o'brien+$(id)@acme.example", "jörg@acme.example"])
def test_the_command_in_it_can_be_copied_into_a_shell(recipient):
    plain, _ = parts(compose(a_mail(recipient=recipient.replace("$(id)", "`id`"))))
    (line,) = [line for line in plain.splitlines() if line.startswith("curl ")]
    curl, url, _, content_type, _, data = shlex.split(line)
    assert (curl, url, content_type) == (
        "curl",
        "https://api.gate.example:8443/api/v2/Partners/Register/Verify",
        "Content-Type: application/json",
    )
    assert json.loads(data) == {"contactEmail": recipient.replace("$(id)", "`id`"), "verificationCode": "THE-CODE"}


@pytest.mark.parametrize("kind", [MailKind.VERIFICATION, MailKind.RECOVERY])
@pytest.mark.parametrize("authority", [None, Path("gatelodge-data/tls/ca.pem"), Path("/srv/o'brien's data/tls/ca.pem")])
def test_the_command_in_it_names_the_authority_that_a_certificate_of_ours_is_of(kind, authority):
    plain, page = parts(compose(a_mail(kind, facts=filled(kind)), authority=authority))
    (line,) = [line for line in plain.splitlines() if line.startswith("curl ")]
    named = [] if authority is None else ["--cacert", str(authority)]
    assert shlex.split(line)[: len(named) + 2] == [
        "curl",
        *named,
        "https://api.gate.example:8443/api/v2/Partners/Register/Verify",
    ]
    assert page.count("--cacert") == len(named) / 2


def test_the_owner_of_an_address_sees_what_was_said_in_their_name():
    for part in parts(compose(a_mail(facts={"displayName": "Acme Motors", "organizationName": "Acme Holding"}))):
        assert "Acme Motors" in part
        assert "Acme Holding" in part
    plain, _ = parts(compose(a_mail(facts={"displayName": "Acme Motors"})))
    assert "Organisation" not in plain


def test_a_recovery_code_comes_with_the_warning_that_the_present_key_will_end():
    for part in parts(compose(a_mail(MailKind.RECOVERY, facts=filled(MailKind.RECOVERY)))):
        assert "your present API key stops working" in " ".join(part.split())


@pytest.mark.parametrize("kind", [MailKind.VERIFICATION, MailKind.RECOVERY])
def test_a_mail_about_a_code_that_is_gone_is_not_written(kind):
    with pytest.raises(Undeliverable):
        compose(a_mail(kind), code=None)


# --- All kinds ---


@pytest.mark.parametrize("kind", list(MailKind))
def test_every_kind_says_what_happened_when_where_and_what_to_do_if_it_was_not_you(kind):
    letter = compose(a_mail(kind, facts=filled(kind)))
    for part in parts(letter):
        assert "28 May 2026, 20:26:40 UTC" in part
        assert "api.gate.example:8443 (uat)" in part
        assert re.search(r"\b[Ii]f\b", part)
        assert "Acme Motors" in part
        assert not re.search(r"{{|}}|{%|None|Undefined", part)
    assert max(map(len, parts(letter)[0].splitlines())) < 998
    assert parsed(letter)["Subject"].isascii()


@pytest.mark.parametrize("kind", [kind for kind in MailKind if "isLast" in FACTS[kind]])
def test_the_last_notice_of_the_hour_says_that_no_more_is_told(kind):
    told = filled(kind)
    for part in parts(compose(a_mail(kind, facts={**told, "isLast": "yes"}))):
        assert "last mail about such things in this hour" in part
    for part in parts(compose(a_mail(kind, facts={name: fact for name, fact in told.items() if name != "isLast"}))):
        assert "last mail" not in part


@pytest.mark.parametrize("kind", list(MailKind))
def test_every_kind_has_facts_a_subject_and_two_templates(kind):
    assert kind in FACTS
    assert kind in letters._SUBJECTS
    templates = Path(letters.__file__).with_name("templates")
    for suffix in ("txt", "html"):
        text = (templates / f"{kind.value}.{suffix}").read_text()
        assert "|safe" not in text.replace(" ", "")
        assert "autoescape" not in text


@pytest.mark.parametrize(("ends_at", "told"), [(START, "at once"), (START - 1, "at once"), (START + 1, "until then both work")])
@pytest.mark.parametrize("kind", [MailKind.KEY_ROTATED, MailKind.TOKEN_ROTATED])
def test_a_rotation_says_how_long_the_old_one_lives(kind, ends_at, told):
    for part in parts(compose(a_mail(kind, facts={**filled(kind), "endsAt": str(ends_at)}))):
        assert told in part


def test_the_same_mail_gives_the_same_letter_on_every_node():
    mail = a_mail()
    assert compose(mail) == compose(mail)
    message = parsed(compose(mail))
    assert message["Message-ID"] == f"<{mail.id.hex()}@gate.example>"
    assert message["Date"].datetime == datetime.fromtimestamp(START / 1000, UTC)
    assert message["Auto-Submitted"] == "auto-generated"
    assert message["From"].addresses[0].addr_spec == "api@gate.example"


def test_a_letter_does_not_show_what_is_in_it():
    assert CODE not in repr(compose(a_mail()))


# --- Strangers ---


@pytest.mark.parametrize("kind", list(MailKind))
@pytest.mark.parametrize("said", HOSTILE, ids=range(len(HOSTILE)))
def test_no_fact_makes_a_header_a_line_or_an_element(kind, said):
    harmless = compose(a_mail(kind, facts=filled(kind)))
    hostile = compose(a_mail(kind, facts=filled(kind, said)))
    assert set(parsed(hostile).keys()) == HEADERS
    assert [part.get_content_type() for part in parsed(hostile).walk()] == ["multipart/alternative", "text/plain", "text/html"]
    for before, after in zip(parts(harmless), parts(hostile), strict=True):
        assert after.count("\n") == before.count("\n")
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202e\ud800]", after.replace("\r\n", "\n"))
    elements = [re.findall(r"<(\w+)", parts(letter)[1]) for letter in (harmless, hostile)]
    assert elements[0] == elements[1]


@pytest.mark.parametrize("said", HOSTILE, ids=range(len(HOSTILE)))
async def test_a_server_sees_one_recipient_and_no_new_header(said):
    facts = {"displayName": said, "organizationName": said}
    with MailHost() as host:
        await SmtpTransport(MailServer(Protection.OPPORTUNISTIC, "127.0.0.1", host.port)).send(compose(a_mail(facts=facts)))
    (received,) = host.received
    assert host.attempts == 1
    assert received.recipients == ["dev@acme.example"]
    assert {name for name in received.message.keys() if not name.startswith("X-")} == HEADERS  # noqa: SIM118 - one for each


@pytest.mark.parametrize(
    "recipient",
    [
        "",
        "dev",
        "dev@",
        "dev@acme.example\r\nBcc: victim@example.com",
        "dev@acme.example\n",
        "dev@acme.example, victim@example.com",
        "dev@acme.example> <victim@example.com",
        "Dev <dev@acme.example>",
        '"dev\r\nBcc: x"@acme.example',
        "dev\x00@acme.example",
        "dev\u2028@acme.example",
        "dev@[127.0.0.1]",
        "dev@acme.example\x85",
    ],
)
def test_an_address_that_is_not_exactly_one_is_not_written_to(recipient):
    with pytest.raises(Undeliverable) as caught:
        compose(a_mail(recipient=recipient))
    assert "\n" not in str(caught.value)


def test_what_somebody_says_who_has_proved_nothing_makes_no_link():
    said = "https://evil.example/login, www.evil.example or a@evil.example"
    for part in parts(compose(a_mail(facts={"displayName": said}))):
        assert "evil.example" not in part
        assert "://evil" not in part.replace("\u2060", "", 0)


@given(st.text())
def test_whatever_is_said_becomes_one_line(said):
    line = one_line(said)
    assert len(line.splitlines()) <= 1
    assert len(line) <= 200
    assert line == one_line(line)
    line.encode("utf-8")


# --- Tries ---


def test_the_wait_between_tries_grows_and_then_stays():
    waits = [next_attempt_at(attempts, now=START) - START for attempts in range(1, 9)]
    assert waits == [5 * SECOND, 15 * SECOND, 45 * SECOND, 2 * MINUTE, 5 * MINUTE, 15 * MINUTE, 15 * MINUTE, 15 * MINUTE]
    assert sum(waits[:5]) < 10 * MINUTE  # a code lives as long


@pytest.mark.parametrize(
    ("reply", "final"), [(421, False), (450, False), (499, False), (500, True), (550, True), (599, True), (600, False)]
)
def test_a_reply_that_says_never_is_final(reply, final):
    assert is_final(reply) is final


@pytest.mark.parametrize("reply", [530, 534, 535, 538])
def test_a_reply_about_our_login_is_not_final(reply):
    assert not is_final(reply)
