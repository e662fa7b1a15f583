"""A real server in a process of its own, and the command line beside it: what tests and experiments run against."""

import contextlib
import json
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import httpx2

START_TIMEOUT = 60.0
PROGRAM = (sys.executable, "-m", "gatelodge_server")


def run_command(*args: str, data: Path, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command of `gatelodge` beside whatever is running."""
    command = [*PROGRAM, *args, "--data", str(data)]
    return subprocess.run(command, env=clean_environment(environ), capture_output=True, text=True, check=False, timeout=120)


def ask(*args: str, data: Path) -> Any:
    """What a command answers in JSON; it must succeed."""
    done = run_command(*args, "--json", data=data)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment without settings of whoever runs the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GATELODGE_")}
    return {**kept, **(extra or {})}


class Server:
    """`gatelodge serve` over TLS on a free loopback port, in a process group of its own.

    ``prefix`` is put in front of the command (strace, faketime); ``environ`` adds settings; ``program`` may be another that
    takes the same arguments. Its log is ``log_path``.
    """

    def __init__(
        self,
        data: Path,
        *args: str,
        prefix: Sequence[str] = (),
        program: Sequence[str] = PROGRAM,
        environ: Mapping[str, str] | None = None,
        public_url: str | None = None,
        port: int = 0,
    ) -> None:
        self.data = data
        self._args = args
        self._prefix = (*prefix, *program)
        # The issuer has to stay the same over restarts, so that tokens outlive them.
        self._environ = {"GATELODGE_PUBLIC_URL": public_url or "https://localhost:8443", **(environ or {})}
        self.port = port
        self.log_path = data.with_name(data.name + ".log")
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def nodes(self) -> Sequence["Server"]:
        """The servers of its deployment."""
        return (self,)

    @property
    def authority(self) -> Path:
        return self.data / "tls" / "ca.pem"

    def tls(self) -> ssl.SSLContext:
        """A context that trusts the server's local authority."""
        return ssl.create_default_context(cafile=str(self.authority))

    def client(self, **options: Any) -> httpx2.Client:
        """A client of the server."""
        return httpx2.Client(base_url=self.url, verify=self.tls(), timeout=30, trust_env=False, **options)

    def async_client(self, **options: Any) -> httpx2.AsyncClient:
        """An asynchronous client of the server, without a limit to its connections."""
        limits = httpx2.Limits(max_connections=None)
        return httpx2.AsyncClient(base_url=self.url, verify=self.tls(), timeout=30, trust_env=False, limits=limits, **options)

    def start(self, *args: str) -> None:
        """Start, and return when it listens. It keeps its port over restarts; ``args`` are for this start only."""
        self.data.parent.mkdir(parents=True, exist_ok=True)
        command = [*self._prefix, "serve", "--json", "--port", str(self.port), "--data", str(self.data)]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *self._args, *args],
                env=clean_environment(self._environ),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.process.stdout.close()
            raise AssertionError(f"the server did not start: {self.log_path.read_text(errors='replace')[-2000:]}")
        self.port = json.loads(line)["port"]

    def kill(self) -> None:
        """SIGKILL for the whole group, at once."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM to the server, which finishes what it has begun; its exit code."""
        assert self.process is not None
        self.process.terminate()
        return self._end(0)

    def _end(self, sign: int) -> int:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, sign)
        code = self.process.wait(timeout=60)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code


COMPANY = {"companyName": "Müller GmbH", "country": "DE", "taxNumber": "12/345/67890"}


def add_partner(data: Path, name: str = "Acme Motors") -> tuple[str, str]:
    """Add a partner; its id and its API key."""
    answer = ask("partner", "add", name, "--email", "dev@acme.example", data=data)
    return answer["partnerId"], answer["apiKey"]
