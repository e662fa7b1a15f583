"""The unit, the container file and Patroni's: checked by those who read them, and carried out as far as one machine goes."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import processes
import pytest
import yaml
from experiments.daemon import wait_for
from guide import ROOT, block, fit

UNIT = ROOT / "deploy" / "gatelodge.service"
CONTAINERFILE = ROOT / "deploy" / "Containerfile"
PATRONI = ROOT / "deploy" / "patroni.yml"
EXPOSURE_MAX = 20
"""Tenths; `systemd-analyze` calls everything below 4.0 good, and a service without any hardening has 9.6."""


# --- systemd --------------------------------------------------------------------------------------------------------------


def directives() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        name, is_directive, value = line.partition("=")
        if is_directive and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def test_the_unit_signals_the_server_alone_and_waits_for_the_drain():
    unit = directives()
    assert unit["KillMode"] == ["mixed"]
    assert int(unit["TimeoutStopSec"][0]) > 5 + 20
    assert unit["ExecStart"] == ["/opt/gatelodge/bin/gatelodge serve --json"]
    assert unit["StateDirectory"] == ["gatelodge"]
    assert unit["Environment"] == ["GATELODGE_DATA=/var/lib/gatelodge"]


def test_systemd_takes_the_unit_and_finds_it_hardened(tmp_path):
    analyze = shutil.which("systemd-analyze")
    assert analyze, "systemd-analyze is needed (Debian's package systemd)"
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/gatelodge/bin/gatelodge", str(Path(sys.executable).with_name("gatelodge"))))
    for check in (["verify", "--man=no"], ["security", "--offline=yes", f"--threshold={EXPOSURE_MAX}"]):
        done = subprocess.run([analyze, *check, str(unit)], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr


# --- Patroni --------------------------------------------------------------------------------------------------------------


def test_the_cluster_acknowledges_nothing_that_a_failover_could_lose():
    patroni = yaml.safe_load(PATRONI.read_text("utf-8"))
    agreed = patroni["bootstrap"]["dcs"]
    assert agreed["synchronous_mode"] is True
    assert agreed["synchronous_mode_strict"] is True
    assert agreed["synchronous_node_count"] >= 1
    assert {agreed["postgresql"]["parameters"][name] for name in ("synchronous_commit", "fsync", "full_page_writes")} == {"on"}
    assert "data-checksums" in patroni["bootstrap"]["initdb"]


def test_the_cluster_fails_over_in_the_time_that_the_guide_promises():
    agreed = yaml.safe_load(PATRONI.read_text("utf-8"))["bootstrap"]["dcs"]
    assert agreed["ttl"] == 30
    assert agreed["loop_wait"] + 2 * agreed["retry_timeout"] <= agreed["ttl"]
    assert agreed["primary_start_timeout"] == 0
    assert agreed["postgresql"]["parameters"]["wal_retrieve_retry_interval"] == "500ms"


@pytest.fixture
def archived(tmp_path):
    """The shipped command, run as PostgreSQL runs it on a segment of this content; whether it said that all is well."""
    shipped = yaml.safe_load(PATRONI.read_text("utf-8"))["bootstrap"]["dcs"]["postgresql"]["parameters"]["archive_command"]
    archive, logged = tmp_path / "archive", tmp_path / "pg_wal"
    archive.mkdir()
    logged.mkdir()

    def archive_it(content, *, traced_to=None):
        segment = logged / "000000010000000000000002"
        segment.write_bytes(content)
        fitting = {"/backup/wal": str(archive), "%p": f"pg_wal/{segment.name}", "%f": segment.name}
        command = ["/bin/sh", "-c", fit(shipped, fitting)]
        if traced_to is not None:
            command = [
                "strace",
                "-f",
                "-y",
                "-e",
                "trace=openat,write,copy_file_range,fsync,/rename",
                "-o",
                str(traced_to),
                *command,
            ]
        return subprocess.run(command, cwd=tmp_path, check=False, timeout=60).returncode == 0

    archive_it.kept = lambda: {path.name: path.read_bytes() for path in archive.iterdir()}
    archive_it.directory = archive
    return archive_it


def test_a_segment_of_the_log_is_archived_once_and_may_be_handed_in_again(archived):
    assert archived(b"the first")
    assert archived(b"the first")
    assert archived.kept() == {"000000010000000000000002": b"the first"}


@pytest.mark.parametrize("there", [b"the first", b"the", b"the first and more", b""])
def test_a_segment_is_never_replaced_by_a_different_one_of_its_name(archived, there):
    (archived.directory / "000000010000000000000002").write_bytes(there)
    assert not archived(b"another")
    assert archived.kept() == {"000000010000000000000002": there}


def test_what_a_crash_left_of_a_copy_is_no_segment_and_in_nobodys_way(archived):
    (archived.directory / ".000000010000000000000002").write_bytes(b"the f")
    assert archived(b"the first")
    assert archived.kept() == {"000000010000000000000002": b"the first"}


def test_an_archive_that_is_not_there_takes_no_segment(archived):
    archived.directory.rmdir()
    assert not archived(b"the first")


@pytest.mark.parametrize("again", [False, True])
def test_a_segment_and_its_name_are_on_the_disk_before_the_archive_answers(archived, again, tmp_path):
    if again:
        assert archived(b"the first")
    trace = tmp_path / "trace"
    assert archived(b"the first", traced_to=trace)
    name, directory = "000000010000000000000002", str(archived.directory)
    # Only what happens in the archive, in order: the copy is synced, then named, then its name is synced.
    happened = re.findall(r" (fsync|rename)\w*\((.*)\) += 0$", trace.read_text(), flags=re.MULTILINE)
    done = [(call, "copy" if f"{directory}/.{name}" in what else "directory") for call, what in happened if directory in what]
    assert done == [("fsync", "copy"), ("rename", "copy"), ("fsync", "directory")][2 * again :]


def test_nobody_orders_a_failover_or_reaches_the_database_without_a_password():
    patroni = yaml.safe_load(PATRONI.read_text("utf-8"))
    assert patroni["restapi"]["authentication"].keys() == {"username", "password"}
    rules = [rule.split() for rule in patroni["postgresql"]["pg_hba"]]
    assert [rule for rule in rules if rule[0] != "local" and (rule[0], rule[-1]) != ("hostssl", "scram-sha-256")] == []


# --- the container file ---------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """What a stage of the container file does, in order."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, word: str) -> list[str]:
        return [text for step, text in self.steps if step == word]

    def the(self, word: str) -> str:
        (text,) = self.all(word)
        return text


