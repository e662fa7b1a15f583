"""What `gatelodge database copy` shows to a person: how far it is, and what is left to do."""

import os
import pty
import re
import shlex
import subprocess

import pytest
from harness import PROGRAM, Server, clean_environment, run_command
from outside import add_partner
from postgres import postgres

from gatelodge_server.store.address import parse_address

SAID = (
    "copying; the old database is in use",
    "closed to writes; putting right what has changed",
    "closed to writes; comparing every row",
)


def run_on_terminal(*args):
    """The exit code of a command, and all that it writes to a terminal of its own."""
    environment = clean_environment({"TERM": "xterm", "COLUMNS": "200", "LINES": "50"})
    pid, terminal = pty.fork()
    if pid == 0:
        try:
            os.execve(PROGRAM[0], [*PROGRAM, *args], environment)
        finally:
            os._exit(127)
    written = b""
    try:
        while part := os.read(terminal, 65536):
            written += part
    except OSError:  # so ends what comes from a terminal that nobody has open any more
        pass
    finally:
        os.close(terminal)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), written.decode()


@pytest.fixture
def data(tmp_path):
    """The directory of a deployment with a partner, under a name that a shell would take apart."""
    data = tmp_path / "my data & more"
    add_partner(data)
    return data


def test_every_bar_reaches_its_end_whatever_the_number_of_rows(data, tmp_path):
    code, written = run_on_terminal("database", "copy", "--to", f"sqlite:///{tmp_path / 'new.db'}", "--data", str(data))
    assert code == 0, written
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    rows = int(re.search(r'"?rows"?\W+(\d+)', plain).group(1))
    assert 0 < rows < 1000
    for said in SAID:
        shown = re.findall(rf"{said} +\S+ +(\d+)/(\d+)", plain)
        assert shown, (said, plain)
        assert shown[-1] == (str(rows), str(rows))


def test_nothing_of_the_bars_is_written_where_there_is_no_terminal(data, tmp_path):
    done = run_command("database", "copy", "--to", f"sqlite:///{tmp_path / 'new.db'}", data=data)
    assert (done.returncode, done.stderr) == (0, "")
    assert not any(said in done.stdout for said in SAID)


def test_what_is_left_to_do_can_be_pasted_whatever_is_in_the_names(data):
    url = postgres().create("pasted") + "?sslmode=prefer&application_name=gatelodge"
    done = run_command("database", "copy", "--to", url, data=data)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "Start them" in line)
    pasted = "printf '%s\\n' " + line[line.index("--data") :].replace(" and ", " ")
    flags = subprocess.run(["/bin/sh", "-c", pasted], capture_output=True, text=True, check=True, timeout=30).stdout
    assert flags.splitlines() == ["--data", str(data), "--database", parse_address(url).url]
    # So does what a server says that is started on the old one.
    with pytest.raises(AssertionError) as refused:
        Server(data).start()
    assert f"--database {shlex.quote(parse_address(url).url)}`" in str(refused.value)
