"""Access tokens: JWTs that do not expire, handed to managed partners by a partner manager.

The life of one, in order:

1. *Issue.* ``AccessTokens.issue`` signs it with the ring of keys that is for access tokens only, and ``store/tokens.py`` keeps
   who it is for and its SHA-256. The text is shown this once. A token that was signed but not kept lets nobody in.
2. *Use.* The gate checks the signature, finds the token's standing by its `jti`, and asks ``judge_token``. Tier and
   status of the partner are not in the token, so what changes there holds at once.
3. *Rotate.* ``rotate`` puts a new version in its place; the versions share a lineage. The old one dies at once, or after the
   overlap that the manager names, in which both work.
4. *Revoke.* ``revoke`` ends a version for good, whatever was planned for it; deactivating the partner ends them all.
5. *Retire.* A signing key stays published while a live token needs it; ``signing.plan_withdrawals`` says when none does.

The other two files: ``store/tokens.py``, ``core/signing.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from gatelodge.errors import Rejected, Unavailable
from gatelodge.wire import ACCESS_TYPES, Claim
from gatelodge_server.core.credentials import digest_key, judge_key
from gatelodge_server.core.ids import access_token_id
from gatelodge_server.core.model import SECOND, AccessToken, Clock, Duration, Entropy, Instant, Standing
from gatelodge_server.core.ports import DeploymentStore, Done, PartnerStore, Refused, TokenStore
from gatelodge_server.core.refusals import PartnerNotFound, SigningKeyNotFound, TokenNotFound
from gatelodge_server.core.secrets import Secret
from gatelodge_server.core.signing import SigningKeys

ACCESS_SCOPE: Final = "api"
"""What an access token is good for, as its `scope` claim says it (RFC 8693 4.2)."""

_TYPE: Final = ACCESS_TYPES[0]


def digest_token(text: Secret) -> bytes:
    """What is stored of a token: the SHA-256 of its whole text.

    The signature is part of it, so a second signature over the same claims, which ECDSA allows, makes no second token.
    """
    return digest_key(text)


def judge_token(standing: Standing | None, digest: bytes, now: Instant) -> type[Rejected] | None:
    """Why the presenter of a genuinely signed token may not come in at ``now``; ``None`` if it may.

    One that was never issued, or of which another text was, is an ``InvalidCredential`` like any foreign one.
    """
    return judge_key(standing, digest, now)


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """A new token: what is stored of it, and the one time that it can be read."""

    token: AccessToken
    text: Secret
    sequence: int | None = None
    """Of the change that it came with."""


class AccessTokenStore(TokenStore, PartnerStore, DeploymentStore, Protocol):
    """What access tokens need of a store."""


class AccessTokens:
    """The access tokens of one environment."""

    def __init__(
        self,
        *,
        store: AccessTokenStore,
        signing_keys: SigningKeys,
        clock: Clock,
        entropy: Entropy,
        issuer: str,
        audience: str,
        environment: str,
    ) -> None:
        self._store = store
        self._signing_keys = signing_keys
        self._clock = clock
        self._entropy = entropy
        self._issuer = issuer
        self._audience = audience
        self._environment = environment

    async def issue(self, partner_id: str, *, label: str, by: str) -> IssuedToken:
        """Make a token for a partner. Raises ``PartnerNotFound``, ``PartnerDeactivated`` or ``Unavailable``."""
        issued = await self._make(partner_id, label, self._clock())
        return _unless_refused(issued, await self._store.issue_token(issued.token, by=by))

    async def list_for(self, partner_id: str) -> Sequence[AccessToken]:
        """All versions of a partner's tokens, newest first. Raises ``PartnerNotFound``."""
        if await self._store.find_partner(partner_id) is None:
            raise PartnerNotFound
        return await self._store.list_tokens(partner_id)

    async def versions(self, token_id: str) -> Sequence[AccessToken]:
        """The versions of the token of which ``token_id`` is one, newest first. Raises ``TokenNotFound``."""
        return await self._store.list_token_versions((await self._get(token_id)).lineage_id)

    async def rotate(self, token_id: str, *, overlap: Duration, by: str) -> IssuedToken:
        """Replace a live token; the old one works on for ``overlap``. Raises what ``roll_token`` refuses with."""
        old = await self._get(token_id)
        now = self._clock()
        made = await self._make(old.partner_id, old.label, now)
        issued = replace(made, token=replace(made.token, lineage_id=old.lineage_id, version=old.version + 1))
        return _unless_refused(
            issued, await self._store.roll_token(token_id, issued.token, ends_at=now + overlap, now=now, by=by)
        )

    async def revoke(self, token_id: str, *, by: str) -> int:
        """End a token for good. The change's sequence number. Raises ``TokenNotFound``."""
        match await self._store.revoke_token(token_id, now=self._clock(), by=by):
            case Refused(reason):
                raise reason
            case done:
                return done.sequence

    async def _get(self, token_id: str) -> AccessToken:
        token = await self._store.get_token(token_id)
        if token is None:
            raise TokenNotFound
        return token

    async def _make(self, partner_id: str, label: str, now: Instant) -> IssuedToken:
        """Sign a first version. Nothing of it is stored yet, but every server on the database knows the issuer."""
        signer = await self._signing_keys.signer(now)
        await self._store.note_issuer(self._issuer, now=now)
        id_ = access_token_id(self._entropy)
        claims: dict[str, object] = {
            Claim.ISSUER: self._issuer,
            Claim.SUBJECT: partner_id,
            Claim.AUDIENCE: self._audience,
            Claim.ISSUED_AT: now // SECOND,
            Claim.TOKEN_ID: id_,
            Claim.ENVIRONMENT: self._environment,
            Claim.KIND: "partner",
            Claim.PARTNER: partner_id,
            Claim.SCOPE: ACCESS_SCOPE,
        }
        text = Secret(signer.sign(claims, typ=_TYPE))
        token = AccessToken(
            id=id_,
            lineage_id=id_,
            version=1,
            partner_id=partner_id,
            label=label,
            kid=signer.kid,
            digest=digest_token(text),
            created_at=now,
        )
        return IssuedToken(token, text)


def _unless_refused(issued: IssuedToken, outcome: Done | Refused) -> IssuedToken:
    match outcome:
        case Refused(reason) if reason is SigningKeyNotFound:
            # The key was retired after this node last read the ring. A moment later it signs with another.
            raise Unavailable
        case Refused(reason):
            raise reason
        case done:
            return replace(issued, sequence=done.sequence)
