"""What is on record of a credential: read from the store, judged, and told to the ``Verifier`` that remembers it.

A credential that a request carries goes through three files: ``gatelodge.verify`` reads and remembers it, this one judges its
standing, ``store/keys.py``, ``store/tokens.py`` or ``store/sessions.py`` reads that. ``core/following.py`` says when what is
remembered has to be forgotten.
"""

from dataclasses import replace
from typing import Final, Protocol

from gatelodge.errors import CredentialExpired, CredentialRevoked, CredentialRotated, InvalidCredential, Rejected
from gatelodge.verify import Caller, CredentialKind, Grant, HolderKind
from gatelodge_server.core.credentials import END_REASONS, Credentials, judge_key
from gatelodge_server.core.following import ChangeFollower
from gatelodge_server.core.model import SECOND, Clock, Instant, Standing
from gatelodge_server.core.ports import DeploymentStore, PartnerStore, SessionStore, TokenStore
from gatelodge_server.core.refusals import RefreshTokenReused
from gatelodge_server.core.secrets import Secret
from gatelodge_server.core.sessions import SCOPES, judge_session

TOKEN_SCOPE: Final = frozenset({"api"})
"""What an access token lets its partner do: call the API, and not manage companies."""
_NEVER: Final = float("inf")


class RecordStore(SessionStore, PartnerStore, TokenStore, DeploymentStore, Protocol):
    """What the records are read from."""


class StoreRecords:
    """The records of one environment: a ``gatelodge.verify.Records``."""

    def __init__(self, *, store: RecordStore, credentials: Credentials, follower: ChangeFollower, clock: Clock) -> None:
        self._store = store
        self._credentials = credentials
        self._clock = clock
        self._environment = credentials.environment
        self.is_current = follower.is_current
        self.catch_up = follower.catch_up

    async def is_own_issuer(self, issuer: str) -> bool:
        """Whether this deployment ever issued tokens under this name."""
        return await self._store.is_issuer(issuer)

    async def find_session(self, claimed: Caller) -> Grant:
        """The session of a genuine JWT as it stands now, whatever the JWT says of its holder."""
        try:
            session_id = bytes.fromhex(claimed.session or "")
        except ValueError:
            raise CredentialRevoked from None
        found = await self._store.find_session(session_id)
        if found is None:
            raise CredentialRevoked
        reason = judge_session(found, self._clock())
        if reason is RefreshTokenReused or (reason is not None and not issubclass(reason, Rejected)):
            raise CredentialRevoked  # that a token was reused is the answer to a refresh; here the JWT is simply dead
        if reason is not None:
            raise reason
        standing = found.standing
        caller = replace(claimed, tier=standing.holder.tier, scopes=_scopes(claimed.kind))
        return _grant(caller, standing)

    async def find_token(self, claimed: Caller, digest: bytes) -> Grant:
        """An access token that was issued and still stands."""
        standing = await self._store.find_token(claimed.credential_id)
        reason = judge_key(standing, digest, self._clock())
        if reason is not None or standing is None:
            raise reason or InvalidCredential
        caller = replace(claimed, partner=standing.holder.partner_id, tier=standing.holder.tier, scopes=TOKEN_SCOPE)
        return _grant(caller, standing)

    async def find_key(self, text: str) -> Grant:
        """An API key of this environment."""
        key = self._credentials.recognise(Secret(text))
        standing, now = await self._store.find_key(key.id), self._clock()
        reason = judge_key(standing, key.digest, now)
        if reason is not None or standing is None:
            raise reason or InvalidCredential
        if standing.first_used_at is None:
            await self._store.note_first_use(key.id, now=now)
        holder = standing.holder
        kind: HolderKind = "partner" if holder.company_id is None else "company"
        sort: CredentialKind = "api-key"
        caller = Caller(
            partner=holder.partner_id,
            company=None if holder.company_id is None else str(holder.company_id),
            kind=kind,
            tier=holder.tier,
            scopes=_scopes(kind),
            credential=sort,
            credential_id=holder.credential_id,
            session=None,
            token_id=None,
            environment=self._environment,
            expires_at=None,
        )
        return _grant(caller, standing)


def _scopes(kind: HolderKind) -> frozenset[str]:
    return frozenset(SCOPES[kind].split())


def _grant(caller: Caller, standing: Standing) -> Grant:
    """What is told of a credential that stands: an end that is known now needs no change to come about."""
    if standing.ends_at is None:
        return Grant(caller, _NEVER, CredentialExpired)
    reason = END_REASONS[standing.end_cause] if standing.end_cause is not None else CredentialRevoked
    if reason is CredentialRotated:
        caller = replace(caller, rotated_at=_seconds(standing.rotated_at), sunset_at=_seconds(standing.ends_at))
    return Grant(caller, standing.ends_at / SECOND, reason)


def _seconds(instant: Instant | None) -> int | None:
    return None if instant is None else instant // SECOND
