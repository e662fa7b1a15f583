"""`gatelodge serve` itself: how it starts, what it prints, how it is refused, how it stops. And the settings and `doctor`."""

import json
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jwt
import psutil
import pytest
import trustme
from given import a_mail
from harness import PROGRAM, Server, clean_environment
from outside import PATIENCE, add_partner, ask, command, connect, is_closed, log_in, read_answer, until
from smtp import MailHost

from gatelodge_server.core.model import MINUTE
from gatelodge_server.core.ports import Deferred
from gatelodge_server.deployment import system_clock
from gatelodge_server.store.outbox import queue_mail, settle_mail
from gatelodge_server.store.sqlite import sqlite_engine

FIRST, SECOND, ELSEWHERE = (f"https://{name}.example" for name in ("first", "second", "elsewhere"))
ONE, TWO = "https://localhost:1", "https://localhost:2"
"""Names that servers on one data directory can have side by side: their certificate is of one host."""


@pytest.fixture
def started(tmp_path):
    """Starts the installed program as a person would, in an empty directory."""
    running = []

    def start(*args, **environ):
        program = Path(sys.executable).with_name("gatelodge")
        process = subprocess.Popen(
            [str(program), "serve", *args],
            cwd=tmp_path,
            env=clean_environment(environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def test_the_commands_that_serve_prints_work_when_they_are_pasted(started, tmp_path):
    process = started("--port", "0", "--sample-api")
    printed = []
    while not printed or "PlansSearchAsync" not in printed[-1]:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        printed.append(line)
    assert re.match(r"Gatelodge \(uat\) is up: https://localhost:\d+ ", printed[0])
    commands = [line.strip() for line in printed if re.match(r"  (KEY=|JWT=|TOKEN=|curl )", line)]
    assert len(commands) == 5
    bash = shutil.which("bash")
    assert bash
    assert shutil.which("curl"), "curl is needed: the printed commands are for it"
    done = subprocess.run(
        [bash, "-c", "\n".join(["set -euo pipefail", *commands])],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    companies, _, plans = done.stdout.partition("}")
    assert json.loads(companies + "}") == {"companies": [], "nextCursor": None}
    assert json.loads(plans)["plans"]
    data = tmp_path / "gatelodge-data"
    assert (data / "master.key").stat().st_mode & 0o777 == 0o600
    assert (data / "tls" / "server.key").stat().st_mode & 0o777 == 0o600


def serve(*args, **environ):
    """Run `serve` where it is expected to end by itself."""
    return subprocess.run(
        [*PROGRAM, "serve", *args], env=clean_environment(environ), capture_output=True, text=True, check=False, timeout=60
    )


def test_a_port_in_use_is_refused_in_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = serve("--port", str(port), "--data", str(tmp_path / "data"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"cannot listen on 127.0.0.1 port {port}: Address already in use; ")
    assert "--port" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("fault", ["not-there", "no-certificate", "another-key"])
def test_a_certificate_that_cannot_be_used_is_refused_in_one_line(tmp_path, fault):
    issued = trustme.CA().issue_cert("localhost")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    issued.cert_chain_pems[0].write_to_path(chain)
    issued.private_key_pem.write_to_path(key)
    if fault == "not-there":
        chain.unlink()
    elif fault == "no-certificate":
        chain.write_text("nothing of the kind")
    else:
        trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(key)
    done = command("serve", "--port", "0", "--tls-cert", str(chain), "--tls-key", str(key), data=tmp_path / "data")
    assert (done.exit_code, done.stdout) == (1, ""), done.exception
    assert done.stderr.startswith(f"the certificate cannot be made or used: {chain} with {key}: ")
    assert done.stderr.count("\n") == 1


def test_a_master_key_that_is_not_the_databases_own_is_refused(tmp_path):
    data = tmp_path / "data"
    add_partner(data)
    add_partner(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "master.key", data / "master.key")
    listed = command("partner", "list", data=data)
    assert (listed.exit_code, listed.stdout) == (1, ""), listed.exception
    served = serve("--port", "0", "--data", str(data))
    assert (served.returncode, served.stdout) == (1, "")
    for said in (listed.stderr, served.stderr):
        assert "master key" in said
        assert said.count("\n") == 1


def test_a_request_under_way_is_answered_after_sigterm_and_idle_clients_hold_up_nothing(tmp_path):
    with Server(tmp_path / "data") as server:
        partner = add_partner(server.data)
        body = json.dumps({"apiKey": partner.key}).encode()
        head = b"POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(
            body
        )
        idle = connect(server)
        idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_answer(idle).status == 200
        with connect(server) as under_way:
            under_way.sendall(head + body[:10])
            until(lambda: connect_and_ask(server), "the server has read the head")
            server.process.send_signal(signal.SIGTERM)
            until(lambda: refuses(server.port), "nobody is accepted any more")
            under_way.sendall(body[10:])
            answer = read_answer(under_way)
            assert answer.status == 200
            assert set(json.loads(answer.body)) == {"jwt", "expirationDate", "refreshToken", "refreshTokenExpiration"}
            assert is_closed(under_way)
        # Sooner than the twenty seconds for which a request under way would be waited for.
        server.process.wait(timeout=PATIENCE / 2)
        server.process.stdout.close()
        idle.close()
        assert "timeout" not in server.log_path.read_text()

        server.start()
        with server.client() as client:
            session = json.loads(answer.body)
            assert client.get("/companies", headers={"R-Auth": session["jwt"]}).status_code == 200


def connect_and_ask(server):
    """An exchange that is begun after another and answered: whatever was sent before has been read by then."""
    with connect(server) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        return read_answer(connection).status == 200


def refuses(port):
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except ConnectionError:
        return True
    return False


def test_memory_is_modest(tmp_path):
    """Of a server that nobody else has asked for anything: how much it remembers for others is not known here."""
    with Server(tmp_path / "data") as server, server.client() as client:
        partner = add_partner(server.data)
        for _ in range(50):
            log_in(client, partner.key)
        assert psutil.Process(server.process.pid).memory_info().rss < 120 << 20


# --- settings -------------------------------------------------------------------------------------------------------------


def test_all_bad_settings_are_told_at_once_by_the_name_under_which_they_were_set(tmp_path):
    (tmp_path / "gatelodge.toml").write_text('workers = 0\nnonsense = 1\nbrand = "X"\n')
    environ = {"GATELODGE_JWT_TTL": "soon", "GATELODGE_LOGIN_FAILURE_LIMIT": "often", "GATELODGE_PUBLIC_URL": "http://x/"}
    args = ("serve", "--port", "70000", "--environment", "UAT", "--behind-proxy", "10.0.0.0/33", "--data", str(tmp_path))
    done = command(*args, environ=environ)
    assert (done.exit_code, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    for name in (
        "--port",
        "--environment",
        "--behind-proxy",
        "GATELODGE_JWT_TTL",
        "GATELODGE_LOGIN_FAILURE_LIMIT",
        "GATELODGE_PUBLIC_URL",
        "workers",
        "brand",
        "nonsense",
    ):
        assert [line for line in lines if name in line], (name, lines)
    assert len(lines) == 9


@pytest.mark.parametrize(
    ("environ", "complaint"),
    [
        ({"GATELODGE_DATABASE": "mysql://x"}, "postgresql://"),
        ({"GATELODGE_TLS_CERT": "x.pem"}, "go together"),
        ({"GATELODGE_TLS_CERT": "x", "GATELODGE_TLS_KEY": "x", "GATELODGE_BEHIND_PROXY": "10.0.0.0/8"}, "excludes"),
        ({"GATELODGE_JWT_TTL": "91d"}, "must not be longer than session_ttl"),
        ({"GATELODGE_JWT_TTL": "0s"}, "longer than nothing"),
        ({"GATELODGE_CONFIG": "/nowhere/gatelodge.toml"}, "there is no file"),
        ({"GATELODGE_HOST": ""}, "must not be empty"),
        ({"GATELODGE_PORT": "-1"}, "GATELODGE_PORT"),
        ({"GATELODGE_WORKERS": "65"}, "GATELODGE_WORKERS"),
        ({"GATELODGE_OTHER_ISSUERS": "not a url"}, "GATELODGE_OTHER_ISSUERS"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, environ, complaint):
    done = command("serve", data=tmp_path, environ=environ)
    assert (done.exit_code, done.stdout) == (2, "")
    assert complaint in done.stderr


def test_a_flag_goes_before_a_variable_and_that_before_the_file(tmp_path):
    def environment(name, *args, **environ):
        data = tmp_path / name  # a database is of one environment
        data.mkdir()
        (data / "gatelodge.toml").write_text('environment = "fromfile"\n')
        done = command("partner", "add", "X", "--email", "a@b.example", "--json", *args, data=data, environ=environ)
        return json.loads(done.stdout)["apiKey"].split("_")[1]

    assert environment("file") == "fromfile"
    assert environment("variable", GATELODGE_ENVIRONMENT="fromvariable") == "fromvariable"
    assert environment("flag", "--environment", "fromflag", GATELODGE_ENVIRONMENT="fromvariable") == "fromflag"


def add(data, *args, **environ):
    return command("partner", "add", "X", "--email", "a@b.example", "--json", *args, data=data, environ=environ)


@pytest.mark.parametrize(
    ("mine", "yours"),
    [
        ({"GATELODGE_ENVIRONMENT": "production"}, {"GATELODGE_ENVIRONMENT": "uat"}),
        ({"GATELODGE_BRAND": "acme"}, {"GATELODGE_BRAND": "zenith"}),
        ({"GATELODGE_AUDIENCE": "plans"}, {"GATELODGE_AUDIENCE": "loans"}),
    ],
    ids=["environment", "brand", "audience"],
)
def test_a_database_has_credentials_of_one_marking_and_commands_know_which(tmp_path, mine, yours):
    first = json.loads(add(tmp_path, **mine).stdout)["apiKey"].split("_")[:2]
    refused = add(tmp_path, **yours)
    assert refused.exit_code == 1
    assert f"of the {next(iter(mine)).removeprefix('GATELODGE_').lower()} {next(iter(mine.values()))}, not" in refused.stderr
    assert json.loads(add(tmp_path).stdout)["apiKey"].split("_")[:2] == first


def test_a_look_at_an_empty_directory_binds_it_to_nothing(tmp_path):
    assert command("partner", "list", data=tmp_path).exit_code == 0
    assert json.loads(add(tmp_path, "--environment", "production").stdout)["apiKey"].split("_")[1] == "production"


def test_a_token_that_was_issued_before_the_first_start_is_good_wherever_the_server_then_listens(tmp_path):
    data = tmp_path / "data"
    token = ask("token", "issue", add_partner(data).id, data=data)["token"]
    with Server(data, "--sample-api", public_url=ELSEWHERE) as server, server.client() as client:
        answer = client.get("/api/v2/Partners/nowhere", headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == 404  # past the gate: the API knows no such path


def test_two_servers_on_one_database_take_what_the_other_issues(tmp_path):
    data = tmp_path / "data"
    partner = add_partner(data)
    with Server(data, "--sample-api", public_url=ONE) as one:
        two = Server(data, "--sample-api", public_url=TWO)
        with two, one.client() as of_one, two.client() as of_two:
            credentials = [log_in(client, partner.key)["jwt"] for client in (of_one, of_two)]
            credentials.append(ask("token", "issue", partner.id, data=data)["token"])
            for client in (of_one, of_two):
                for credential in credentials:
                    headers = {"Authorization": f"Bearer {credential}"}
                    assert client.get("/api/v2/Partners/nowhere", headers=headers).status_code == 404


def test_tokens_are_issued_under_the_url_of_the_server_and_outlive_its_change(tmp_path):
    data = tmp_path / "data"
    partner = add_partner(data)

    def call(server, token):
        with server.client() as client:
            headers = {"Authorization": f"Bearer {token}"}
            return client.get("/api/v2/Partners/nowhere", headers=headers).status_code

    with Server(data, "--sample-api", public_url=FIRST) as server:
        first = ask("token", "issue", partner.id, data=data)["token"]
        assert call(server, first) == 404  # past the gate: the API knows no such path
        server.stop()
    with Server(data, "--sample-api", public_url=SECOND) as server:
        second = ask("token", "issue", partner.id, data=data)["token"]
        assert [call(server, first), call(server, second)] == [404, 404]
    issuers = [jwt.decode(token, options={"verify_signature": False})["iss"] for token in (first, second)]
    assert issuers == [FIRST, SECOND]


def test_a_server_that_would_register_into_a_tier_that_is_not_there_does_not_start(started):
    process = started("--port", "0", GATELODGE_REGISTRATION_TIER="gold")
    _, fault = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "there is no tier gold, only starter, growth, enterprise" in fault


# --- doctor ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """A deployment that has been started once."""
    data = tmp_path_factory.mktemp("healthy") / "data"
    with Server(data) as server:
        server.stop()
    return data


@pytest.fixture
def patient(healthy, tmp_path):
    return Path(shutil.copytree(healthy, tmp_path / "data"))


def examine(data, **environ):
    """What the doctor finds wrong, by check."""
    done = command("doctor", "--json", data=data, environ=environ)
    findings = json.loads(done.stdout)
    assert all(set(finding) == {"check", "status", "detail"} for finding in findings)
    wrong = {finding["check"]: finding["detail"] for finding in findings if finding["status"] != "ok"}
    assert done.exit_code == (1 if wrong else 0), done.exception
    assert len({finding["check"] for finding in findings}) == len(findings)
    return wrong


def test_the_doctor_finds_a_healthy_deployment_healthy(patient):
    assert examine(patient) == {}
    table = command("doctor", data=patient)
    assert table.exit_code == 0
    assert table.stdout.splitlines()[0].split() == ["check", "status", "detail"]
    assert len(table.stdout.splitlines()) > 7


def test_the_doctor_finds_a_master_key_that_others_can_read(patient):
    (patient / "master.key").chmod(0o644)
    assert "0644" in examine(patient)["master key"]


def test_the_doctor_finds_no_master_key(patient):
    (patient / "master.key").unlink()
    assert set(examine(patient)) == {"master key"}


def test_the_doctor_finds_a_master_key_that_is_another_deployments(patient, tmp_path):
    add_partner(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "master.key", patient / "master.key")
    assert "master key" in examine(patient)["signing keys"]


@pytest.mark.parametrize(
    ("instants", "is_needed"), [("1, 0, 1, NULL", False), ("1, 0, NULL, NULL", True), ("1, NULL, NULL, NULL", True)]
)
def test_only_keys_that_sign_or_will_sign_must_open_for_a_start_and_for_the_doctor(patient, instants, is_needed):
    with closing(sqlite3.connect(patient / "gatelodge.db")) as database, database:
        database.execute(
            "INSERT INTO signing_key (kid, jwk, purpose, wrapped, published_at, signs_from, signs_until, gone_at)"
            f"SELECT 'sealed-elsewhere', jwk, 'access', X'0102030405', {instants} FROM signing_key LIMIT 1"
        )
    assert ("master key" in examine(patient).get("signing keys", "")) is is_needed
    listed = command("partner", "list", data=patient)
    assert ("another master key" in listed.output) is is_needed
    assert listed.exit_code == (1 if is_needed else 0)


def test_the_doctor_finds_an_old_schema_and_leaves_it_alone(patient):
    database = sqlite3.connect(patient / "gatelodge.db")
    with database:
        database.execute("UPDATE alembic_version SET version_num = '0000'")
    assert "gatelodge database upgrade" in examine(patient)["schema"]
    assert database.execute("SELECT version_num FROM alembic_version").fetchall() == [("0000",)]
    database.close()


def test_the_doctor_finds_no_signing_key(patient):
    database = sqlite3.connect(patient / "gatelodge.db")
    with database:
        database.execute("DELETE FROM signing_key")
    database.close()
    assert set(examine(patient)) == {"signing keys"}


def test_the_doctor_finds_no_database_and_makes_none(patient, tmp_path):
    for file in patient.glob("gatelodge.db*"):
        file.unlink()
    assert set(examine(patient)) == {"database"}
    assert {"master key", "database"} <= set(examine(tmp_path / "nowhere"))
    assert not (patient / "gatelodge.db").exists()
    assert not (tmp_path / "nowhere").exists()


def test_the_doctor_finds_a_file_that_is_no_database(patient):
    for file in patient.glob("gatelodge.db*"):
        file.unlink()
    (patient / "gatelodge.db").write_text("just words " * 1000)
    assert "database" in examine(patient)


def test_the_doctor_finds_a_damaged_database(patient):
    path = patient / "gatelodge.db"
    content = bytearray(path.read_bytes())
    content[4096 * 3 : 4096 * 8] = b"\xff" * 4096 * 5
    path.write_bytes(content)
    assert "database" in examine(patient)


@pytest.mark.parametrize(("days", "wrong"), [(-1, True), (20, True), (22, False)])
def test_the_doctor_finds_a_certificate_that_is_about_to_expire(patient, tmp_path, days, wrong):
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    now = datetime.now(UTC)
    issued = trustme.CA().issue_cert("localhost", not_before=now - timedelta(days=90), not_after=now + timedelta(days=days))
    issued.cert_chain_pems[0].write_to_path(chain)
    issued.private_key_pem.write_to_path(key)
    found = examine(patient, GATELODGE_TLS_CERT=str(chain), GATELODGE_TLS_KEY=str(key))
    assert set(found) == ({"certificate"} if wrong else set())


def test_the_doctor_finds_no_certificate_and_one_that_is_none(patient):
    (patient / "tls" / "server.pem").write_text("nothing of the kind")
    assert set(examine(patient)) == {"certificate"}
    (patient / "tls" / "server.pem").unlink()
    assert set(examine(patient)) == {"certificate"}
    assert examine(patient, GATELODGE_BEHIND_PROXY="10.0.0.0/8") == {}


def _queued(data, *, age):
    """A mail that waits in a deployment's outbox for so long."""
    engine = sqlite_engine(data / "gatelodge.db")
    with engine.begin() as connection:
        mail = a_mail(created_at=system_clock() - age)
        queue_mail(connection, mail)
        settle_mail(connection, mail.id, Deferred(system_clock(), "450 to RCPT: come again"), system_clock())
    engine.dispose()


def _mail_finding(data, **environ):
    found = json.loads(command("doctor", "--json", data=data, environ=environ).stdout)
    (mail,) = [finding for finding in found if finding["check"] == "mail"]
    return mail["status"], mail["detail"]


def test_the_doctor_says_where_mails_go(patient):
    status, detail = _mail_finding(patient)
    assert status == "ok"
    assert str(patient / "outbox") in detail
    assert "none waiting" in detail
    with MailHost() as host:
        assert _mail_finding(patient, GATELODGE_SMTP=f"smtp://127.0.0.1:{host.port}") == (
            "ok",
            f"127.0.0.1:{host.port} answers; none waiting",
        )
        assert (host.received, host.attempts) == ([], 0)


def test_the_doctor_finds_a_mail_server_that_does_not_answer(patient):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        status, detail = _mail_finding(patient, GATELODGE_SMTP=f"smtp://127.0.0.1:{port}")
    assert status == "failed"
    assert f"127.0.0.1:{port} does not answer" in detail


@pytest.mark.parametrize(("minutes", "status"), [(14, "ok"), (16, "failed")])
def test_the_doctor_finds_mails_that_wait_too_long_and_why(patient, minutes, status):
    _queued(patient, age=minutes * MINUTE)
    found, detail = _mail_finding(patient)
    assert found == status
    assert f"1 waiting, the oldest for {minutes} minutes (last fault: 450 to RCPT: come again)" in detail
