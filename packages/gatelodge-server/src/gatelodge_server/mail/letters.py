"""Letters: what a mail says, and the message that goes out.

Facts come from strangers: anybody can have a mail sent to any address, with a name of their choice in it. So a fact is one
line without control characters, is escaped in HTML, never reaches a header, and what was said by somebody who has proved
nothing makes no link.
"""

import json
import re
import shlex
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP, SMTPUTF8
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from gatelodge_server.core.mails import CODES, FACTS, IS_LAST
from gatelodge_server.core.model import MINUTE, SECOND, Instant, MailKind
from gatelodge_server.core.ports import Mail
from gatelodge_server.core.secrets import Secret

if TYPE_CHECKING:
    from email_validator import ValidatedEmail
    from jinja2 import Environment

_TEMPLATES: Final = Path(__file__).with_name("templates")
_SUBJECTS: Final[Mapping[MailKind, str]] = {
    MailKind.VERIFICATION: "Your verification code for {host}",
    MailKind.RECOVERY: "Your recovery code for {host}",
    MailKind.SUSPENDED: "Your registration at {host} is suspended",
    MailKind.KEY_ROTATED: "Your API key for {host} was replaced",
    MailKind.KEY_RECOVERED: "Your API key for {host} was replaced by a mailed code",
    MailKind.TOKEN_ROTATED: "Your access token for {host} was replaced",
    MailKind.SESSION_REUSED: "A session at {host} was ended: a refresh token came twice",
    MailKind.DEACTIVATED: "Your access to {host} has ended",
}
"""Made of settings only: no fact goes into a header but the recipient's address."""
_SAID_BY_ANYBODY: Final = frozenset({MailKind.VERIFICATION})
_FACT_LENGTH: Final = 200
_LINE_LENGTH: Final = 998
"""RFC 5322 2.1.1, without the CRLF."""
# Controls, formatting such as U+202E, surrogates, and the separators of lines and paragraphs.
_UNPRINTED: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_MAKES_LINKS: Final = re.compile(r"(?<=\w)([.:/@]+)(?=\w)")
_WORD_JOINER: Final = "\u2060"


class Undeliverable(Exception):
    """This mail will never be delivered. The message says why, in a sentence without secrets."""


@dataclass(frozen=True, slots=True)
class Letter:
    """A message as it goes out, with its envelope (RFC 5321 2.3.1): one sender, one recipient."""

    id: bytes
    created_at: Instant
    sender: str
    recipient: str
    """ASCII unless ``needs_utf8``: then the local part is not (RFC 6531)."""
    needs_utf8: bool
    message: bytes = field(repr=False)
    text: str = field(repr=False)
    """The message for reading."""


def one_line(text: str) -> str:
    """Text from a stranger as one line that can be shown: without controls, at most 200 characters long."""
    printed = "".join(" " if unicodedata.category(character) in _UNPRINTED else character for character in text)
    line = " ".join(printed.split())
    return line if len(line) <= _FACT_LENGTH else line[: _FACT_LENGTH - 1] + "…"


def _without_links(text: str) -> str:
    """The same to the eye; mail programs find no address in it to make a link of."""
    return _MAKES_LINKS.sub(rf"\1{_WORD_JOINER}", text)


