"""A credential becomes a ``Caller``, or a refusal.

There are three kinds, and one way in for all of them:

- a *session JWT* (RFC 9068) and an *access token* (a JWT without expiry) are read by ``tokens.read_unverified``, their key is
  found in the ring of their own kind (``keyset``), and ``tokens.verify_token`` judges them;
- an *API key* is opaque; only its issuer can say whose it is.

What a signature cannot tell, whether the credential was ever issued and whether it still stands, is asked of the issuer's
``Records``. Without records a verifier works offline and knows session JWTs only; ``Revocations`` then tell it which of them
have ended before their time.

What was found good is remembered, by its SHA-256, until its time is over or the records say that something about it has
changed (``forget``). So a credential on its second request costs neither a signature nor a look-up.
"""

import hashlib
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple, Protocol, TypeGuard, get_args

from gatelodge.errors import CredentialExpired, InvalidCredential, Rejected, WrongEnvironment
from gatelodge.keyset import Keys
from gatelodge.revocations import JwtMarks, Revocations
from gatelodge.tokens import TokenRules, UnverifiedToken, VerificationKey, read_unverified, verify_token
from gatelodge.wire import ENVIRONMENT_PATTERN, TOKEN_MAX_LENGTH, Claim

HolderKind = Literal["partner", "company"]
HOLDER_KINDS: Final[tuple[HolderKind, ...]] = get_args(HolderKind)
CredentialKind = Literal["session", "access-token", "api-key"]

# Everything about a caller may end up in a header or a log line: visible ASCII, and not too much of it.
_WORD = re.compile(r"[!-~]{1,128}")
# RFC 9562 section 4, in lower case only: one spelling of an id.
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# RFC 6749 3.3: scope tokens, separated by single spaces.
_SCOPE_TOKEN = r"[!#-\[\]-~]+"  # noqa: S105 - a grammar
_SCOPE = re.compile(rf"(?:{_SCOPE_TOKEN}(?: {_SCOPE_TOKEN})*)?")
_SCOPE_MAX_LENGTH: Final = 1024
_NEVER: Final = float("inf")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request, as the issuer has said.

    ``session`` and ``token_id`` (the `jti`) are ``None`` where the credential has none. ``expires_at`` is in Unix seconds,
    before any leeway; ``None`` for what does not expire. ``rotated_at``, in Unix seconds, is set while an older credential
    still works beside the newer one that takes its place; ``sunset_at`` is when it stops.
    """

    partner: str
    company: str | None
    kind: HolderKind
    tier: str
    scopes: frozenset[str]
    credential: CredentialKind
    credential_id: str
    session: str | None
    token_id: str | None
    environment: str
    expires_at: int | None
    rotated_at: int | None = None
    sunset_at: int | None = None


class Grant(NamedTuple):
    """What the issuer has on record of a genuine credential: whose it is now, and when and why that ends."""

    caller: Caller
    ends_at: float
    """In Unix seconds; infinity if no end is known."""
    reason: type[Rejected]
    """With what it is refused from then on."""


class Records(Protocol):
    """What only the issuer knows. ``Unavailable`` is raised where it cannot be known at the moment: fail closed."""

    def is_current(self) -> bool:
        """Whether everything that was found is still so, but for what ``Verifier.forget`` has been told."""
        ...

    async def catch_up(self) -> None:
        """Become current: tell ``Verifier.forget`` of all that has changed."""
        ...

    async def is_own_issuer(self, issuer: str) -> bool:
        """Whether the issuer's tokens may bear this name too: it may have had others, and may run under several."""
        ...

    async def find_session(self, claimed: Caller) -> Grant:
        """What is on record of the session whose genuine JWT says ``claimed``. Raises a ``Rejected``."""
        ...

    async def find_token(self, claimed: Caller, digest: bytes) -> Grant:
        """What is on record of the access token that says ``claimed`` and has this SHA-256. Raises a ``Rejected``.

        A token that was signed but never issued is an ``InvalidCredential``.
        """
        ...

    async def find_key(self, text: str) -> Grant:
        """What is on record of an API key. Raises a ``Rejected``."""
        ...


