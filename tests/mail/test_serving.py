"""Mails of a server in a process of its own: to a mail server, or into files and onto the console."""

import email
import email.policy
import re
import signal
import subprocess
import time

import pytest
from harness import PROGRAM, Server, ask, clean_environment, run_command
from smtp import STALL, MailHost, free_port

REGISTRATION = {"contactEmail": "dev@acme.example", "displayName": "Acme Motors", "agreedToTerms": True}
CODE = re.compile(r"\b\d{6}\b")


def register(server, **changes):
    with server.client() as client:
        answer = client.post("/api/v2/Partners/Register", json=REGISTRATION | changes)
    assert answer.status_code == 202


def verify(server, code):
    with server.client() as client:
        body = {"contactEmail": REGISTRATION["contactEmail"], "verificationCode": code}
        return client.post("/api/v2/Partners/Register/Verify", json=body)


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def mails_in(data):
    paths = sorted((data / "outbox").glob("*.eml"))
    return [email.message_from_bytes(path.read_bytes(), policy=email.policy.default) for path in paths]


def text_of(message):
    return message.get_body(("plain",)).get_content()


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


def test_with_nothing_configured_the_code_lies_in_a_file_and_works(data):
    with Server(data, "--workers", "2") as server:
        register(server)
        (message,) = wait_for(lambda: mails_in(data))
        (code,) = CODE.findall(text_of(message))
        assert verify(server, code).status_code == 200
        assert server.process.poll() is None
        server.process.terminate()
        assert code not in server.process.stdout.read()
    assert len(mails_in(data)) == 1
    assert code not in server.log_path.read_text()
    assert all(code.encode() not in path.read_bytes() for path in data.glob("gatelodge.db*"))


def test_a_console_that_is_watched_is_shown_the_mails(data):
    port = free_port()
    command = [*PROGRAM, "serve", "--port", str(port), "--data", str(data)]
    process = subprocess.Popen(
        command, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        while "is up" not in process.stdout.readline():
            assert process.poll() is None
        register(Server(data, port=port))
        (message,) = wait_for(lambda: mails_in(data))
    finally:
        process.send_signal(signal.SIGTERM)
        said, logged = process.communicate(timeout=60)
    (code,) = CODE.findall(text_of(message))
    assert f"Your code is {code}" in said.splitlines()
    assert code not in logged


def test_a_mail_server_that_is_configured_gets_the_mails_logged_in(data):
    with MailHost(password="hunter2") as host:
        environ = {
            "GATELODGE_SMTP": f"smtp://127.0.0.1:{host.port}",
            "GATELODGE_SMTP_USER": "api",
            "GATELODGE_SMTP_PASSWORD": "hunter2",
            "GATELODGE_MAIL_FROM": "api@gate.example",
        }
        with Server(data, environ=environ) as server:
            register(server)
            (received,) = wait_for(lambda: host.received)
            (code,) = CODE.findall(received.text)
            partner_id = verify(server, code).json()["partnerId"]
            ask("partner", "deactivate", partner_id, data=data)  # another process queues the notice
            wait_for(lambda: len(host.received) == 2)
            server.stop()
    assert (received.sender, received.user, received.recipients) == ("api@gate.example", "api", ["dev@acme.example"])
    assert not (data / "outbox").exists()
    logged = server.log_path.read_text()
    assert '"mail_sent"' in logged
    assert code not in logged
    assert "hunter2" not in logged


def test_a_mail_server_that_hangs_keeps_a_stop_for_a_few_seconds_only_and_costs_no_mail(data):
    with MailHost() as host:
        host.rcpt = [STALL]
        with Server(data, environ={"GATELODGE_SMTP": f"smtp://127.0.0.1:{host.port}"}) as server:
            register(server)
            wait_for(lambda: host.attempts)
            started = time.monotonic()
            server.stop()
            assert time.monotonic() - started < 25
    assert host.received == []


@pytest.mark.parametrize(
    "environ",
    [
        {"GATELODGE_SMTP": "smtps://localhost", "GATELODGE_SMTP_USER": "api"},
        {"GATELODGE_SMTP": "smtps://localhost", "GATELODGE_SMTP_PASSWORD": "hunter2"},
        {"GATELODGE_SMTP_PASSWORD": "hunter2"},
    ],
)
def test_a_user_without_a_password_or_a_password_without_a_user_is_told_at_the_start(data, environ):
    done = run_command("serve", "--port", "0", data=data, environ=environ)
    assert done.returncode == 1
    assert "GATELODGE_SMTP_PASSWORD" in done.stderr
    assert "hunter2" not in done.stderr + done.stdout


def test_letters_in_files_do_not_lie_there_for_ever(data):
    old = data / "outbox" / f"20200101T000000.000Z-{'0' * 32}.eml"
    old.parent.mkdir(parents=True)
    old.touch()
    with Server(data):
        wait_for(lambda: not old.exists())