def stages() -> list[Stage]:
    text = re.sub(r"\\\n", " ", CONTAINERFILE.read_text())
    found = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found.append(Stage(base, name))
        else:
            found[-1].steps.append((word, rest))
    return found


class Image:
    """The container file's file system, below a directory of ours: every path that the file names is moved there."""

    PATHS = ("/src", "/build", "/wheels", "/opt/gatelodge", "/data", "/var/lib/gatelodge")

    def __init__(self, root: Path) -> None:
        self.root = root

    def moved(self, text: str) -> str:
        paths = "|".join(re.escape(path) for path in self.PATHS)
        return re.sub(rf"(?<![\w/.])(?:{paths})(?![\w-])", lambda found: f"{self.root}{found[0]}", text)

    def build(self, stage: Stage) -> None:
        """Carry out COPY and RUN."""
        where = self.root
        programs = Path(sys.base_prefix) / "bin"
        for word, text in stage.steps:
            if word == "WORKDIR":
                where = Path(self.moved(text))
                where.mkdir(parents=True)
            elif word == "COPY":
                source, target = text.split()
                ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
                shutil.copytree(ROOT / source, where / target, ignore=ignored)
            elif word == "RUN":
                environ = processes.bare_environment({"HOME": str(self.root), **registries()})
                environ["PATH"] = f"{programs}:{environ['PATH']}"
                done = subprocess.run(
                    ["/bin/sh", "-euc", self.moved(text)], cwd=where, env=environ, capture_output=True, text=True, check=False
                )
                assert done.returncode == 0, (text, done.stderr[-2000:])

    def copy(self, text: str) -> None:
        """Carry out a COPY from the stage before."""
        flags, (source, target) = [], [word for word in text.split() if not word.startswith("--")]
        assert not flags
        if source != target:
            shutil.copytree(self.moved(source), self.moved(target))


