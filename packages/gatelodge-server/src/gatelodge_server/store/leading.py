"""Which server leads: what one process knows of it, and for how long that is believed.

A server of PostgreSQL that another has taken the place of, and that nobody has fenced, answers whatever is read from it, and
knows nothing of what was revoked since. What it cannot do is commit: with ``synchronous_standby_names`` a commit waits for a
standby, and the standby that it waits for is the one that leads now. So a commit that was acknowledged proves that its server
led when it was asked for; and what is read from that server afterwards is at least as new.

1. A transaction that reads needs a proof of its own server that is not too old. The first one that finds none asks for it, and
   all others wait for that (``PostgresDriver``). While it is only getting old it is renewed beside everything else.
2. What a process remembers is believed for the maximum staleness after the last proof: then the bell does not stop ringing.
3. A proof of another server takes the place of the one that was believed before. So there is one that is believed, and what it
   says does not go back.
4. Whoever does not prove it in time is doubted: its connections are given up, and of several hosts it is tried last. It leads
   still, and its standby is away; or it does not, and another does.
"""

from collections import Counter
from collections.abc import Callable
from typing import Final

from sqlalchemy import Connection

from gatelodge_server.core.following import MAX_STALENESS

PROOF: Final = "SELECT pg_logical_emit_message(true, 'gatelodge', '')"
"""A commit that writes nothing but itself into the write-ahead log: it needs no table, no right and no row."""
NAME: Final = "SELECT pg_postmaster_start_time()::text"
"""What tells a server from every other. A server that has lost the lead is started anew before it can lead again."""
RENEWAL: Final = 2.0
"""Seconds after which a proof is renewed."""
TRUST: Final = 4.0
"""Seconds after a proof for which a reading may begin: it is over before the maximum staleness is."""
PROOF_PATIENCE: Final = 3.0
"""Seconds within which a proof is given."""
UNPROVEN: Final = "no standby confirms what is committed: the server may not lead any more"
_NEVER: Final = float("-inf")


def prove_leading(connection: Connection) -> None:
    """Let the commit of a transaction be a proof also if it has written nothing. SQLite has one file, and needs none."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(PROOF)


class NotLeadingError(ConnectionError):
    """A server has not proved that it leads. Another connection may lead to one that does."""


class Leader:
    """The server that has proved last that it leads, and those that are doubted."""

    def __init__(self, *, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._server: str | None = None
        self._proved_at = _NEVER
        self._doubted: set[str] = set()
        self._doubts: Counter[str] = Counter()

    def has_proved(self, server: str, *, since: float) -> bool:
        """Whether this server leads, by a proof that was asked for at this moment or later."""
        return server == self._server and self._proved_at >= since

    def is_due(self) -> bool:
        """Whether the proof ought to be renewed."""
        return self._monotonic() >= self._proved_at + RENEWAL

    def has_lapsed(self) -> bool:
        """Whether there was a proof, and what was heard by it is too old to be believed."""
        return self._server is not None and self._monotonic() >= self._proved_at + MAX_STALENESS

    def note(self, server: str, *, asked_at: float) -> bool:
        """Hear a proof; whether it is another server than before that leads."""
        if asked_at < self._proved_at:
            return False  # of an earlier time than what is known
        before, self._server, self._proved_at = self._server, server, asked_at
        self._doubted.discard(server)
        if before is None or before == server:
            return False
        self.doubt(before)
        return True

    def doubt(self, server: str) -> None:
        """Let the connections that there are to this server be of no use any more."""
        self._doubted.add(server)
        self._doubts[server] += 1

    def is_doubted(self, server: str) -> bool:
        """Whether another server is to be preferred, if there is one: until it proves that it leads."""
        return server in self._doubted

    def doubts(self, server: str) -> int:
        """How often this server has been doubted."""
        return self._doubts[server]
