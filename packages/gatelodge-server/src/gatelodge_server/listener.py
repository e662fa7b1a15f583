"""What stands between the socket and the application, beyond what uvicorn does by itself.

- ``GateLoop``: on a port with TLS, somebody who speaks plain HTTP is heard, so that it can be told to use https.
- ``BoundedProtocol``: the head of a request has a limit and the whole has one, and one that never ends is not waited for.
- Both, when the server stops: whoever has connected by then is answered. A proxy that does not ask whether a server is ready
  sends until it is gone.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Coroutine
from typing import Any, Final
from uuid import uuid4

import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gatelodge.errors import Fault, MalformedRequest
from gatelodge_server.http.fields import ENCODER
from gatelodge_server.http.problems import HeadTooLarge, problem_of
from gatelodge_server.log import log

HEAD_MAX: Final = 32 * 1024
"""Bytes in a request line and headers together."""
REQUEST_MAX: Final = 1024 * 1024
"""Bytes in a whole request. The application refuses smaller bodies; this bounds what it never sees, such as trailers."""
REQUEST_TIMEOUT: Final = 30.0
"""Seconds from a request's first byte to its last."""
_HELLO_TIMEOUT: Final = 10.0
_GOODBYE_TIMEOUT: Final = 1.0
"""Seconds for which a hang-up over TLS is to be answered in kind: an idle client does not answer, and holds up our stop."""
_LAST_CALL: Final = 0.05
"""Seconds after which those are taken who came while the socket was being closed: before uvicorn counts whom it waits for."""
_QUIET: Final = 1.0
"""Seconds for which a connection must have been quiet for us to hang up: a request may be on its way."""
_TLS_HANDSHAKE: Final = b"\x16"
"""The first byte of every TLS connection (RFC 8446 5.1: ContentType handshake), and of no HTTP request."""
_TLS_TIMEOUTS: Final = {"ssl_handshake_timeout": _HELLO_TIMEOUT, "ssl_shutdown_timeout": _GOODBYE_TIMEOUT}


