"""`gatelodge serve`: the socket, the certificate, the processes, and what is said to whoever started it."""

import asyncio
import errno
import logging
import multiprocessing
import os
import signal
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from types import FrameType
from typing import Final

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess
from uvicorn.supervisors.multiprocess import Process

from gatelodge_server.app import Lodge, assemble
from gatelodge_server.core.model import SECOND
from gatelodge_server.deployment import StartFault, check_registration_tier, load_master_keys, prepare, smtp_password
from gatelodge_server.http.draining import Draining
from gatelodge_server.http.edge import Edge
from gatelodge_server.listener import BoundedProtocol, GateLoop
from gatelodge_server.log import configure_log, log
from gatelodge_server.settings import Settings
from gatelodge_server.tls import Certificate, certificate_of
from gatelodge_server.vault import Vault, system_entropy
from gatelodge_server.web import web_app

_KEEP_ALIVE: Final = 75
"""Seconds for which an idle connection is kept: longer than the proxies in front do, so that it is not we who hang up."""
_GRACE: Final = 20
"""Seconds that requests under way are given once nobody is accepted any more."""
_HURRY: Final = signal.SIGUSR1
"""Tells a worker to drain no longer. Nobody but its parent sends it."""
_GLANCE: Final = 0.2
"""Seconds after which the parent of workers looks whether it was told something while it waits for them."""
_START_TIMEOUT: Final = 120.0
"""Seconds that a worker may take until it listens; a machine may be busy."""
_RESTART_PAUSE: Final = 2.0
"""Seconds until another worker is started after one that could not."""
_UNSTARTED: Final = "the service could not start: what kept it from that is in the log above"


@dataclass(frozen=True, slots=True)
class Started:
    """What there is to say once the server is up."""

    settings: Settings
    certificate: Certificate | None


@dataclass(frozen=True, slots=True)
class WebApp:
    """Makes the application in the process that is to serve it. It can be sent to a process: it holds no secret."""

    settings: Settings
    show_mail: Callable[[str], None] | None = field(default=None, kw_only=True)
    """Is shown mails that are kept in files."""

    def __call__(self) -> Edge:
        configure_log()
        _hear_libraries()
        _end_with_parent()
        lodge = self.assemble(Vault(load_master_keys(self.settings, os.environ), system_entropy))
        _Stopping(lodge.draining, self.settings.drain / SECOND).listen()
        return web_app(lodge)

    def assemble(self, vault: Vault) -> Lodge:
        """The parts that serve."""
        return assemble(self.settings, vault, smtp_password=smtp_password(os.environ), show_mail=self.show_mail)


class _Stopping:
    """What signals do to a process that serves.

    SIGTERM begins to drain: readiness says 503, each answer is the last on its connection, whoever waits long is answered;
    everything is served as before, until ``seconds`` are over. Then uvicorn does the rest: it closes the socket, waits for the
    requests under way, and ends. SIGINT, or a second SIGTERM, goes there at once.

    A worker takes a second SIGTERM for the first one: somebody may have signalled the whole group, and then its parent tells
    it again. The parent hurries it with a signal of their own.
    """

    def __init__(self, draining: Draining, seconds: float) -> None:
        self._draining = draining
        self._seconds = seconds
        self._is_worker = multiprocessing.parent_process() is not None
        self._loop = asyncio.get_running_loop()
        self._end_of_drain: asyncio.TimerHandle | None = None

    def listen(self) -> None:
        """Take the signals over from uvicorn, which took them before it asked for the application."""
        self._uvicorns = signal.getsignal(signal.SIGTERM)
        for sign in (signal.SIGTERM, signal.SIGINT, *([_HURRY] if self._is_worker else [])):
            signal.signal(sign, self._hear)

    def _hear(self, sign: int, _: FrameType | None) -> None:
        # Between any two instructions of whatever the process is doing; what follows belongs into the loop.
        self._loop.call_soon_threadsafe(self._act, sign)

    def _act(self, sign: int) -> None:
        repeated = self._draining.has_begun
        self._draining.begin()
        if sign == signal.SIGTERM and not repeated and self._seconds:
            then = "drain"
            self._end_of_drain = self._loop.call_later(self._seconds, self._end, sign)
        elif sign == signal.SIGTERM and repeated and self._is_worker:
            then = "go_on"
        else:
            then = "stop"
            self._end(sign)
        log.info("told_to_stop", signal=signal.Signals(sign).name, then=then)

    def _end(self, sign: int) -> None:
        if self._end_of_drain is not None:
            self._end_of_drain.cancel()
        if callable(self._uvicorns):
            # It raises what it was told once more when it is done, and knows nothing of a signal of ours.
            self._uvicorns(signal.SIGTERM if sign == _HURRY else sign, None)


