"""Mail servers for tests: real ones, on loopback, that behave as they are told.

What a server does with the next letters is a list of replies, one for each RCPT or end of DATA, then `250`. Instead of a reply:
``STALL`` (it never comes) and, for DATA, ``DROP`` (the connection is cut in the middle).
"""

import asyncio
import contextlib
import email
import email.policy
import socket
import ssl
import threading
import warnings
from typing import NamedTuple

import trustme
from aiosmtpd.smtp import SMTP, AuthResult, LoginPassword

STALL = "stall"
DROP = "drop"


class Received(NamedTuple):
    """A letter that was taken."""

    sender: str
    recipients: list
    options: list
    content: bytes
    is_encrypted: bool
    user: str | None

    @property
    def message(self):
        return email.message_from_bytes(self.content, policy=email.policy.default)

    @property
    def text(self):
        return self.message.get_body(("plain",)).get_content()

    @property
    def page(self):
        return self.message.get_body(("html",)).get_content()


class _Session(SMTP):
    """One connection: with DATA as a server has it that is restarted just then."""

    async def smtp_DATA(self, arg):  # noqa: N802 - aiosmtpd's name
        if self.event_handler.data and self.event_handler.data[0] is DROP:
            self.event_handler.data.pop(0)
            await self.push("354 Go on")
            self.transport.abort()
            return
        await super().smtp_DATA(arg)


class MailHost:
    """A mail server in a thread of its own, from ``with`` until its end. ``encryption``: none, ``starttls`` or ``implicit``."""

    def __init__(self, *, port=0, encryption=None, name="localhost", password=None, takes_utf8=True):
        self.port = port
        self.authority = trustme.CA()
        self.received = []
        self.attempts = 0
        self.rcpt = []
        self.data = []
        self.refused_logins = 0
        self._encryption = encryption
        self._password = password
        self._takes_utf8 = takes_utf8
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert(name).configure_cert(self._tls)
        self._connections = set()

    def trusting(self):
        """A client's context that trusts this server's authority, and no other."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.authority.configure_trust(context)
        return context

    def __enter__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(10)
        return self

    def __exit__(self, *_):
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _open(self):
        tls = self._tls if self._encryption == "implicit" else None
        self._server = await self._loop.create_server(self._connect, "127.0.0.1", self.port, ssl=tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self):
        self._server.close()
        for connection in self._connections:
            if connection.transport is not None:
                connection.transport.abort()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _connect(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of logins without TLS: what the tests are about
            connection = _Session(
                self,
                hostname="mail.test",
                enable_SMTPUTF8=self._takes_utf8,
                tls_context=self._tls if self._encryption == "starttls" else None,
                auth_required=self._password is not None,
                auth_require_tls=self._password is None,  # then no login is offered
                authenticator=self._authenticate if self._password is not None else None,
                loop=self._loop,
            )
        self._connections.add(connection)
        return connection

    def _authenticate(self, server, session, envelope, mechanism, given):
        right = isinstance(given, LoginPassword) and given.password == self._password.encode()
        self.refused_logins += not right
        return AuthResult(success=right, handled=False, auth_data=given.login.decode())

    async def handle_RCPT(self, server, session, envelope, address, options):  # noqa: N802
        self.attempts += 1
        reply = await self._reply(self.rcpt)
        if reply.startswith("2"):
            envelope.rcpt_tos.append(address)
        return reply

    async def handle_DATA(self, server, session, envelope):  # noqa: N802
        reply = await self._reply(self.data)
        if reply.startswith("2"):
            is_encrypted = server.transport.get_extra_info("ssl_object") is not None
            self.received.append(
                Received(
                    envelope.mail_from,
                    list(envelope.rcpt_tos),
                    list(envelope.mail_options),
                    envelope.content,
                    is_encrypted,
                    session.auth_data if session.authenticated else None,
                )
            )
        return reply

    async def _reply(self, replies):
        reply = replies.pop(0) if replies else "250 Fine"
        if reply is STALL:
            await asyncio.Event().wait()
        return reply


def free_port():
    """A port on which nobody listens."""
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