class AccessRing(NamedTuple):
    """How access tokens are verified: with keys of their own, by rules of their own."""

    keys: Keys
    rules: TokenRules


class _Seen(NamedTuple):
    """A credential that was found good: until then it need not be judged again."""

    grant: Grant
    key: VerificationKey | None
    marks: JwtMarks | None = None


class Verifier:
    """Tells who presents a credential. Safe to share between threads and coroutines, unless it has records.

    ``keys`` and ``rules`` are those of session JWTs. ``records`` and ``access_ring`` let API keys and access tokens in;
    they go together, and such a verifier belongs to one event loop. ``environment`` is the only one whose tokens are let in;
    the holder of another's is told so. ``clock`` gives the Unix time in seconds. ``remembered`` is how many credentials found
    good are remembered; 0 remembers none. ``ValueError`` when rules are not those of their kind.

    **Without ``records`` and without ``revocations`` a revoked JWT is let in until it expires**: after a logout, a rotated or
    revoked key, a deleted company, a suspended partner. Nothing says so at run time. Give ``RemoteRevocations`` unless that is
    meant. Revocations are for a verifier without records only.
    """

    def __init__(
        self,
        keys: Keys,
        rules: TokenRules,
        *,
        records: Records | None = None,
        access_ring: AccessRing | None = None,
        revocations: Revocations | None = None,
        environment: str | None = None,
        remembered: int = 4096,
        clock: Callable[[], float] = time.time,  # noqa: TID251 - here the clock becomes a parameter
    ) -> None:
        if rules.lifetime != "expires":
            raise ValueError("a Verifier needs the rules of session JWTs")
        if access_ring is not None and (records is None or access_ring.rules.lifetime != "unexpiring"):
            raise ValueError("access tokens need records, and rules of their own")
        if revocations is not None and records is not None:
            raise ValueError("records know what is revoked: a verifier that has them takes no revocations")
        self._keys = keys
        self._rules = rules
        self._revocations = revocations
        self._records = records
        self._access_ring = access_ring
        self._environment = environment
        self._clock = clock
        self._remembered = remembered
        self._seen: dict[bytes, _Seen] = {}
        self._by_subject: dict[str, set[bytes]] = {}
        self._forgotten = 0
        self._lock = threading.Lock()

    def verify(self, text: str) -> Caller:
        """Give the caller who presents ``text``, offline.

        Raises a ``Rejected``: ``InvalidCredential``, ``CredentialExpired`` or ``WrongEnvironment``, and with revocations
        ``CredentialRevoked``, ``CredentialRotated`` or ``PartnerSuspended``; or ``KeysUnavailable`` or
        ``RevocationsUnavailable`` when no verdict is possible at the moment. May wait for the issuer; coroutines use
        ``verify_async``. ``TypeError`` for a verifier with records.
        """
        if self._records is not None:
            raise TypeError("a verifier with records is to be asked with verify_async")
        digest = _digest(text)
        seen = self._seen.get(digest)
        if seen is None or seen.key is None or self._keys.find(seen.key.kid) is not seen.key:
            token = self._read(text)
            seen = self._judge_offline(token, self._keys.find(token.kid))
            self._keep(digest, seen)
        caller = self._judge_again(seen)
        if self._revocations is not None and seen.marks is not None:
            self._revocations.check(seen.marks, self._clock())
        return caller

    async def verify_async(self, text: str) -> Caller:
        """Do what ``verify`` does without ever blocking the event loop; with records, for every kind of credential.

        Raises any ``Rejected`` but ``PartnerMismatch``, or ``Unavailable``.
        """
        digest = _digest(text)
        records = self._records
        if records is None:
            return await self._verify_offline(text, digest)
        if not records.is_current():
            await records.catch_up()
        seen = self._seen.get(digest)
        if seen is not None:
            return self._judge_again(seen)
        before = self._forgotten
        grant, key = await self._look_up(records, text, digest)
        # What was forgotten while the records were asked may be just what they said.
        return self._remember(digest, grant, key) if before == self._forgotten else grant.caller

    def recall(self, text: str) -> Caller | None:
        """Give the caller at once if ``text`` was found good before and that still holds; else ``verify_async`` is to be asked.

        Raises a ``Rejected``: ``InvalidCredential``, or what the credential is refused with now that its time is over.
        """
        digest = _digest(text)
        if self._records is None or not self._records.is_current():
            return None
        seen = self._seen.get(digest)
        return seen and self._judge_again(seen)

    def forget(self, kind: str, subject: str) -> None:
        """Something about ``subject`` has changed: whatever was remembered of it is to be looked up again.

        ``kind`` is `credential`, `token`, `session`, `company` or `partner`; anything else may concern everybody.
        """
        self._forgotten += 1
        if kind in _SUBJECTS:
            for digest in self._by_subject.pop(subject, ()):
                self._drop(digest)
        else:
            self._seen.clear()
            self._by_subject.clear()

    async def _verify_offline(self, text: str, digest: bytes) -> Caller:
        seen = self._seen.get(digest)
        if seen is None or seen.key is None or await self._keys.find_async(seen.key.kid) is not seen.key:
            token = self._read(text)
            seen = self._judge_offline(token, await self._keys.find_async(token.kid))
            self._keep(digest, seen)
        caller = self._judge_again(seen)
        if self._revocations is not None and seen.marks is not None:
            await self._revocations.check_async(seen.marks, self._clock())
        return caller

    def _judge_offline(self, token: UnverifiedToken, key: VerificationKey | None) -> _Seen:
        claims = verify_token(token, key=key, rules=self._rules, now=self._clock())
        caller = caller_from(claims, "session")
        marks = None if self._revocations is None else JwtMarks.of(claims, token.kid)
        return _Seen(self._grant(caller, self._rules), key, marks)

    async def _look_up(self, records: Records, text: str, digest: bytes) -> tuple[Grant, VerificationKey | None]:
        if "." not in text:  # an API key has none, a JWT two
            return await records.find_key(text), None
        token = self._read(text)
        access = self._access_ring
        if access is not None and token.type in access.rules.types:
            key = await access.keys.find_async(token.kid)
            rules = await _for_its_issuer(token, key, access.rules, records)
            claimed = self._judge(token, key, rules, "access-token").caller
            return await records.find_token(claimed, digest), key
        key = await self._keys.find_async(token.kid)
        judged = self._judge(token, key, await _for_its_issuer(token, key, self._rules, records), "session")
        grant = await records.find_session(judged.caller)
        return (grant if grant.ends_at <= judged.ends_at else Grant(grant.caller, judged.ends_at, judged.reason)), key

    def _read(self, text: str) -> UnverifiedToken:
        token = read_unverified(text)
        # Read off the token's own marking: it tells its presenter nothing that it does not hold. And told before the look-up:
        # another environment's token must not send us to our issuer for its key.
        if token.issuer in self._rules.other_issuers:
            raise WrongEnvironment(environment=token.environment)
        if self._environment is not None and token.environment not in {None, self._environment}:
            raise WrongEnvironment(environment=token.environment)
        return token

    def _judge(self, token: UnverifiedToken, key: VerificationKey | None, rules: TokenRules, sort: CredentialKind) -> Grant:
        return self._grant(caller_from(verify_token(token, key=key, rules=rules, now=self._clock()), sort), rules)

    def _grant(self, caller: Caller, rules: TokenRules) -> Grant:
        ends_at = _NEVER if caller.expires_at is None else caller.expires_at + rules.leeway
        return Grant(caller, ends_at, CredentialExpired)

    def _judge_again(self, seen: _Seen) -> Caller:
        # All else was judged when it was seen first and has not changed since. Equality is over, as in verify_token.
        grant = seen.grant
        if grant.ends_at != _NEVER and self._clock() >= grant.ends_at:
            raise grant.reason
        return grant.caller

    def _remember(self, digest: bytes, grant: Grant, key: VerificationKey | None) -> Caller:
        self._keep(digest, _Seen(grant, key))
        return grant.caller

    def _keep(self, digest: bytes, seen: _Seen) -> None:
        if self._remembered:
            with self._lock:
                self._drop(digest)  # two may have looked it up at once
                while len(self._seen) >= self._remembered:
                    self._drop(next(iter(self._seen)))  # the one remembered longest
                self._seen[digest] = seen
                if self._records is not None:
                    for subject in _subjects_of(seen.grant.caller):
                        self._by_subject.setdefault(subject, set()).add(digest)

    def _drop(self, digest: bytes) -> None:
        seen = self._seen.pop(digest, None)
        if seen is None or self._records is None:
            return
        for subject in _subjects_of(seen.grant.caller):
            digests = self._by_subject.get(subject)
            if digests is not None:
                digests.discard(digest)
                if not digests:
                    del self._by_subject[subject]