def registries() -> dict[str, str]:
    """Where packages come from on this machine, and where they are kept."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "UV_", "SSL_", "http", "HTTP"))}
    home = Path.home()
    return {"UV_CACHE_DIR": str(home / ".cache" / "uv"), "PIP_CACHE_DIR": str(home / ".cache" / "pip"), **kept}


@pytest.fixture(scope="module")
def image():
    root = processes.working_directory("image")
    root.chmod(0o755)
    image = Image(root)
    build, final = stages()
    image.build(build)
    for text in final.all("COPY"):
        assert text.startswith(f"--from={build.name} ")
        image.copy(text)
    return image


def test_the_container_file_builds_with_hashes_and_runs_as_nobody_in_particular():
    build, final = stages()
    assert build.base == final.base
    assert not final.all("RUN")
    assert final.the("USER") == "10001:10001"
    assert "--chown=10001:10001" in final.all("COPY")[1]
    assert final.the("STOPSIGNAL") == "SIGTERM"
    for step in build.all("RUN"):
        if " install " in step or " build " in step:
            assert "--require-hashes" in step or "--no-deps" in step


def test_what_the_container_starts_is_healthy_writes_to_its_volume_only_and_stops_in_good_order(image):
    _, final = stages()
    data = Path(image.moved(final.the("VOLUME")))
    settings = dict(text.split("=", 1) for text in final.all("ENV"))
    settings = {name: image.moved(value) for name, value in settings.items()}
    assert settings["GATELODGE_DATA"] == str(data)
    port = processes.free_port()
    environ = processes.bare_environment({**settings, "GATELODGE_PORT": str(port), "GATELODGE_HOST": "127.0.0.1"})
    command = [image.moved(word) for word in json.loads(final.the("ENTRYPOINT")) + json.loads(final.the("CMD"))]
    # As the user of the image, where that user can reach the interpreter, as it can in the image.
    reaches = processes.reachable(Path(command[0]).with_name("python").resolve().parent)
    user = {"user": 10001, "group": 10001, "extra_groups": ()} if os.geteuid() == 0 and reaches else {}
    if user:
        for path in (data, *data.rglob("*")):
            os.chown(path, 10001, 10001)
    trace = data.parent / "trace"
    trace.touch()
    trace.chmod(0o666)
    calls = "openat,open,creat,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,link,linkat,symlink,symlinkat"
    strace = ["strace", "-f", "-qq", "-z", "-e", "signal=none", "-e", f"trace={calls}", "-o", str(trace)]
    with subprocess.Popen(
        [*strace, *command], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/", **user
    ) as process:
        processes.end_at_end(process)
        started = process.stdout.readline()
        assert started, process.stderr.read()
        assert json.loads(started)["port"] == port
        words = shlex.split(final.the("HEALTHCHECK").replace("[", "").rpartition("CMD ")[0])
        assert words[0].startswith("--interval=")
        check = [image.moved(word) for word in json.loads(final.the("HEALTHCHECK").partition("CMD ")[2])]
        assert subprocess.run(check, env=environ, check=False, timeout=30).returncode == 0
        (server,) = [
            child for child in processes.family(process.pid) if "serve" in child.cmdline() and child.pid != process.pid
        ]
        server.send_signal(getattr(signal, final.the("STOPSIGNAL")))
        wait_for("the end of the server", lambda: process.poll() is not None)
        assert subprocess.run(check, env=environ, check=False, timeout=30, stderr=subprocess.DEVNULL).returncode != 0
    written = {path for line in trace.read_text().splitlines() for path in written_by(line)}
    allowed = (str(data), "/dev/", "/proc/")
    assert any(path.startswith(str(data)) for path in written)
    assert [path for path in sorted(written) if path.startswith("/") and not path.startswith(allowed)] == []


def written_by(line: str) -> list[str]:
    """The paths that a system call changes, or opens for writing."""
    if " open" in line and not re.search(r"O_WRONLY|O_RDWR|O_CREAT", line):
        return []
    return re.findall(r'"((?:[^"\\]|\\.)*)"', line)


def test_the_guide_runs_the_container_as_its_file_expects():
    shown = block("", "podman run")
    _, final = stages()
    assert f":{final.the('VOLUME')} " in shown
    assert "--read-only" in shown
    assert f":{final.the('EXPOSE')} " in shown