class GateLoop(uvloop.Loop):
    """An event loop whose TLS servers also take plain connections; the scheme tells the application which it is."""

    async def create_server(self, protocol_factory: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as uvloop's
        """As in asyncio; with a socket, a ``Listener`` for TLS and a ``PlainListener`` without."""
        context, sock = kwargs.get("ssl"), kwargs.get("sock")
        if sock is None:
            return await super().create_server(protocol_factory, *args, **kwargs)
        if context is None:
            last_call = LastCall(self, sock)
            return PlainListener(await super().create_server(protocol_factory, *args, **kwargs), protocol_factory, last_call)
        return Listener(self, protocol_factory, sock, context, kwargs.get("backlog", 100))


class LastCall:
    """Takes the connections that the system has accepted, and that nobody has taken, when a listening socket is closed.

    The system would reset them: their senders have sent a request, and would not know whether it was heard.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        self._loop = loop
        self._sock = sock
        self._own = sock.dup()  # the last to be closed here, so that nothing is lost in between
        self._serving: set[asyncio.Task[Any]] = set()
        self._protocols: list[HttpToolsProtocol] = []

    def take(self, serve: Callable[[socket.socket], Coroutine[Any, Any, Any]]) -> None:
        """Close the socket, and have the connections served that have come by then."""
        self._sock.close()
        self._loop.call_later(_LAST_CALL, self._take, serve)

    def _take(self, serve: Callable[[socket.socket], Coroutine[Any, Any, Any]]) -> None:
        self._own.setblocking(False)  # noqa: FBT003 - the standard library's signature
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._own.accept()
                self.keep(self._loop.create_task(serve(connection)))
        self._own.close()

    def keep(self, serving: asyncio.Task[Any]) -> None:
        """Wait for this too."""
        self._serving.add(serving)
        serving.add_done_callback(self._serving.discard)

    def watch(self, protocol: asyncio.Protocol) -> asyncio.Protocol:
        """Hang up on whoever turns out to have nothing to say."""
        if isinstance(protocol, HttpToolsProtocol):
            self._protocols.append(protocol)
            self._loop.call_soon(protocol.shutdown)
        return protocol

    async def wait(self) -> None:
        """Return once all that came late have been answered."""
        # uvicorn's set of connections tells nobody when one leaves it.
        while self._own.fileno() != -1 or self._serving or any(late in late.connections for late in self._protocols):  # noqa: ASYNC110
            await asyncio.sleep(_LAST_CALL)


class PlainListener:
    """The loop's own server, which nobody loses who has connected."""

    def __init__(
        self, server: asyncio.AbstractServer, protocol_factory: Callable[[], asyncio.Protocol], last_call: LastCall
    ) -> None:
        self._server = server
        self._protocol_factory = protocol_factory
        self._last_call = last_call

    def close(self) -> None:
        """Accept nobody any more."""
        self._server.close()
        self._last_call.take(self._serve)

    async def wait_closed(self) -> None:
        """Return once all who came late have been answered."""
        await self._server.wait_closed()
        await self._last_call.wait()

    async def _serve(self, connection: socket.socket) -> None:
        connection.setblocking(False)  # noqa: FBT003
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(lambda: self._last_call.watch(self._protocol_factory()), connection)


class Listener:
    """Accepts connections and looks at the first byte of each, without taking it, to see what it is going to be."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        protocol_factory: Callable[[], asyncio.Protocol],
        sock: socket.socket,
        context: ssl.SSLContext,
        backlog: int,
    ) -> None:
        sock.setblocking(False)  # noqa: FBT003 - the standard library's signature
        sock.listen(backlog)
        self._loop = loop
        self._protocol_factory = protocol_factory
        self._context = context
        self._greetings: set[asyncio.Task[None]] = set()
        self._last_call = LastCall(loop, sock)
        self._is_closing = False
        self._accepting = loop.create_task(self._accept(sock))

    def close(self) -> None:
        """Accept nobody any more."""
        self._accepting.cancel()
        self._is_closing = True
        self._last_call.take(self._greet)
        for greeting in self._greetings:
            self._last_call.keep(greeting)
            self._loop.call_later(_QUIET, greeting.cancel)

    async def wait_closed(self) -> None:
        """Return once all who came late have been answered."""
        await asyncio.gather(self._accepting, return_exceptions=True)
        await self._last_call.wait()

    async def _accept(self, sock: socket.socket) -> None:
        while True:
            try:
                connection, _ = await self._loop.sock_accept(sock)
            except OSError:
                # Out of file descriptors, most likely: those who are in must leave before others can enter.
                await asyncio.sleep(0.1)
                continue
            greeting = self._loop.create_task(self._greet(connection))
            self._greetings.add(greeting)
            greeting.add_done_callback(self._greetings.discard)

    async def _greet(self, connection: socket.socket) -> None:
        try:
            connection.setblocking(False)  # noqa: FBT003
            async with asyncio.timeout(_QUIET if self._is_closing else _HELLO_TIMEOUT):
                first = await self._peek(connection)
            if not first:
                connection.close()
                return
            context = self._context if first == _TLS_HANDSHAKE else None
            timeouts = {} if context is None else _TLS_TIMEOUTS
            await self._loop.connect_accepted_socket(self._protocol, connection, ssl=context, **timeouts)
        except (OSError, TimeoutError):  # it hung up, or what it sent is no TLS after all
            connection.close()
        except asyncio.CancelledError:
            connection.close()
            raise

    def _protocol(self) -> asyncio.Protocol:
        protocol = self._protocol_factory()
        return self._last_call.watch(protocol) if self._is_closing else protocol

    async def _peek(self, connection: socket.socket) -> bytes:
        with contextlib.suppress(BlockingIOError):
            return connection.recv(1, socket.MSG_PEEK)
        readable: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(connection, _mark, readable)
        try:
            await readable
        finally:
            self._loop.remove_reader(connection)
        return connection.recv(1, socket.MSG_PEEK)


def _mark(readable: asyncio.Future[None]) -> None:
    if not readable.done():
        readable.set_result(None)


class _Nowhere(list[tuple[bytes, bytes]]):
    """Takes what is appended to it, and keeps nothing."""

    def append(self, _: tuple[bytes, bytes]) -> None:
        pass


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits to the head of a request, to the whole, and to how long it may take to arrive."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as uvicorn's
        super().__init__(*args, **kwargs)
        self._head_size: int | None = None
        self._size = 0
        self._arriving = False
        self._heard_at = self.loop.time()
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Wait for the first request only so long."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(REQUEST_TIMEOUT, transport.abort)

    def on_message_begin(self) -> None:
        """Start to count."""
        self._head_size, self._size, self._arriving = 0, 0, True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._head_size = None
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > HEAD_MAX:
            self._refuse_head()
            return
        super().on_headers_complete()
        # What the parser finds from here on are trailers. RFC 9110 6.5.1: not to be merged into the headers, where they
        # would bring a credential, or a proxy's word, past whoever looks at headers on the way.
        self.headers = _Nowhere()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._arriving = False
        if not self.transport.is_closing():
            super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        """Count what belongs to an unfinished head; wait for an unfinished request only so long."""
        if self.transport.is_closing():
            return
        self._heard_at = self.loop.time()
        super().data_received(data)
        if self._head_size is not None:
            self._head_size += len(data)
            if self._head_size > HEAD_MAX:
                self._refuse_head()
        if self._arriving:
            self._size += len(data)
            if self._size > REQUEST_MAX and not self.transport.is_closing():
                self.transport.abort()
        # Almost every request comes in one piece, and costs no timer.
        if self._arriving and self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_TIMEOUT, self.transport.abort)
        elif not self._arriving and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def shutdown(self) -> None:
        """Answer what is under way, and what may be on its way; then hang up. The edge makes each answer the last one."""
        if self.cycle is not None and not self.cycle.response_complete:  # type: ignore[redundant-expr]  # it is None at first
            super().shutdown()
        elif (quiet := self.loop.time() - self._heard_at) < _QUIET:
            self.loop.call_later(_QUIET - quiet, self.shutdown)
        elif self in self.connections:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timer."""
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's words for the same
        """Refuse what is no request in the form of all our refusals."""
        self._refuse(MalformedRequest())

    def _refuse_head(self) -> None:
        if not self.transport.is_closing():
            self._refuse(HeadTooLarge())

    def _refuse(self, refused: Fault) -> None:
        # There is no request that could have had an id, so the answer has one to itself.
        request_id = uuid4().hex
        problem = problem_of(refused, request_id)
        body = ENCODER.encode(problem.members)
        address = self.client[0] if self.client else ""
        log.info("refused", code=refused.code, status=problem.status, address=address, request_id=request_id)
        lines = (
            f"HTTP/1.1 {problem.status} {problem.members['title']}",
            "content-type: application/problem+json",
            f"content-length: {len(body)}",
            f"x-request-id: {request_id}",
            "cache-control: no-store",
            "connection: close",
        )
        self.transport.write("\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + body)
        self.transport.close()
