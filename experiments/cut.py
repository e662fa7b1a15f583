"""A wire that can be cut: a TCP relay on loopback, in a thread of its own, between a client and a port of 127.0.0.1.

It looks at no protocol. With ``only`` it concerns itself with those connections on which the client has sent these bytes
(``b"LISTEN "`` picks the one on which a node waits for notifications), and lets all others pass whatever happens.

While nobody listens at its target it does not listen either, so that clients are refused as they would be there, and not
accepted first: libpq and asyncpg try the next host of several after the one, and give up after the other.
"""

import asyncio
import contextlib
import enum
import socket
import struct
import threading
from collections.abc import Coroutine
from typing import Any, Final, Self, TypeVar

T = TypeVar("T")

_CHUNK: Final = 65536
_PACE: Final = 0.02
_PATIENCE: Final = 1.0
_RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER on, for no time: closing sends RST, as a peer does that knows nothing of the connection."""


class _State(enum.Enum):
    WHOLE = "bytes pass"
    FROZEN = "connections stay open, and nothing passes"
    CUT = "connections are reset, new ones refused"
    MUTE = "what clients send passes; the first byte of an answer resets the connection instead"


class Cut:
    """The relay. ``port`` is where clients go; ``target`` is where it leads. Its verbs may be called from any thread."""

    def __init__(self, target: int, *, only: bytes = b"") -> None:
        self.target = target
        self._only = only
        self._state = _State.WHOLE
        self._links: set[_Link] = set()
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        # Holds the port while nobody listens on it.
        self._holder = _bound(0)
        self.port = self._holder.getsockname()[1]
        self._server: asyncio.Server | None = None
        self._checking = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()
        self._looked = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cut", daemon=True)
        self._thread.start()
        self._looked.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def connections(self) -> int:
        """How many connections there are that the cut concerns."""
        return self._do(self._count())

    def cut(self) -> None:
        """Reset the connections, and refuse new ones until it is healed."""
        self._do(self._enter(_State.CUT))

    def drop(self) -> None:
        """Reset the connections that there are; new ones pass."""
        self._do(self._drop())

    def freeze(self) -> None:
        """Let nothing pass in either direction. Connections stay open, new ones are accepted, nobody is told anything."""
        self._do(self._enter(_State.FROZEN))

    def mute(self) -> None:
        """Let requests pass and lose their answers: each connection is reset when its next answer begins."""
        self._do(self._enter(_State.MUTE))

    def heal(self) -> None:
        """Let everything pass; what was held back goes on its way."""
        self._do(self._enter(_State.WHOLE))

    def look(self) -> None:
        """See at once whether anybody listens at the target; otherwise it is seen when a connection from there ends."""
        self._do(self._follow_target_once())

    def close(self) -> None:
        """Reset all connections and listen no longer."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        await self._follow_target_once()
        self._looked.set()
        await self._closing.wait()
        self._shut()
        self._holder.close()
        for link in list(self._links):
            link.reset()
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _look(self) -> None:
        if not self._closing.is_set():
            self._spawn(self._follow_target())

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow_target_once(self) -> None:
        if not await self._open_if_target_listens():
            self._look()

    async def _follow_target(self) -> None:
        """Listen if the target does, as soon as it does."""
        while not await self._open_if_target_listens():
            await asyncio.sleep(_PACE)  # a pace: that the target listens is what is waited for

    async def _open_if_target_listens(self) -> bool:
        """Do so, or shut; whether there is nothing left to wait for."""
        async with self._checking:
            if self._state is _State.CUT and not self._only:
                self._shut()
                return True
            try:
                async with asyncio.timeout(_PATIENCE):
                    _, writer = await asyncio.open_connection("127.0.0.1", self.target)
                writer.close()
            except TimeoutError:
                pass  # it is frozen, but it has not refused
            except OSError:
                self._shut()
                return False
            if self._server is None:
                self._server = await asyncio.start_server(self._accept, sock=_bound(self.port))
            return True

    def _shut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._spawn(self._carry(reader, writer))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            _reset(writer)
            self._look()
            return
        link = _Link(writer, up_writer, is_meant=not self._only)
        self._links.add(link)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(link, reader, up_writer, asks=True))
                group.create_task(self._pump(link, up_reader, writer, asks=False))
            link.close()
        except* OSError:
            pass  # somebody hung up
        finally:
            if not link.is_closing:
                link.reset()
            self._links.discard(link)
            self._look()

    async def _pump(self, link: "_Link", reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, asks: bool) -> None:
        tail = b""
        while data := await reader.read(_CHUNK):
            if asks and not link.is_meant:
                link.is_meant = self._only in tail + data
                tail = data[-len(self._only) :]
            await self._pass(link, asks=asks)
            writer.write(data)
            await writer.drain()
        await self._pass(link, asks=True)  # the end is no answer
        with contextlib.suppress(OSError):
            writer.write_eof()

    async def _pass(self, link: "_Link", *, asks: bool) -> None:
        """Return when bytes may pass on this connection. Raises ``ConnectionResetError`` when it is cut."""
        while link.is_meant:
            if self._state is _State.CUT or (self._state is _State.MUTE and not asks):
                link.reset()
                raise ConnectionResetError
            if self._state is not _State.FROZEN:
                return
            self._changed.clear()
            await self._changed.wait()

    async def _enter(self, state: _State) -> None:
        self._state = state
        self._changed.set()
        if state is _State.CUT:
            self._reset()
        await self._follow_target_once()

    async def _count(self) -> int:
        return sum(link.is_meant for link in self._links)

    async def _drop(self) -> None:
        self._reset()

    def _reset(self) -> None:
        for link in list(self._links):
            if link.is_meant:
                link.reset()


class _Link:
    """A connection: both its ends, and whether the cut concerns it."""

    def __init__(self, *ends: asyncio.StreamWriter, is_meant: bool) -> None:
        self.is_meant = is_meant
        self.is_closing = False
        self._ends = ends

    def close(self) -> None:
        """Say goodbye to both sides, once they have everything."""
        self.is_closing = True
        for end in self._ends:
            end.close()

    def reset(self) -> None:
        """RST to both sides."""
        for end in self._ends:
            _reset(end)


def _bound(port: int) -> socket.socket:
    """A socket that has a port, without listening; others of ours may have it as well."""
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    found.bind(("127.0.0.1", port))
    return found


def _reset(writer: asyncio.StreamWriter) -> None:
    raw: socket.socket | None = writer.get_extra_info("socket")
    if raw is not None and raw.fileno() >= 0:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
