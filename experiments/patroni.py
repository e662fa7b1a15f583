"""A PostgreSQL that fails over: members under Patroni, and one etcd in which they agree who leads.

They run with the file that is shipped (``deploy/patroni.yml``). What cannot be the same on one machine is laid over it: names,
ports, directories, certificates and passwords, and how fast it fails over. There is no watchdog.

Every member is reached through cuts only: by clients and by the other members' replication (``front``), by the others' look
at its REST API (``voice``), and it reaches etcd through one (``line``). Cutting the three is a partition of that member.
A leader that is gone is replaced after about ``ttl`` seconds; 20 is the least that Patroni takes.
"""

import contextlib
import functools
import json
import secrets
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Self
from urllib.parse import quote

import psutil
import trustme
import yaml
from tests import processes

from experiments.cut import Cut
from experiments.daemon import Daemon, answer_of, status_of, wait_for

SHIPPED: Final = Path(__file__).resolve().parents[1] / "deploy" / "patroni.yml"
INSTALLED: Final = SHIPPED.parents[1] / ".venv" / "patroni"
DEBIAN_PROGRAMS: Final = Path("/usr/lib/postgresql/15/bin")
ROLE: Final = "gatelodge"
_NETWORK: Final = "10.0.0.0/24"
_ARCHIVE: Final = "/backup/wal"
_LOGINS: Final = ("superuser", "replication", "rewind")
_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


@functools.cache
def packages() -> Path:
    """The directory of Patroni's packages, or a copy of it where an unprivileged user can reach them."""
    assert INSTALLED.is_dir(), f"{INSTALLED} is missing: `make experiments` installs it"
    if processes.reachable(INSTALLED):
        return INSTALLED
    return shutil.copytree(INSTALLED, processes.working_directory("patroni-packages") / "patroni")


class Member:
    """One node of the cluster: Patroni, and the PostgreSQL that it starts."""

    def __init__(self, name: str, *, root: Path, etcd_port: int, configuration: Mapping[str, Any]) -> None:
        self.name = name
        self.port = processes.free_port()
        self._api_port = processes.free_port()
        self.line = Cut(etcd_port)
        self.front = Cut(self.port)
        self.voice = Cut(self._api_port)
        self.data = root / f"data-{name}"
        own = {
            **configuration,
            "name": name,
            "restapi": {
                **configuration["restapi"],
                "listen": f"127.0.0.1:{self._api_port}",
                "connect_address": f"127.0.0.1:{self.voice.port}",
            },
            # As a proxy, so that it does not ask etcd for an address that leads past the cut.
            "etcd3": {"host": f"127.0.0.1:{self.line.port}", "use_proxies": True},
            "postgresql": {
                **configuration["postgresql"],
                "listen": f"127.0.0.1:{self.port}",
                "connect_address": f"127.0.0.1:{self.front.port}",
                "data_dir": str(self.data),
                "pgpass": str(root / f"pgpass-{name}"),
            },
        }
        file = root / f"{name}.yml"
        file.touch(mode=0o600)
        file.write_text(json.dumps(own))  # JSON is YAML
        processes.hand_over(file)
        self._patroni = Daemon(
            f"patroni-{name}",
            ["/usr/bin/python3", "-m", "patroni", str(file)],
            root=root,
            environ={"PYTHONPATH": str(packages())},
        )
        processes.end_by_file_at_end(self.data / "postmaster.pid", signal.SIGQUIT)

    def start(self) -> None:
        """Start Patroni, which starts PostgreSQL; return when its REST API answers."""
        self._patroni.start(lambda: self.status("/liveness") is not None)

    def status(self, path: str) -> int | None:
        """The status of its REST API on this path; ``None`` if it does not answer. Past the cut: a look from outside."""
        return status_of(self._api_port, path)

    @property
    def leads(self) -> bool:
        """Whether it holds the lock and takes writes: it says the first while PostgreSQL is still being promoted."""
        status, body = answer_of(self._api_port, "/primary")
        return status == 200 and "location" in body.get("xlog", {})

    def describe(self) -> dict[str, Any]:
        """The cluster as this member sees it (``GET /cluster``); empty if it does not answer."""
        return answer_of(self._api_port, "/cluster")[1]

    def postmaster(self) -> int | None:
        """The process id of its PostgreSQL, if that runs."""
        with contextlib.suppress(FileNotFoundError, ValueError, IndexError):
            pid = int((self.data / "postmaster.pid").read_text().splitlines()[0])
            return pid if any(processes.alive(process) for process in processes.family(pid)[:1]) else None
        return None

    def kill_postgres(self) -> None:
        """SIGKILL for all processes of its PostgreSQL. Patroni is left, and does what it thinks right."""
        if (pid := self.postmaster()) is not None:
            processes.kill_all(pid)
        self.front.look()

    def kill(self) -> None:
        """SIGKILL for Patroni and for PostgreSQL: the machine is gone. ``start`` brings it back."""
        self._patroni.kill()
        self.kill_postgres()

    def stop(self) -> None:
        """End in good order: Patroni stops PostgreSQL and gives the lock back."""
        self._patroni.stop()

    def freeze(self) -> None:
        """SIGSTOP for Patroni and for PostgreSQL."""
        self._patroni.freeze()
        if (pid := self.postmaster()) is not None:
            processes.freeze(pid)

    def thaw(self) -> None:
        """Let them go on."""
        self._patroni.thaw()
        with contextlib.suppress(psutil.NoSuchProcess):
            if (pid := self.postmaster()) is not None:
                processes.thaw(pid)

    def partition(self, how: Callable[[Cut], None] = Cut.cut) -> None:
        """Cut it off from clients, from the other members and from etcd; it goes on running.

        With ``Cut.freeze`` nobody is told, as when packets are lost.
        """
        for cut in (self.line, self.front, self.voice):
            how(cut)

    def heal(self) -> None:
        """Put it back on the net."""
        for cut in (self.line, self.front, self.voice):
            cut.heal()

    def close(self) -> None:
        """End everything of it."""
        self.kill()
        for cut in (self.line, self.front, self.voice):
            cut.close()

    def log(self) -> str:
        """What Patroni and PostgreSQL said."""
        return self._patroni.log()