_SUBJECTS: Final = frozenset({"credential", "token", "session", "company", "partner"})


def _subjects_of(caller: Caller) -> list[str]:
    """Whatever a change may name that concerns this caller. No two kinds of id look alike."""
    return [id_ for id_ in (caller.partner, caller.company, caller.credential_id, caller.session) if id_ is not None]


async def _for_its_issuer(
    token: UnverifiedToken, key: VerificationKey | None, rules: TokenRules, records: Records
) -> TokenRules:
    """The rules for the name that a token bears, if that is one of the issuer's own (RFC 8725 3.8: its key says so too)."""
    if key is None or token.issuer is None or token.issuer == rules.issuer or not await records.is_own_issuer(token.issuer):
        return rules
    return replace(rules, issuer=token.issuer)


def _digest(text: str) -> bytes:
    # Before anything else is done with it, even this: no long text is hashed, and none that would not encode.
    if len(text) > TOKEN_MAX_LENGTH or not text.isascii():
        raise InvalidCredential
    return hashlib.sha256(text.encode("ascii")).digest()


def caller_from(claims: Mapping[str, object], sort: CredentialKind) -> Caller:
    """Parse a token's claims, once ``verify_token`` gave them; ``InvalidCredential`` when they are not whole."""
    environment = claims.get(Claim.ENVIRONMENT)
    if not isinstance(environment, str) or ENVIRONMENT_PATTERN.fullmatch(environment) is None:
        raise InvalidCredential
    scope = claims.get(Claim.SCOPE, "")
    if not isinstance(scope, str) or len(scope) > _SCOPE_MAX_LENGTH or _SCOPE.fullmatch(scope) is None:
        raise InvalidCredential
    kind = claims.get(Claim.KIND)
    if not _is_kind(kind):
        raise InvalidCredential
    token_id = _word(claims, Claim.TOKEN_ID)
    # An access token does not say its tier: it would outlive every change of it.
    tier, credential_id, session, expires_at = "", token_id, None, None
    if sort == "session":
        tier, credential_id, session = _word(claims, Claim.TIER), _word(claims, Claim.CLIENT_ID), _word(claims, Claim.SESSION)
        expiry = claims.get(Claim.EXPIRES_AT)
        if not isinstance(expiry, int):
            raise InvalidCredential
        expires_at = expiry
    return Caller(
        partner=_word(claims, Claim.PARTNER),
        company=_company(kind, claims.get(Claim.COMPANY)),
        kind=kind,
        tier=tier,
        scopes=frozenset(scope.split()),
        credential=sort,
        credential_id=credential_id,
        session=session,
        token_id=token_id,
        environment=environment,
        expires_at=expires_at,
    )


def _is_kind(value: object) -> TypeGuard[HolderKind]:
    return value in HOLDER_KINDS


def _word(claims: Mapping[str, object], name: str) -> str:
    value = claims.get(name)
    if not isinstance(value, str) or _WORD.fullmatch(value) is None:
        raise InvalidCredential
    return value


def _company(kind: HolderKind, value: object) -> str | None:
    """Give the company's id: a company's token names one, a partner's does not have the claim."""
    if kind == "partner" and value is None:
        return None
    if kind == "partner" or not isinstance(value, str) or _UUID.fullmatch(value) is None:
        raise InvalidCredential
    return value
