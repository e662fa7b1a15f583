"""A PostgreSQL that has a standby: commits of the one wait for the other, as in Patroni's synchronous mode."""

import time
from collections.abc import Callable, Mapping
from typing import Self

if __package__:
    from tests.postgres import ADMINISTRATOR, PostgresServer
else:
    from postgres import ADMINISTRATOR, PostgresServer

_PACE = 0.01
_PATIENCE = 30.0


class Standby(PostgresServer):
    """Follows ``primary`` from the moment it is started, until it is promoted. ``environ`` as of any server."""

    def __init__(self, primary: PostgresServer, *, environ: Mapping[str, str] | None = None) -> None:
        super().__init__(environ=environ)
        self._primary = primary
        self._passwords = primary._passwords

    def promote(self) -> None:
        """Let it lead. Nobody tells the old leader."""
        self.run_sql("SELECT pg_promote()")

    def _make(self) -> None:
        where = f"host=127.0.0.1 port={self._primary.port} user={ADMINISTRATOR} application_name=standby"
        command = [self._program("pg_basebackup"), "--pgdata", str(self.data), "--dbname", where, "--write-recovery-conf"]
        password = {"PGPASSWORD": self._passwords[ADMINISTRATOR]}
        self._run([*command, "--wal-method=stream", "--checkpoint=fast", "--no-sync"], environ=password)


class Pair:
    """A leader and its standby. The leader acknowledges no commit that the standby does not have on its disk."""

    def __init__(self, *, environ: Mapping[str, str] | None = None) -> None:
        self.leader = PostgresServer()
        self.standby = Standby(self.leader, environ=environ)

    def __enter__(self) -> Self:
        self.leader.start()
        try:
            self.standby.start()
            # After the copy was made: the standby, promoted, waits for nobody.
            self.leader.run_sql("ALTER SYSTEM SET synchronous_standby_names = 'standby'", "SELECT pg_reload_conf()")
            in_step = "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync' AND replay_lsn = pg_current_wal_lsn()"
            wait_until(lambda: bool(self.leader.run_sql(in_step)))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.standby.remove()
        self.leader.remove()

    def url(self, database: str) -> str:
        """The address of a database with both hosts, the leader first."""
        return self.leader.url(database).replace(
            f"127.0.0.1:{self.leader.port}", f"127.0.0.1:{self.leader.port},127.0.0.1:{self.standby.port}"
        )


def wait_until(condition: Callable[[], bool]) -> None:
    """Return when something is so."""
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(_PACE)  # a pace: what is waited for is asked each time
