"""A foreign program that serves on loopback: how it is started, waited for, frozen and ended."""

import http.client
import json
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tests import processes

START_TIMEOUT: Final = 90.0
_PACE: Final = 0.02


def wait_for(what: str, condition: Callable[[], bool], *, timeout: float = START_TIMEOUT) -> float:
    """Look again and again until it is so; after how many seconds it was. Raises ``AssertionError``."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() < begun + timeout, f"{what}: not within {timeout:.0f} s"
        time.sleep(_PACE)  # a pace: the condition is what is waited for
    return time.monotonic() - begun


def status_of(port: int, path: str) -> int | None:
    """The status of a plain GET, or ``None`` if nobody answers."""
    return answer_of(port, path)[0]


def answer_of(port: int, path: str) -> tuple[int | None, dict[str, Any]]:
    """The same, and the object in its body if there is one."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        text = answer.read()
    except (OSError, http.client.HTTPException):
        return None, {}
    finally:
        connection.close()
    try:
        body = json.loads(text)
    except ValueError:
        body = None
    return answer.status, body if isinstance(body, dict) else {}


class Daemon:
    """One program. It never runs as root. ``root`` is its working directory; ``sign`` is what ends it in good order."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        root: Path,
        environ: Mapping[str, str] | None = None,
        sign: signal.Signals = signal.SIGTERM,
    ) -> None:
        self.name = name
        self.log_path = root / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._command = command
        self._root = root
        self._environ = environ
        self._sign = sign

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self.process is not None
        return self.process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it was started and has not ended."""
        return self.process is not None and self.process.poll() is None

    def start(self, ready: Callable[[], bool]) -> None:
        """Start, and return when it is ready. Raises ``AssertionError`` with the end of its log if it ends instead."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                cwd=self._root,
                env=processes.bare_environment({"HOME": str(self._root), **(self._environ or {})}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **processes.unprivileged(),
            )
        processes.end_at_end(self.process, self._sign)

        def up() -> bool:
            assert self.is_alive, f"{self.name} has ended: {self.log()[-2000:]}"
            return ready()

        wait_for(f"the start of {self.name}", up)

    def stop(self) -> None:
        """End it in good order."""
        if self.is_alive:
            assert self.process is not None
            processes.thaw(self.pid)
            self.process.send_signal(self._sign)
            self.process.wait(START_TIMEOUT)

    def kill(self) -> None:
        """SIGKILL for it and all its descendants."""
        if self.is_alive:
            assert self.process is not None
            processes.kill_all(self.pid)
            self.process.wait()

    def freeze(self) -> None:
        """SIGSTOP for it and all its descendants."""
        processes.freeze(self.pid)

    def thaw(self) -> None:
        """Let them go on."""
        processes.thaw(self.pid)

    def log(self) -> str:
        """What it said."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""
