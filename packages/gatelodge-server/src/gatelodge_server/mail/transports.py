"""Where letters go: to a mail server, or into files while there is none."""

import asyncio
import contextlib
import os
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from gatelodge_server.core.mails import is_final
from gatelodge_server.core.model import Instant
from gatelodge_server.core.secrets import Secret
from gatelodge_server.mail.letters import Letter, Undeliverable, one_line
from gatelodge_server.mail.servers import MailServer, Protection

if TYPE_CHECKING:
    from aiosmtplib import SMTP

_MILLISECONDS: Final = 1000
_FILE: Final = re.compile(r"\.?(?P<moment>\d{8}T\d{6}\.\d{3}Z)-[0-9a-f]{32}\.eml(\.\d+)?", re.ASCII)
_LOGIN_WANTED: Final = 530
"""RFC 4954 section 6."""


class NotTaken(Exception):
    """The letter was not taken this time. The message says why and holds nothing of the letter."""


class NotLoggedIn(NotTaken):
    """The mail server does not know us: no letter will be taken until somebody mends the settings."""


class Transport(Protocol):
    """Takes letters."""

    async def send(self, letter: Letter) -> None:
        """Returns when somebody else answers for the letter. Raises ``Undeliverable`` for good, ``NotTaken`` for now."""
        ...


@dataclass(frozen=True, slots=True)
class Login:
    """Who we are to the mail server."""

    user: str
    password: Secret


@dataclass(frozen=True, slots=True)
class Patience:
    """How many seconds a mail server is given: to connect, for each command, and for a letter altogether."""

    connect: float = 10.0
    command: float = 30.0
    letter: float = 60.0


class SmtpTransport:
    """Hands letters to a mail server, each over a connection of its own.

    ``tls`` is the context for checked certificates (default: the system's authorities). Raises ``ValueError`` if a password
    would go over a wire without checked TLS.
    """

    def __init__(
        self,
        server: MailServer,
        *,
        login: Login | None = None,
        tls: ssl.SSLContext | None = None,
        patience: Patience = Patience(),
    ) -> None:
        if login is not None and server.protection is Protection.OPPORTUNISTIC and not server.is_near:
            raise ValueError("a password is sent over smtp+starttls:// or smtps:// only, or to this machine")
        self._server = server
        self._login = login
        self._tls = tls
        self._patience = patience

    async def send(self, letter: Letter) -> None:
        """Hand a letter over."""
        from aiosmtplib import (  # noqa: PLC0415 - no command hands one over
            SMTPAuthenticationError,
            SMTPDataError,
            SMTPException,
            SMTPRecipientsRefused,
            SMTPSenderRefused,
        )

        client = self._client(letter.sender)
        try:
            async with asyncio.timeout(self._patience.letter):
                await self._hand_over(client, letter)
        except SMTPRecipientsRefused as refusal:
            raise _judged(refusal.recipients[0].code, refusal.recipients[0].message, "RCPT") from refusal
        except SMTPDataError as refusal:
            raise _judged(refusal.code, refusal.message, "DATA") from refusal
        except SMTPAuthenticationError as refusal:
            raise NotLoggedIn(f"{refusal.code} to AUTH: {one_line(refusal.message)}") from refusal
        except SMTPSenderRefused as refusal:
            kind = NotLoggedIn if refusal.code == _LOGIN_WANTED else NotTaken
            raise kind(f"{refusal.code} to MAIL: {one_line(refusal.message)}") from refusal
        except TimeoutError as fault:
            raise NotTaken("the mail server took too long") from fault
        except (SMTPException, OSError) as fault:
            raise NotTaken(one_line(f"{type(fault).__name__}: {fault}")) from fault
        finally:
            client.close()

    async def greet(self, sender: str) -> None:
        """See whether the mail server answers, with TLS where that is asked for. Raises ``NotTaken``. Nothing is sent."""
        from aiosmtplib import SMTPException  # noqa: PLC0415

        client = self._client(sender)
        try:
            async with asyncio.timeout(self._patience.letter):
                await self._meet(client)
                await client.quit()
        except TimeoutError as fault:
            raise NotTaken("the mail server took too long") from fault
        except (SMTPException, OSError) as fault:
            raise NotTaken(one_line(f"{type(fault).__name__}: {fault}")) from fault
        finally:
            client.close()

    def _client(self, sender: str) -> "SMTP":
        from aiosmtplib import SMTP  # noqa: PLC0415

        return SMTP(
            hostname=self._server.host,
            port=self._server.port,
            # RFC 5321 4.1.1.1 wants a name of ours; the one that letters are from is the one that can be looked up.
            local_hostname=sender.rpartition("@")[2],
            timeout=self._patience.command,
            use_tls=self._server.protection is Protection.IMPLICIT,
            start_tls=False,  # said below, where what it depends on can be seen
            tls_context=self._context(),
        )

    async def _meet(self, client: "SMTP") -> None:
        await client.connect(timeout=self._patience.connect)
        await client.ehlo()
        protection = self._server.protection
        if protection is Protection.STARTTLS or (
            protection is Protection.OPPORTUNISTIC and client.supports_extension("starttls")
        ):
            await client.starttls()
            await client.ehlo()

    async def _hand_over(self, client: "SMTP", letter: Letter) -> None:
        await self._meet(client)
        if self._login is not None:
            if not client.supports_extension("auth"):
                raise NotLoggedIn("the mail server takes no login")
            await client.login(self._login.user, self._login.password.reveal())
        options = []
        if letter.needs_utf8:
            if not client.supports_extension("smtputf8"):
                raise Undeliverable("the mail server does not take addresses with other than ASCII letters (SMTPUTF8)")
            options = ["SMTPUTF8", "BODY=8BITMIME"]
        await client.sendmail(letter.sender, [letter.recipient], letter.message, mail_options=options)
        from aiosmtplib import SMTPException  # noqa: PLC0415

        with contextlib.suppress(SMTPException, OSError):
            await client.quit(timeout=1.0)  # the letter has been taken: how we part does not matter

    def _context(self) -> ssl.SSLContext:
        if self._server.protection is not Protection.OPPORTUNISTIC:
            self._tls = self._tls or ssl.create_default_context()
            return self._tls
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context


