"""Sessions: a login opens one, a refresh moves it on, reuse and logout end it.

What happens at a login (``POST /auth/login``):

1. ``http/sessions.py`` has parsed the body; ``Sessions.log_in`` recognises the key's shape without a look-up.
2. ``store/sessions.py`` reads the key's standing, asks ``credentials.judge_key`` and inserts the session, in one transaction.
3. The session JWT and the refresh token are made from the row and handed out. Neither is stored.

What happens at a refresh (``POST /auth/refresh``):

1. ``RefreshTokens.read`` checks the token's MAC: a forged one ends here.
2. ``store/sessions.py`` locks the row, asks ``judge_refresh`` and writes what it says, in one transaction, committed before
   anybody is told. Reuse therefore ends the session whatever becomes of the answer.
3. As above.
"""

from dataclasses import dataclass
from typing import Final, NamedTuple, assert_never

from gatelodge.errors import CredentialExpired, CredentialRevoked
from gatelodge.wire import SESSION_TYPES, Claim
from gatelodge_server.core.credentials import Credentials, judge_standing
from gatelodge_server.core.ids import token_id, uuid7
from gatelodge_server.core.model import (
    DAY,
    HOUR,
    MINUTE,
    SECOND,
    Clock,
    Duration,
    Entropy,
    Holder,
    Instant,
    Session,
    SessionEnd,
)
from gatelodge_server.core.ports import (
    Advanced,
    Condemned,
    Digester,
    LoginAttempt,
    Opened,
    Reason,
    RefreshAttempt,
    RefreshOutcome,
    Refused,
    Repeated,
    SessionStanding,
    SessionStore,
)
from gatelodge_server.core.refresh_tokens import RefreshTokens
from gatelodge_server.core.refusals import RefreshTokenReused
from gatelodge_server.core.secrets import Secret
from gatelodge_server.core.signing import Signer, SigningKeys

SCOPES: Final[dict[str, str]] = {"partner": "api companies", "company": "api"}
"""What the holder of each kind may do, as in the `scope` claim (RFC 8693 4.2: words between spaces)."""

RETRY_WINDOW: Final[Duration] = MINUTE
"""For so long after a refresh may its answer be asked for again."""

_SESSION_TYPE: Final = SESSION_TYPES[0]


@dataclass(frozen=True, slots=True)
class SessionLifetimes:
    """How long what a login gives out is good for."""

    jwt_ttl: Duration = 24 * HOUR
    refresh_ttl: Duration = 30 * DAY
    """From the last refresh: so this is also how long a session may lie idle."""
    session_ttl: Duration = 90 * DAY
    """From the login, however busy the session is."""


class SessionTokens(NamedTuple):
    """What a login or a refresh gives out."""

    jwt: Secret
    jwt_expires_at: Instant
    refresh_token: Secret
    refresh_expires_at: Instant
    holder: Holder
    session_id: bytes


def judge_session(found: SessionStanding, now: Instant) -> Reason | None:
    """Why nobody may come in on this session at ``now``; ``None`` if its holder may."""
    session, standing = found.session, found.standing
    if session.end_cause is SessionEnd.REUSE:
        return RefreshTokenReused
    if session.ended_at is not None:
        return CredentialRevoked
    reason = judge_standing(standing, now)
    if reason is not None:
        return reason
    if session.epoch != standing.session_epoch:
        # Suspension ended the session for good; a partner that is active again logs in anew.
        return CredentialRevoked
    return None


def judge_refresh(found: SessionStanding | None, attempt: RefreshAttempt) -> RefreshOutcome:
    """What becomes of a genuine refresh token. Pure: the store writes the session that ``Advanced``/``Condemned`` carry."""
    if found is None:
        # Its MAC was right, so it was ours once: rows are dropped a while after they expire or end.
        return Refused(CredentialExpired)
    session, now = found.session, attempt.now
    reason = judge_session(found, now)
    if reason is not None:
        return Refused(reason)
    if attempt.generation > session.generation:
        # A future that the row does not know: the database has been restored from a backup. Whoever holds the token of the
        # row's own generation may be the one whom the lost refresh had shut out.
        return _condemn(session, SessionEnd.RESTORED, now)
    spent = attempt.generation < session.generation
    if spent and not _is_retry(session, attempt):
        return _condemn(session, SessionEnd.REUSE, now)
    if now >= min(session.expires_at, session.retires_at):
        return Refused(CredentialExpired)
    if spent:
        return Repeated(session, found.standing.holder)
    moved = session._replace(
        generation=session.generation + 1,
        rotated_at=now,
        expires_at=min(attempt.expires_at, session.retires_at),
        retry_digest=attempt.retry,
    )
    return Advanced(moved, found.standing.holder)


def _is_retry(session: Session, attempt: RefreshAttempt) -> bool:
    # Plain comparison: the digest is keyed, so its bytes tell nothing to somebody who does not hold the Idempotency-Key.
    return (
        attempt.retry is not None
        and attempt.retry == session.retry_digest
        and attempt.generation == session.generation - 1
        and attempt.now < session.rotated_at + RETRY_WINDOW
    )


def _condemn(session: Session, cause: SessionEnd, now: Instant) -> Condemned:
    return Condemned(session._replace(ended_at=now, end_cause=cause), cause)