class PatroniCluster:
    """etcd and some members.

    ``ttl`` is shorter than the shipped one, so that nobody waits long, and all that goes with it. ``agreed`` takes the place of
    what else the members agree on: with ``synchronous_mode`` off, a standby may become leader that lacks the last commits.
    """

    def __init__(self, *, members: int = 3, ttl: int = 20, agreed: Mapping[str, Any] = _NOTHING) -> None:
        self.root = processes.working_directory("patroni")
        client_port, peer_port = processes.free_port(), processes.free_port()
        client, peer = f"http://127.0.0.1:{client_port}", f"http://127.0.0.1:{peer_port}"
        self.etcd_port = client_port
        self.etcd = Daemon(
            "etcd",
            [
                *("etcd", "--name", "one", "--data-dir", str(self.root / "etcd"), "--log-outputs", "stderr"),
                *("--listen-client-urls", client, "--advertise-client-urls", client),
                *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"one={peer}"),
            ],
            root=self.root,
        )
        configuration = self._configuration(ttl, agreed)
        self._synchronous = bool(configuration["bootstrap"]["dcs"]["synchronous_mode"])
        self._superuser = configuration["postgresql"]["authentication"]["superuser"]
        self._password = _a_password()
        self.members: Sequence[Member] = [
            Member(f"n{number}", root=self.root, etcd_port=client_port, configuration=configuration)
            for number in range(1, members + 1)
        ]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start everything; return when there is a leader, the others follow it, and clients have a role to log in as."""
        self.etcd.start(lambda: status_of(self.etcd_port, "/health") == 200)
        for member in self.members:
            member.start()
        self.wait_whole()
        statement = f"CREATE ROLE {ROLE} LOGIN PASSWORD '{self._password}'"
        self.run_sql(statement)

    def close(self) -> None:
        """End everything, and remove it."""
        for member in self.members:
            member.close()
        self.etcd.kill()
        processes.remove(self.root)

    def create(self, name: str) -> str:
        """Make a database; the URL for clients."""
        self.run_sql(f"CREATE DATABASE {name} OWNER {ROLE}")
        return self.url(name)

    def url(self, database: str) -> str:
        """The address of a database: every member, and the wish for the one that takes writes (libpq, 34.1.1.3)."""
        return f"{self._address(ROLE)}/{database}?target_session_attrs=read-write"

    def run_sql(self, *statements: str, database: str = "postgres") -> list[list[str]]:
        """Run statements as the superuser on the leader, each by itself; the rows that they answer with."""
        command = [str(DEBIAN_PROGRAMS / "psql"), "-X", "-q", "-A", "-t", "-F", "\t", "-v", "ON_ERROR_STOP=1"]
        for statement in statements:
            command += ["-c", statement]
        address = f"{self._address()}/{database}?target_session_attrs=read-write&connect_timeout=5"
        login = {"PGUSER": self._superuser["username"], "PGPASSWORD": self._superuser["password"]}
        environ = processes.bare_environment({**login, "PGSSLMODE": "require"})
        done = subprocess.run([*command, address], env=environ, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        return [line.split("\t") for line in done.stdout.splitlines()]

    def leaders(self) -> list[Member]:
        """Who says that it leads. Never two, if all is well."""
        return [member for member in self.members if member.leads]

    def leader(self) -> Member:
        """The one that leads."""
        [found] = self.leaders()
        return found

    def followers(self) -> list[Member]:
        """Those that do not."""
        return [member for member in self.members if not member.leads]

    def wait_leader(self, *, other_than: Member | None = None, timeout: float = 60) -> tuple[Member, float]:
        """The leader, as soon as there is one (other than this), and after how many seconds it was there."""
        took = self._wait_for("a leader", lambda: any(found is not other_than for found in self.leaders()), timeout=timeout)
        return next(found for found in self.leaders() if found is not other_than), took

    def wait_whole(self, *, timeout: float = 90) -> float:
        """Wait until somebody leads and everybody else streams from it, one of them synchronously if that is the mode."""
        return self._wait_for("a whole cluster", self._is_whole, timeout=timeout)

    def _wait_for(self, what: str, condition: Callable[[], bool], *, timeout: float) -> float:
        """The same as ``wait_for``; one that was in vain tells what the members said last."""
        try:
            return wait_for(what, condition, timeout=timeout)
        except AssertionError as fault:
            for member in self.members:
                fault.add_note(f"{member.name}, at its end:\n{member.log()[-2000:]}")
            raise

    def _is_whole(self) -> bool:
        leaders = self.leaders()
        if len(leaders) != 1:
            return False
        found = leaders[0].describe().get("members", [])
        followers = [member for member in found if member["role"] != "leader"]
        # One that runs and does not stream may be about to be wound back.
        streaming: Callable[[Any], bool] = lambda member: member["state"] == "streaming" and member.get("lag") == 0
        in_step = not self._synchronous or any(member["role"] == "sync_standby" for member in followers)
        return len(found) == len(self.members) and all(map(streaming, followers)) and (in_step or not followers)

    def _address(self, role: str | None = None) -> str:
        who = f"{role}:{quote(self._password, safe='')}@" if role else ""
        return f"postgresql://{who}{','.join(f'127.0.0.1:{member.front.port}' for member in self.members)}"

    def _configuration(self, ttl: int, agreed: Mapping[str, Any]) -> dict[str, Any]:
        """The file as it is shipped, for this machine."""
        shipped: dict[str, Any] = yaml.safe_load(SHIPPED.read_text("utf-8"))
        everywhere, own = shipped["bootstrap"]["dcs"], shipped["postgresql"]
        # loop_wait + 2 * retry_timeout must not be more than ttl, or a slow etcd costs a good leader its lock.
        everywhere |= {"ttl": ttl, "loop_wait": 1, "retry_timeout": (ttl - 1) // 2, **agreed}
        archive = self.root / "archive"
        archive.mkdir()
        processes.hand_over(archive)
        parameters = everywhere["postgresql"]["parameters"]
        parameters["archive_command"] = _moved(parameters["archive_command"], _ARCHIVE, str(archive))
        own["bin_dir"] = str(DEBIAN_PROGRAMS)
        own["pg_hba"] = [
            _moved(rule, _NETWORK, "127.0.0.1/32") if rule.startswith("hostssl") else rule for rule in own["pg_hba"]
        ]
        own["parameters"] |= {
            **self._certificate(),
            "unix_socket_directories": "",
            "dynamic_shared_memory_type": "mmap",  # files of its own, so that nothing is left of a server that was killed
        }
        for login in _LOGINS:
            own["authentication"][login]["password"] = _a_password()
        shipped["restapi"]["authentication"]["password"] = _a_password()
        # It would take the machine down with the leader.
        shipped["watchdog"]["mode"] = "off"
        return shipped

    def _certificate(self) -> dict[str, str]:
        """A certificate for the servers, as the shipped file has one."""
        certificate = trustme.CA().issue_cert("127.0.0.1")
        found = {"ssl_cert_file": self.root / "server.crt", "ssl_key_file": self.root / "server.key"}
        for name, content in zip(found, (certificate.cert_chain_pems[0], certificate.private_key_pem), strict=True):
            found[name].touch(mode=0o600)
            content.write_to_path(str(found[name]))
            processes.hand_over(found[name])
        return {name: str(path) for name, path in found.items()}


def _a_password() -> str:
    return f"{secrets.token_urlsafe(12)}@:/%"


def _moved(text: str, shipped: str, here: str) -> str:
    assert shipped in text, f"{SHIPPED}: there is no {shipped} in {text}"
    return text.replace(shipped, here)
