"""Processes that tests and experiments start: as whom they run, where they listen, and that none of them is left behind.

Whatever happens to the process that started them, a warden ends them: a small process that is told of each and reads from a
pipe. When the pipe is closed, because its owner is at its end or was killed, the warden ends what it was told of, removes the
directories, and is gone. (PR_SET_PDEATHSIG would do the same, but it follows the thread that started a process, and threads
of a pool end earlier.)
"""

import atexit
import contextlib
import functools
import json
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

END_TIMEOUT = 10.0
"""Seconds that a process has to end in after its signal; then it is killed."""
_PACE = 0.005


def free_port() -> int:
    """A TCP port of 127.0.0.1 on which nobody listens at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@functools.cache
def unprivileged() -> Mapping[str, Any]:
    """What `subprocess` is told so that a program does not run as root: PostgreSQL refuses to. Nothing for another user."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": ()}


def hand_over(path: Path) -> None:
    """Give a file or directory to whom `unprivileged` programs run as."""
    if given := unprivileged():
        os.chown(path, given["user"], given["group"])


def reachable(path: Path) -> bool:
    """Whether whom `unprivileged` programs run as may enter a directory, and all above it."""
    if not unprivileged():
        return True
    return all(step.stat().st_mode & stat.S_IXOTH for step in (path, *path.parents))


def working_directory(name: str) -> Path:
    """A temporary directory that belongs to whom `unprivileged` programs run as. The warden removes it."""
    path = Path(tempfile.mkdtemp(prefix=f"gatelodge-{name}-"))
    hand_over(path)
    remove_at_end(path)
    return path


def bare_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a foreign server: nothing of whoever runs the tests but where programs are."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "TZ": "UTC", **(extra or {})}


def family(pid: int) -> list[psutil.Process]:
    """A process and all its descendants, as far as they are alive; it comes first."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def signal_all(processes: list[psutil.Process], sign: signal.Signals) -> None:
    """Send a signal to each that is still there."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(sign)


def wait_all(processes: list[psutil.Process], timeout: float) -> list[psutil.Process]:
    """Wait until they have ended; those that have not. A zombie has: whoever is above it may take a second to notice."""
    _wait(lambda: not any(map(alive, processes)), timeout)
    return [process for process in processes if alive(process)]


def _wait(condition: Callable[[], bool], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not condition() and time.monotonic() < deadline:
        time.sleep(_PACE)  # a pace: the condition is what is waited for


def alive(process: psutil.Process) -> bool:
    """Whether a process runs; a zombie does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def kill_all(pid: int) -> None:
    """SIGKILL for a process and all its descendants at once, and wait for their end."""
    freeze(pid)  # nobody is born between the list and the signal
    everyone = family(pid)
    signal_all(everyone, signal.SIGKILL)
    left = wait_all(everyone, END_TIMEOUT)
    assert not left, left


def freeze(pid: int) -> None:
    """SIGSTOP a process and all its descendants, those too that are born meanwhile; return when they stand still."""
    frozen: list[psutil.Process] = []
    while fresh := [process for process in family(pid) if process not in frozen]:
        signal_all(fresh, signal.SIGSTOP)
        _wait(functools.partial(_all_still, fresh), END_TIMEOUT)
        frozen += fresh


def _all_still(processes: list[psutil.Process]) -> bool:
    return not any(map(_moves, processes))


def _moves(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() not in {psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_ZOMBIE}
    return False


def thaw(pid: int) -> None:
    """SIGCONT them all."""
    signal_all(family(pid), signal.SIGCONT)


def end_at_end(process: subprocess.Popen[Any], sign: signal.Signals = signal.SIGKILL) -> None:
    """Have a process ended when this one is at its end: by ``sign``, its descendants by SIGKILL if they stay."""
    with contextlib.suppress(psutil.NoSuchProcess):
        _tell("end", process.pid, psutil.Process(process.pid).create_time(), int(sign))


def end_by_file_at_end(path: Path, sign: signal.Signals) -> None:
    """The same for a process that somebody else starts, whose id will stand in the first line of a file."""
    _tell("end-by-file", str(path), int(sign))


def remove_at_end(path: Path) -> None:
    """Have a directory removed when this process is at its end."""
    _tell("remove", str(path))


def remove(directory: Path) -> None:
    """Remove a directory, and the shared memory of a PostgreSQL that was killed in it."""
    for file in directory.glob("*/postmaster.pid"):
        # Its seventh line is the key and the id of the segment by which a second server in the same place is noticed.
        lines = file.read_text().splitlines()
        if len(lines) > 6 and (words := lines[6].split()):
            subprocess.run(["ipcrm", "-m", words[-1]], check=False, capture_output=True)
    shutil.rmtree(directory, ignore_errors=True)


def _tell(*order: object) -> None:
    pipe = _warden().stdin
    assert pipe is not None
    pipe.write(json.dumps(order) + "\n")
    pipe.flush()


@functools.cache
def _warden() -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).resolve())]
    # A session of its own: Ctrl-C is for the tests.
    warden = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)
    atexit.register(_dismiss, warden)
    return warden


def _dismiss(warden: subprocess.Popen[str]) -> None:
    assert warden.stdin is not None
    warden.stdin.close()
    warden.wait()


def _keep_watch() -> None:
    orders = [json.loads(line) for line in sys.stdin]
    told = [(_same(pid, created), sign) for what, *rest in orders if what == "end" for pid, created, sign in [rest]]
    told += [(_named(Path(path)), sign) for what, *rest in orders if what == "end-by-file" for path, sign in [rest]]
    ending = [(process, sign) for process, sign in told if process is not None]
    everyone = [member for process, _ in ending for member in family(process.pid)]
    signal_all(everyone, signal.SIGCONT)
    for process, sign in ending:
        signal_all([process], signal.Signals(sign))
    left = wait_all(everyone, END_TIMEOUT)
    signal_all(left, signal.SIGKILL)
    wait_all(left, END_TIMEOUT)
    for what, *rest in orders:
        if what == "remove":
            remove(Path(rest[0]))
        elif what == "end":
            # libfaketime leaves these of a process that was killed.
            for name in (f"faketime_shm_{rest[0]}", f"sem.faketime_sem_{rest[0]}"):
                (Path("/dev/shm") / name).unlink(missing_ok=True)


def _same(pid: int, created: float) -> psutil.Process | None:
    """The process that was meant, unless another has its number by now."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return process if process.create_time() == created else None
    return None


def _named(path: Path) -> psutil.Process | None:
    """The process whose id stands in a file, unless the file is older than the process."""
    with contextlib.suppress(OSError, ValueError, IndexError, psutil.NoSuchProcess):
        process = psutil.Process(int(path.read_text().splitlines()[0]))
        return process if process.create_time() <= path.stat().st_mtime + 1 else None
    return None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _keep_watch()