def _moment(at: Instant) -> str:
    moment = datetime.fromtimestamp(at // SECOND, UTC)
    return f"{moment.day} {moment:%B %Y, %H:%M:%S} UTC"


def _address(text: str) -> "ValidatedEmail":
    from email_validator import EmailNotValidError, validate_email  # noqa: PLC0415 - as in `Composer._templates`

    try:
        return validate_email(text, check_deliverability=False)
    except EmailNotValidError as fault:
        raise Undeliverable(f"the address cannot be mailed to: {one_line(str(fault))}") from fault


class Composer:
    """Writes letters. ``sender`` is an ASCII address; ``public_url`` and ``environment`` are the deployment's.

    ``authority``: the file with the authority that curl has to be told to trust, if there is one.
    """

    def __init__(self, *, sender: str, public_url: str, environment: str, authority: Path | None = None) -> None:
        self._sender = sender
        self._domain = sender.rpartition("@")[2]
        self._public_url = public_url
        self._environment = environment
        self._host = urlsplit(public_url).netloc
        self._curl = "curl" if authority is None else f"curl --cacert {shlex.quote(str(authority))}"

    @cached_property
    def _templates(self) -> "Environment":
        # Imported with the first letter: every command is put together with a composer, and none of them composes.
        from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape  # noqa: PLC0415

        return Environment(
            loader=FileSystemLoader(_TEMPLATES),
            autoescape=select_autoescape(["html"], default=False),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    def compose(self, mail: Mail, code: Secret | None) -> Letter:
        """Write a mail; the same mail gives the same letter. Raises ``Undeliverable``."""
        if mail.kind in CODES and code is None:
            raise Undeliverable("its code is gone")
        recipient = _address(mail.recipient)
        given = self._given(mail, code)
        message = EmailMessage(policy=SMTP if recipient.ascii_email else SMTPUTF8)
        message["From"] = Address("Gatelodge", addr_spec=self._sender)
        to = f"{recipient.local_part}@{recipient.ascii_domain}"
        message["To"] = Address(username=recipient.local_part, domain=recipient.ascii_domain)
        message["Subject"] = _SUBJECTS[mail.kind].format(host=self._host)
        message["Date"] = datetime.fromtimestamp(mail.created_at // SECOND, UTC)
        message["Message-ID"] = f"<{mail.id.hex()}@{self._domain}>"
        message["Auto-Submitted"] = "auto-generated"  # RFC 3834: nobody answers it by machine
        text = self._templates.get_template(f"{mail.kind.value}.txt").render(given)
        page = self._templates.get_template(f"{mail.kind.value}.html").render(given)
        _set(message, text, "plain")
        message.make_alternative(boundary=f"=_{mail.id.hex()}")
        alternative = EmailMessage(policy=message.policy)
        _set(alternative, page, "html")
        del alternative["MIME-Version"]
        message.attach(alternative)
        return Letter(
            id=mail.id,
            created_at=mail.created_at,
            sender=self._sender,
            recipient=to,
            needs_utf8=recipient.ascii_email is None,
            message=message.as_bytes(),
            text=f"To: {to}\nSubject: {message['Subject']}\n\n{text}",
        )

    def _given(self, mail: Mail, code: Secret | None) -> dict[str, object]:
        given: dict[str, object] = {}
        for name in FACTS[mail.kind]:
            said = one_line(mail.facts.get(name, ""))
            if name.endswith("At"):
                given[name] = _moment(int(said)) if said else ""
            else:
                given[name] = _without_links(said) if mail.kind in _SAID_BY_ANYBODY else said
        at_once = int(mail.facts.get("endsAt", "0")) <= mail.created_at
        body = json.dumps({"contactEmail": mail.recipient, "verificationCode": "THE-CODE"}, ensure_ascii=False)
        return {
            IS_LAST: "",
            **given,
            "end": "at once: it works no more" if at_once else f"{given.get('endsAt')}: until then both work",
            "code": code.reveal() if code is not None else "",
            "minutes": max(1, (mail.expires_at - mail.created_at) // MINUTE),
            "createdAt": _moment(mail.created_at),
            "expiresAt": _moment(mail.expires_at),
            "recipient": mail.recipient,
            "environment": self._environment,
            "host": self._host,
            "publicUrl": self._public_url,
            "curl": self._curl,
            "verifyData": shlex.quote(body),
        }


def _set(message: EmailMessage, text: str, subtype: str) -> None:
    # Plain to read in a file where it can be; otherwise quoted-printable, which every server takes.
    plain = text.isascii() and all(len(line) <= _LINE_LENGTH for line in text.splitlines())
    message.set_content(text, subtype=subtype, charset="utf-8", cte="7bit" if plain else "quoted-printable")