class Sessions:
    """Log in, refresh, log out."""

    def __init__(
        self,
        *,
        store: SessionStore,
        credentials: Credentials,
        refresh_tokens: RefreshTokens,
        signing_keys: SigningKeys,
        digester: Digester,
        clock: Clock,
        entropy: Entropy,
        issuer: str,
        audience: str,
        environment: str,
        lifetimes: SessionLifetimes,
    ) -> None:
        self._store = store
        self._credentials = credentials
        self._refresh_tokens = refresh_tokens
        self._signing_keys = signing_keys
        self._digester = digester
        self._clock = clock
        self._entropy = entropy
        self._issuer = issuer
        self._audience = audience
        self._environment = environment
        self._lifetimes = lifetimes

    async def log_in(self, presented: Secret) -> SessionTokens:
        """Open a session with an API key. Raises a ``Rejected``; ``InvalidCredential`` tells nothing of what was wrong."""
        key = self._credentials.recognise(presented)
        now = self._clock()
        attempt = LoginAttempt(
            key_id=key.id,
            digest=key.digest,
            session_id=uuid7(now, self._entropy),
            now=now,
            expires_at=now + min(self._lifetimes.refresh_ttl, self._lifetimes.session_ttl),
            retires_at=now + self._lifetimes.session_ttl,
        )
        signer = await self._signing_keys.signer(now)
        match await self._store.open_session(attempt):
            case Opened(session, holder):
                return self._hand_out(session, holder, signer, now)
            case Refused(reason):
                raise reason
            case unreachable:
                assert_never(unreachable)

    async def refresh(self, token: Secret, *, idempotency_key: str | None) -> SessionTokens:
        """Move a session on. Raises a ``Rejected`` or ``RefreshTokenReused``; what it announces is committed before."""
        claim = self._refresh_tokens.read(token)
        now = self._clock()
        attempt = RefreshAttempt(
            session_id=claim.session_id,
            generation=claim.generation,
            retry=self._retry_digest(claim.session_id, idempotency_key),
            now=now,
            expires_at=now + self._lifetimes.refresh_ttl,
        )
        signer = await self._signing_keys.signer(now)
        match await self._store.advance_session(attempt):
            case Advanced(session, holder) | Repeated(session, holder):
                return self._hand_out(session, holder, signer, now)
            case Condemned(_, SessionEnd.REUSE):
                raise RefreshTokenReused
            case Condemned():
                raise CredentialRevoked
            case Refused(reason):
                raise reason
            case unreachable:
                assert_never(unreachable)

    def session_of(self, token: Secret) -> bytes:
        """The id of the session of a refresh token, spent or not. Raises a ``Rejected``."""
        return self._refresh_tokens.read(token).session_id

    async def log_out(self, token: Secret) -> bytes:
        """End the session of a refresh token, spent or not; its id. Ending it twice is no fault. Raises a ``Rejected``."""
        session_id = self.session_of(token)
        await self.end(session_id)
        return session_id

    async def end(self, session_id: bytes) -> int | None:
        """End a session at its holder's wish. The change's sequence number; ``None`` if it had ended before."""
        done = await self._store.end_session(session_id, cause=SessionEnd.LOGOUT, now=self._clock(), by="session")
        return None if done is None else done.sequence

    async def authenticate(self, session_id: bytes) -> Holder:
        """Whom a session speaks for at this moment, whatever a JWT says. Raises the reason if nobody."""
        found = await self._store.find_session(session_id)
        if found is None:
            raise CredentialRevoked
        reason = judge_session(found, self._clock())
        if reason is RefreshTokenReused:
            raise CredentialRevoked  # that a token was reused is the answer to a refresh; here the JWT is simply dead
        if reason is not None:
            raise reason
        return found.standing.holder

    def _retry_digest(self, session_id: bytes, idempotency_key: str | None) -> bytes | None:
        if idempotency_key is None:
            return None
        return self._digester.digest(session_id + idempotency_key.encode("ascii"), purpose="refresh-retry")

    def _hand_out(self, session: Session, holder: Holder, signer: Signer, now: Instant) -> SessionTokens:
        issued = now // SECOND
        expires = min(now + self._lifetimes.jwt_ttl, session.retires_at) // SECOND
        company = str(holder.company_id) if holder.company_id is not None else None
        kind = holder.kind
        claims: dict[str, object] = {
            Claim.ISSUER: self._issuer,
            Claim.SUBJECT: company or holder.partner_id,
            Claim.AUDIENCE: self._audience,
            Claim.ISSUED_AT: issued,
            Claim.EXPIRES_AT: expires,
            Claim.TOKEN_ID: token_id(self._entropy),
            Claim.CLIENT_ID: holder.credential_id,
            Claim.SESSION: session.id.hex(),
            Claim.ENVIRONMENT: self._environment,
            Claim.KIND: kind,
            Claim.PARTNER: holder.partner_id,
            Claim.TIER: holder.tier,
            Claim.SCOPE: SCOPES[kind],
            Claim.EPOCH: session.epoch,
        }
        if company is not None:
            claims[Claim.COMPANY] = company
        return SessionTokens(
            jwt=Secret(signer.sign(claims, typ=_SESSION_TYPE)),
            jwt_expires_at=expires * SECOND,
            refresh_token=self._refresh_tokens.write(session.id, session.generation),
            refresh_expires_at=session.expires_at,
            holder=holder,
            session_id=session.id,
        )
