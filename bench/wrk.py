"""wrk, on its core: load on one path for some seconds, and what it came to."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.servers import LOAD_CORE, Running

CONNECTIONS: Final = 64
_SCRIPT: Final = Path(__file__).with_name("load.lua")


@dataclass(frozen=True, slots=True)
class Figure:
    """What a load came to."""

    rate: float
    cpu_us: float
    """Processor time of the server for a request, in microseconds."""
    median_ms: float
    p99_ms: float
    refused: int


def wrk_program() -> str:
    """Where wrk is; it is installed if that can be done."""
    found = shutil.which("wrk")
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        print("installing wrk (Debian package)", file=sys.stderr)
        subprocess.run(["apt-get", "install", "--yes", "--quiet", "wrk"], check=True, stdout=subprocess.DEVNULL)
        found = shutil.which("wrk")
    if found is None:
        sys.exit("wrk is needed to make load: install it (Debian: apt-get install wrk)")
    return found


def load(server: Running, path: str, *, seconds: float, core: int = LOAD_CORE, **environ: str) -> Figure:
    """Load one path for so long, from a core."""
    command = [wrk_program(), "-t1", f"-c{CONNECTIONS}", f"-d{seconds:g}s", "-s", str(_SCRIPT), server.url + path]
    before = server.cpu()
    done = subprocess.run(
        command,
        env={**os.environ, **environ, "TARGET": path},
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    used = server.cpu() - before
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    requests, microseconds, refused, median, p99 = map(int, line.split()[1:])
    return Figure(requests / microseconds * 1e6, used / requests * 1e6, median / 1e3, p99 / 1e3, refused)
