"""What a server asks of the kernel, seen or tampered with by strace while it runs."""

import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

_LINE: Final = re.compile(r"(?P<thread>\d+) +\d+\.\d+ (?:<\.\.\. (?P<resumed>\w+) resumed>|(?P<call>\w+)\()(?P<rest>.*)")
_FILE: Final = re.compile(r"\d+<(?P<file>[^>]*)>")
_RESULT: Final = re.compile(r"\) += (?P<result>-?\d+)")


@dataclass(slots=True)
class Syscall:
    """One call. ``begun`` and ``ended`` number the lines of the trace: strace stops a thread at both, so they are an order."""

    thread: int
    name: str
    file: str
    begun: int
    ended: int | None = None
    result: int | None = None

    @property
    def good(self) -> bool:
        """Whether it came back without an error."""
        return self.result is not None and self.result >= 0


def parse(text: str) -> list[Syscall]:
    """The calls of a trace (``-f -ttt -y``), in the order in which they began."""
    calls: list[Syscall] = []
    open_: dict[int, Syscall] = {}
    for number, line in enumerate(text.splitlines()):
        match = _LINE.match(line)
        if match is None:
            continue
        thread, rest = int(match["thread"]), match["rest"]
        if match["call"]:
            file = _FILE.match(rest)
            open_[thread] = Syscall(thread, match["call"], file["file"] if file else "", number)
            calls.append(open_[thread])
        result = _RESULT.search(rest)
        if result is not None and thread in open_:
            call = open_.pop(thread)
            call.ended, call.result = number, int(result["result"])
    return calls


class Strace:
    """strace on a server that runs. Entering returns once it is attached; leaving lets the server go on alone."""

    def __init__(self, pid: int, output: Path, *, watch: Sequence[str], inject: Mapping[str, str] | None = None) -> None:
        self._output = output
        rules = [f"inject={call}:{fault}" for call, fault in (inject or {}).items()]
        events = [f"trace={','.join(watch)}", *rules]
        flags = [part for event in events for part in ("-e", event)]
        self._command = ["strace", "-f", "-ttt", "-y", "-s", "0", *flags, "-o", str(output), "-p", str(pid)]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        try:
            self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
        except FileNotFoundError as fault:
            raise MissingStrace from fault
        assert self._process.stderr is not None
        said = self._process.stderr.readline()
        if "attached" not in said:
            self._process.wait()
            raise RuntimeError(f"strace cannot attach (it needs root, or kernel.yama.ptrace_scope=0): {said}")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.communicate(timeout=3)
        except subprocess.TimeoutExpired:
            # It can wait for ever for a thread that died while it let go. The kernel lets go of the others when strace dies.
            self._process.kill()
            self._process.communicate()

    def calls(self) -> list[Syscall]:
        """What was seen, once it is detached."""
        return parse(self._output.read_text())

    def injections(self) -> int:
        """How many calls were tampered with, once it is detached."""
        return self._output.read_text().count("(INJECTED)")


class MissingStrace(Exception):
    """There is no strace."""

    def __init__(self) -> None:
        super().__init__("strace is not installed; `make test` and `make experiments` install it when run as root")
