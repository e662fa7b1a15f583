"""The servers that are measured, each on one core: the product, and the product with its store left out."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gatelodge_server.app import Lodge, assemble
from gatelodge_server.core.model import Holder, Instant, PartnerStatus, Session, Standing
from gatelodge_server.core.ports import LoginAttempt, Opened, RefreshAttempt, RefreshOutcome, Refused, SessionStanding
from gatelodge_server.core.sessions import judge_refresh
from gatelodge_server.serve import WebApp, serve
from gatelodge_server.settings import load_settings
from gatelodge_server.store.sqlite import SqliteDriver
from gatelodge_server.store.store import SqlStore
from gatelodge_server.vault import Vault

PRODUCT = (sys.executable, "-m", "gatelodge_server")
YARDSTICK = (sys.executable, "-m", "bench.yardstick")
WITHOUT_STORE = (sys.executable, "-m", "bench.servers")
SERVER_CORE, LOAD_CORE = 0, 1


class _Memory(SqlStore):
    """Believes every key and keeps sessions in a dictionary: all that a login costs, but for the store."""

    def __init__(self, driver: SqliteDriver) -> None:
        super().__init__(driver)
        self._sessions: dict[bytes, Session] = {}

    async def open_session(self, attempt: LoginAttempt) -> Opened | Refused:
        now: Instant = attempt.now
        session = Session(attempt.session_id, attempt.key_id, 0, 0, now, now, attempt.expires_at, attempt.retires_at)
        self._sessions[session.id] = session
        return Opened(session, _holder(attempt.key_id))

    async def advance_session(self, attempt: RefreshAttempt) -> RefreshOutcome:
        session = self._sessions[attempt.session_id]
        standing = Standing(_holder(session.credential_id), b"", None, None, PartnerStatus.ACTIVE, 0, company_gone=False)
        outcome = judge_refresh(SessionStanding(session, standing), attempt)
        self._sessions[attempt.session_id] = getattr(outcome, "session", session)
        return outcome


def _holder(key_id: str) -> Holder:
    return Holder("acme-motors", None, "starter", key_id)


@dataclass(frozen=True, slots=True)
class _WithoutStore(WebApp):
    def assemble(self, vault: Vault) -> Lodge:
        driver = SqliteDriver(self.settings.data / "gatelodge.db", on_fault=lambda _: None)
        return assemble(self.settings, vault, store_of=lambda _: _Memory(driver))


@dataclass(frozen=True, slots=True)
class Running:
    """A server under load."""

    url: str
    pid: int

    def cpu(self) -> float:
        """Processor time used so far, in seconds."""
        user, system = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """Resident memory in MB."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextmanager
def running(
    program: tuple[str, ...],
    data: Path,
    *args: str,
    plain: bool = True,
    scheme: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """Run a server on its core, over plain HTTP as behind a proxy, or over TLS; ``environ`` is added to the variables."""
    command = [*program, "serve", "--json", "--port", "0", "--data", str(data), *args]
    if plain:
        command += ["--behind-proxy", "127.0.0.0/8"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("GATELODGE_")} | dict(environ or {})
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=own,
        preexec_fn=lambda: os.sched_setaffinity(0, {SERVER_CORE}),  # noqa: PLW1509 - no threads yet
    ) as process:
        try:
            assert process.stdout is not None
            port = json.loads(process.stdout.readline())["port"]
            time.sleep(1)  # housekeeping's first round
            yield Running(f"{scheme or ('http' if plain else 'https')}://127.0.0.1:{port}", process.pid)
        finally:
            process.kill()


def main() -> None:
    """Serve without a store, by the flags of `gatelodge serve`."""
    words = [word for word in sys.argv[2:] if word != "--json"]
    flags = {name.removeprefix("--").replace("-", "_"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    serve(
        load_settings(flags, os.environ),
        lambda started: print(json.dumps({"port": started.settings.port}), flush=True),
        web_app_of=_WithoutStore,
    )


if __name__ == "__main__":
    main()