def _judged(reply: int, message: str, command: str) -> Exception:
    return (Undeliverable if is_final(reply) else NotTaken)(f"{reply} to {command}: {one_line(message)}")


def delete_letters(directory: Path, *, before: Instant) -> None:
    """Delete the files of letters that were made before that moment, and drafts of theirs. Whatever else lies there stays."""
    if not directory.is_dir():
        return
    limit = _moment(before)
    for path in directory.iterdir():
        name = _FILE.fullmatch(path.name)
        if name is not None and name["moment"] < limit:
            with contextlib.suppress(OSError):  # another process may be at it too; what cannot go now goes in a later round
                path.unlink()


def _moment(at: Instant) -> str:
    """An instant as the names of files begin: of two, the lesser is the earlier."""
    seconds, milliseconds = divmod(at, _MILLISECONDS)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y%m%dT%H%M%S}.{milliseconds:03}Z"


class DirectoryTransport:
    """Puts letters into files that mail programs can open, and shows each to whoever watches."""

    def __init__(self, directory: Path, *, show: Callable[[str], None] = lambda _: None) -> None:
        self._directory = directory
        self._show = show

    async def send(self, letter: Letter) -> None:
        """Write a letter: whole and on the disk before it has its name."""
        try:
            await asyncio.to_thread(self._write, letter)
        except OSError as fault:
            raise NotTaken(f"{self._directory}: {fault.strerror}") from fault
        with contextlib.suppress(OSError, ValueError):  # nobody watches any more
            self._show(letter.text)

    def _write(self, letter: Letter) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = f"{_moment(letter.created_at)}-{letter.id.hex()}.eml"
        draft = self._directory / f".{name}.{os.getpid()}"
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(letter.message)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._directory / name)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
