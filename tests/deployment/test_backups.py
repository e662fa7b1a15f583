"""Backup and restore as the deployment guide shows them, of real servers; and what an old backup means."""

import os
import shutil
import subprocess
import threading
from pathlib import Path

import processes
import pytest
import yaml
from guide import ROOT, block, blocks, fit
from harness import Server, clean_environment, run_command
from outside import add_partner, ask, bearer, log_in, outcome, refresh, until
from postgres import ADMINISTRATOR, DURABLE, PostgresServer

GOOD = (200, None)
NO_COMMANDS = ("GATELODGE_",)
"""Blocks that are lines of an environment file."""


def sh(text, **environ):
    """Run a block as somebody would who pastes it."""
    done = subprocess.run(
        ["/bin/sh", "-euc", text], env=clean_environment(environ), capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_every_block_of_commands_is_run():
    shown = [line.split()[0] for text in blocks("sh") for line in text.splitlines()[:1]]
    known = (*NO_COMMANDS, "sqlite3", "rm", "pg_dump", "pg_restore", "pg_basebackup", "cp")
    assert [word for word in shown if not word.startswith(known)] == []
    assert all(any(word.startswith(each) for word in shown) for each in known)


@pytest.fixture
def server(tmp_path):
    with Server(tmp_path / "data") as running:
        yield running


@pytest.fixture
def where(tmp_path, server):
    """What the blocks call their directories."""
    (tmp_path / "backup").mkdir()
    return {"DATA": str(server.data), "BACKUP": str(tmp_path / "backup")}


def restart_from(server, where):
    server.stop()
    sh(block("sh", "rm -f"), **where)
    looked = run_command("doctor", data=server.data)
    assert looked.returncode == 0, looked.stdout + looked.stderr
    server.start()


class Refreshing(threading.Thread):
    """Moves a session on and on, so that the database changes while it is copied."""

    def __init__(self, client, token):
        super().__init__(daemon=True)
        self._client, self.tokens = client, [token]
        self._over = threading.Event()

    def run(self):
        while not self._over.is_set():
            self.tokens.append(refresh(self._client, self.tokens[-1]).json()["refreshToken"])

    def end(self):
        self._over.set()
        self.join(30)


@pytest.mark.parametrize("how", [".backup", "VACUUM INTO"])
def test_a_server_that_is_busy_is_copied_and_restored(server, where, how):
    partner = add_partner(server.data)
    with server.client() as client, server.client() as another:
        quiet = log_in(client, partner.key)["refreshToken"]
        busy = Refreshing(another, log_in(client, partner.key)["refreshToken"])
        busy.start()
        until(lambda: len(busy.tokens) > 2, "it is busy")
        sh(block("sh", how), **where)
        busy.end()
    (copy,) = Path(where["BACKUP"]).iterdir()
    copy.rename(copy.with_name("gatelodge.db"))
    restart_from(server, where)
    with server.client() as client:
        assert refresh(client, quiet).status_code == 200
        assert outcome(refresh(client, busy.tokens[0])) == (401, "refresh_token_reused")


def test_what_came_after_the_backup_is_gone_and_what_was_revoked_is_alive(server, where):
    early, doomed = add_partner(server.data), add_partner(server.data)
    with server.client() as client:
        session = log_in(client, early.key)
        sh(block("sh", ".backup"), **where)
        moved = refresh(client, session["refreshToken"]).json()
        unknown = log_in(client, early.key)
        late = add_partner(server.data)
        ask("key", "revoke", doomed.key_id, data=server.data)
        assert outcome(client.post("/auth/login", json={"apiKey": doomed.key})) == (401, "credential_revoked")
    restart_from(server, where)
    with server.client() as client:
        # A refresh: from the future. Nobody knows who holds the one before, so that is dead with it.
        assert outcome(refresh(client, moved["refreshToken"]))[0] == 401
        assert outcome(refresh(client, session["refreshToken"]))[0] == 401
        assert "session.restored" in [event["action"] for event in ask("audit", data=server.data)]
        # A login, a new partner: unknown.
        assert outcome(refresh(client, unknown["refreshToken"]))[0] == 401
        assert outcome(client.get("/companies", headers=bearer(unknown["jwt"])))[0] == 401
        assert outcome(client.post("/auth/login", json={"apiKey": late.key})) == (401, "invalid_credential")
        # A revocation: undone, until it is done again.
        assert outcome(client.post("/auth/login", json={"apiKey": doomed.key})) == GOOD
        ask("key", "revoke", doomed.key_id, data=server.data)
        assert outcome(client.post("/auth/login", json={"apiKey": doomed.key})) == (401, "credential_revoked")
        # And everybody can come back.
        assert log_in(client, early.key)


@pytest.fixture
def postgres_server():
    with PostgresServer() as running:
        yield running


@pytest.fixture
def archive():
    """Where the log is kept."""
    return processes.working_directory("archive")


@pytest.fixture
def archiving_server(archive):
    """One that keeps its log as the shipped file says."""
    shipped = yaml.safe_load((ROOT / "deploy" / "patroni.yml").read_text("utf-8"))["bootstrap"]["dcs"]["postgresql"][
        "parameters"
    ]
    settings = {name: shipped[name] for name in ("archive_mode", "archive_command")}
    settings["archive_command"] = fit(settings["archive_command"], {"/backup/wal": str(archive)})
    with PostgresServer(settings={**DURABLE, **settings}) as running:
        yield running
    processes.remove(archive)


@pytest.fixture
def node(tmp_path, postgres_server):
    """A server whose settings name a database on that server."""
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    (data / "gatelodge.toml").write_text(f'database = "{postgres_server.create("gatelodge")}"\n')
    with Server(data) as running:
        yield running


@pytest.fixture
def there(tmp_path, postgres_server):
    return blocks_environment(tmp_path, postgres_server)


def blocks_environment(directory, server):
    """What the blocks for PostgreSQL find in their environment."""
    (directory / "backup").mkdir()
    return {
        "BACKUP": str(directory / "backup"),
        "PATH": f"{server.programs}:{os.environ['PATH']}",
        "URL": server.url("gatelodge"),
        "ADMINISTRATOR_URL": server.url("postgres", role=ADMINISTRATOR),
    }


def put_back(server, backup, prepare=lambda _: None):
    """A base backup in place of a data directory, of the same owner. ``prepare`` is told where the old one is."""
    owner, old = server.data.stat(), server.root / "old"
    server.data.rename(old)
    shutil.copytree(backup, server.data)
    prepare(old)
    for path in (server.data, *server.data.rglob("*")):
        os.chown(path, owner.st_uid, owner.st_gid)
    server.data.chmod(0o700)


@pytest.mark.parametrize("how", ["a dump", "a base backup"])
def test_a_database_on_postgresql_is_copied_while_it_serves_and_restored(node, there, postgres_server, how):
    early = add_partner(node.data)
    with node.client() as client:
        quiet = log_in(client, early.key)["refreshToken"]
        sh(block("sh", "pg_dump" if how == "a dump" else "pg_basebackup"), **there)
        late = add_partner(node.data)
    node.stop()
    if how == "a dump":
        sh(block("sh", "pg_restore"), **there)
    else:
        postgres_server.stop()
        put_back(postgres_server, Path(there["BACKUP"]) / "base")
        postgres_server.start()
    looked = run_command("doctor", data=node.data)
    assert looked.returncode == 0, looked.stdout + looked.stderr
    node.start()
    with node.client() as client:
        assert refresh(client, quiet).status_code == 200
        assert outcome(client.post("/auth/login", json={"apiKey": late.key})) == (401, "invalid_credential")
        assert add_partner(node.data).id != early.id


class Recovery:
    """A deployment that knows three partners: one before the base backup, one before the moment, one after it."""

    def __init__(self, node, server, archive, there):
        self._node, self._server, self._archive = node, server, archive
        self._base = Path(there["BACKUP"]) / "base"
        self.first = add_partner(node.data)
        sh(block("sh", "pg_basebackup"), **there)
        self.early = add_partner(node.data)
        ((self._moment,),) = server.run_sql("SELECT clock_timestamp()")
        self.late = add_partner(node.data)
        node.stop()

    def recover(self, *, to_the_moment, with_old_log):
        """Go back as the guide says, and start the node."""
        shown = block("ini", "restore_command")
        settings = fit(shown, {"/backup/wal": str(self._archive), "2026-01-31 12:00:00+00": self._moment})
        if not to_the_moment:
            settings = "".join(line for line in settings.splitlines(True) if not line.startswith("recovery_target_time"))
            assert settings.count("\n") == shown.count("\n") - 1

        def prepare(old):
            if with_old_log:
                sh(block("sh", "pg_wal"), OLD=str(old), PGDATA=str(self._server.data))
            with (self._server.data / "postgresql.auto.conf").open("a") as file:
                file.write(settings)
            (self._server.data / "recovery.signal").touch()

        put_back(self._server, self._base, prepare)
        self._server.start()
        until(lambda: self._server.run_sql("SELECT pg_is_in_recovery()") == [["f"]], "the database takes writes")
        looked = run_command("doctor", data=self._node.data)
        assert looked.returncode == 0, looked.stdout + looked.stderr
        self._node.start()

    def logins(self):
        """What becomes of the three."""
        with self._node.client() as client:
            partners = (self.first, self.early, self.late)
            return [outcome(client.post("/auth/login", json={"apiKey": partner.key})) for partner in partners]

    def add(self):
        """One more, who logs in."""
        with self._node.client() as client:
            return log_in(client, add_partner(self._node.data).key)


@pytest.fixture
def recovery(archiving_server, archive, tmp_path):
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    (data / "gatelodge.toml").write_text(f'database = "{archiving_server.create("gatelodge")}"\n')
    with Server(data) as running:
        yield Recovery(running, archiving_server, archive, blocks_environment(tmp_path, archiving_server))


def test_a_database_on_postgresql_goes_back_to_a_moment_and_takes_writes(recovery, archiving_server):
    archiving_server.stop()  # what it had not archived yet goes into the archive now
    recovery.recover(to_the_moment=True, with_old_log=False)
    assert recovery.logins() == [GOOD, GOOD, (401, "invalid_credential")]
    assert recovery.add()


def test_a_database_on_postgresql_that_was_killed_comes_back_with_all_that_it_acknowledged(recovery, archiving_server):
    archiving_server.kill()
    recovery.recover(to_the_moment=False, with_old_log=True)
    assert recovery.logins() == [GOOD, GOOD, GOOD]
    assert recovery.add()
