"""Where sessions live."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

from gatelodge_server.core.model import Holder, Instant, Session, SessionEnd, Standing
from gatelodge_server.core.ports.common import Done, Refused


class LoginAttempt(NamedTuple):
    """A session to be opened with an API key. The instants are those of the session if it is."""

    key_id: str
    digest: bytes
    session_id: bytes
    now: Instant
    expires_at: Instant
    retires_at: Instant

    def at(self, now: Instant) -> "LoginAttempt":
        """The same at another moment: the session is to live as long."""
        later = now - self.now
        key_id, digest, session_id, _, expires_at, retires_at = self
        return LoginAttempt(key_id, digest, session_id, now, expires_at + later, retires_at + later)


class Opened(NamedTuple):
    """The session stands."""

    session: Session
    holder: Holder


class RefreshAttempt(NamedTuple):
    """A genuine refresh token was presented. ``retry`` is the digest of its Idempotency-Key."""

    session_id: bytes
    generation: int
    retry: bytes | None
    now: Instant
    expires_at: Instant
    """When the successor expires, unless the session retires before."""

    def at(self, now: Instant) -> "RefreshAttempt":
        """The same at another moment: the successor is to live as long."""
        session_id, generation, retry, before, expires_at = self
        return RefreshAttempt(session_id, generation, retry, now, expires_at + now - before)


class Advanced(NamedTuple):
    """This caller won: the session is one generation on."""

    session: Session
    holder: Holder


class Repeated(NamedTuple):
    """The same caller asks again for the successor that it never heard of."""

    session: Session
    holder: Holder


class Condemned(NamedTuple):
    """The token was spent, or from a lost future: the session has been ended by this very verb."""

    session: Session
    cause: SessionEnd


RefreshOutcome: TypeAlias = Advanced | Repeated | Condemned | Refused


class SessionStanding(NamedTuple):
    """A session and the credential that started it."""

    session: Session
    standing: Standing


@dataclass(frozen=True, slots=True)
class Purged:
    """A slice of the sessions was looked at up to ``after`` (``None``: the end was reached), ``deleted`` rows are gone."""

    after: bytes | None
    deleted: int


class SessionStore(Protocol):
    """Where sessions live. The first three verbs are the hot ones and are micro-batched."""

    async def open_session(self, attempt: LoginAttempt) -> Opened | Refused:
        """Judge the key (``credentials.judge_key``) and open a session in its partner's present epoch."""
        ...

    async def advance_session(self, attempt: RefreshAttempt) -> RefreshOutcome:
        """Judge the token (``sessions.judge_refresh``) and write what that says.

        Of any number of attempts with one generation, at any number of nodes, at most one is ``Advanced``. While somebody else
        holds the session it is tried again, for some seconds, and nobody else is kept waiting; then ``Unavailable`` is raised.
        """
        ...

    async def find_session(self, session_id: bytes) -> SessionStanding | None:
        """The session as it stands at this moment."""
        ...

    async def end_session(self, session_id: bytes, *, cause: SessionEnd, now: Instant, by: str) -> Done | None:
        """End the session; ``None`` when there is none or it has ended before."""
        ...

    async def purge_sessions(self, *, after: bytes | None, limit: int, ended_before: Instant) -> Purged:
        """Delete, among the next ``limit`` sessions by id, those that nobody could use since ``ended_before``."""
        ...