class _Announcing(uvicorn.Server):
    """A server that says when it listens. Raises ``StartFault`` if it comes to nothing."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except SystemExit:
            raise StartFault(_UNSTARTED) from None  # uvicorn has logged what the application said
        if self.started:
            self._announce()


class _AnnouncingWorkers(Multiprocess):
    """Workers whose parent says when all of them listen, and starts those anew that end.

    uvicorn gives up when one does not start. But while the database is away none does, and the others go on with what they know
    and come back with it: a worker that was killed meanwhile must not take them along. Before all have been there once it is
    another matter: then ``run`` raises ``StartFault``.
    """

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket], announce: Callable[[], None]) -> None:
        super().__init__(config, sockets)
        self._announce = announce
        self._is_hurried = False
        self._next_start_at = 0.0

    def init_processes(self) -> None:
        super().init_processes()
        if not all(process.wait_until_ready(_START_TIMEOUT) for process in self.processes):
            for process in self.processes:
                process.kill()
                process.join()
            raise StartFault(_UNSTARTED)
        self._announce()

    def keep_subprocess_alive(self) -> None:
        """Start workers anew that have ended, or that are stuck."""
        for at, process in enumerate(self.processes):
            if self.should_exit.is_set() or process.is_alive(timeout=self.config.timeout_worker_healthcheck):
                continue
            if time.monotonic() < self._next_start_at:
                return
            process.kill()  # it may be stuck
            process.join()
            log.warning("worker_ended", pid=process.pid, exit_code=process.exitcode)
            if process.exitcode == STARTUP_FAILURE:
                self._next_start_at = time.monotonic() + _RESTART_PAUSE
            self.processes[at] = Process(self.config, self.sockets)
            self.processes[at].start()

    def handle_int(self) -> None:
        """Stop without draining."""
        self._is_hurried = True
        super().handle_int()

    def handle_term(self) -> None:
        """Drain and stop; told twice, stop."""
        self._is_hurried = self._is_hurried or self.should_exit.is_set()
        super().handle_term()

    def terminate_all(self) -> None:
        """Tell the workers to drain and stop."""
        # They have the socket too. It is closed when the last of them closes it, if it is not open here.
        for sock in self.sockets:
            sock.close()
        super().terminate_all()
        self._hurry()

    def join_all(self) -> None:
        """Wait for the workers, and pass on to them what is heard meanwhile."""
        while running := [process.process for process in self.processes if process.process.is_alive()]:
            wait([process.sentinel for process in running], _GLANCE)
            told = bool(self.signal_queue)
            self.handle_signals()
            if told:
                self._hurry()
        super().join_all()

    def _hurry(self) -> None:
        for process in self.processes:
            if self._is_hurried and process.process.is_alive():
                os.kill(process.process.pid or 0, _HURRY)


def serve(
    settings: Settings, announce: Callable[[Started], None], *, web_app_of: Callable[[Settings], WebApp] = WebApp
) -> None:
    """Serve until told to stop (SIGTERM, SIGINT); requests under way are answered first. Raises ``StartFault``."""
    settings = prepare(settings, os.environ)
    certificate = _usable_certificate(settings)
    sock = _bind(settings)
    port = sock.getsockname()[1]
    public_url = settings.public_url if settings.states("public_url") else f"https://localhost:{port}"
    settings = replace(settings, port=port, public_url=public_url)
    check_registration_tier(settings)
    config = _config(web_app_of(settings), certificate)
    started = Started(settings, certificate)
    if settings.workers > 1:
        _AnnouncingWorkers(config, [sock], lambda: announce(started)).run()
    else:
        _Announcing(config, lambda: announce(started)).run([sock])


def _usable_certificate(settings: Settings) -> Certificate | None:
    try:
        certificate = certificate_of(settings)
        if certificate is not None:
            # uvicorn loads it later, in each process, and has only a traceback to say about one that is no good.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate.chain, certificate.key)
    except (OSError, UnicodeError) as fault:
        where = f"{settings.tls_cert} with {settings.tls_key}" if settings.tls_cert else str(settings.data / "tls")
        raise StartFault(
            f"the certificate cannot be made or used: {where}: {getattr(fault, 'strerror', None) or fault}"
        ) from fault
    return certificate


def _config(app: WebApp, certificate: Certificate | None) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        factory=True,
        workers=app.settings.workers,
        loop=GateLoop,  # type: ignore[arg-type]  # a class is taken where a name of one is
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # the edge reads them, by stricter rules
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_GRACE,
        ssl_certfile=certificate.chain if certificate is not None else None,
        ssl_keyfile=certificate.key if certificate is not None else None,
    )


def _bind(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        sock = socket.create_server((settings.host, settings.port), family=family)
    except OSError as fault:
        why = fault.strerror
        if fault.errno == errno.EADDRINUSE:
            why = f"{os.strerror(fault.errno)}; stop what listens there, or choose another port with --port"
        raise StartFault(f"cannot listen on {settings.host} port {settings.port}: {why}") from fault
    sock.set_inheritable(True)
    return sock


def _end_with_parent() -> None:
    """Let a worker stop when the process that started it is gone, however it went: nobody would restart or stop it."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    loop, sentinel = asyncio.get_running_loop(), parent.sentinel

    def end() -> None:
        loop.remove_reader(sentinel)  # it stays readable
        os.kill(os.getpid(), _HURRY)  # whoever starts another one needs the port

    loop.add_reader(sentinel, end)


class _ToLog(logging.Handler):
    """What libraries say becomes a line of our log: the sentence, never a traceback."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("Traceback "):  # what a framework says of an application that did not start
            message = message.rstrip().splitlines()[-1]
        log.warning("library", logger=record.name, level=record.levelname, message=message)


def _hear_libraries() -> None:
    logging.basicConfig(level=logging.WARNING, handlers=[_ToLog()], force=True)
