"""A session JWT becomes a ``Caller``, or a refusal.

In order: ``tokens.read_unverified`` reads the text, ``keyset`` finds the key that it names, ``tokens.verify_token``
judges it, and what it says about its holder is parsed here into exact types.
"""

import hashlib
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeGuard, get_args

from gatelodge.errors import CredentialExpired, InvalidCredential, WrongEnvironment
from gatelodge.keyset import Keys
from gatelodge.tokens import TokenRules, UnverifiedToken, VerificationKey, read_unverified, verify_token
from gatelodge.wire import ENVIRONMENT_PATTERN, TOKEN_MAX_LENGTH, Claim

HolderKind = Literal["partner", "company"]
HOLDER_KINDS: Final[tuple[HolderKind, ...]] = get_args(HolderKind)

# Everything about a caller may end up in a header or a log line: visible ASCII, and not too much of it.
_WORD = re.compile(r"[!-~]{1,128}")
# RFC 9562 section 4, in lower case only: one spelling of an id.
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# RFC 6749 3.3: scope tokens, separated by single spaces.
_SCOPE_TOKEN = r"[!#-\[\]-~]+"  # noqa: S105 - a grammar
_SCOPE = re.compile(rf"(?:{_SCOPE_TOKEN}(?: {_SCOPE_TOKEN})*)?")
_SCOPE_MAX_LENGTH: Final = 1024


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request, as the issuer has signed it. ``expires_at`` is in Unix seconds, before any leeway."""

    partner: str
    company: str | None
    kind: HolderKind
    tier: str
    scopes: frozenset[str]
    credential_id: str
    session: str
    token_id: str
    environment: str
    expires_at: int


@dataclass(frozen=True, slots=True)
class _Seen:
    """A token that was found good: until its time is over or its key is gone, it need not be judged again."""

    caller: Caller
    key: VerificationKey


class Verifier:
    """Tells who presents a session JWT. Safe to share between threads and coroutines.

    ``clock`` gives the Unix time in seconds. ``remembered`` is how many tokens found good are remembered, by their
    SHA-256, so that a token on its second request costs no signature; 0 remembers none. ``ValueError`` when ``rules``
    are not those of a session JWT.
    """

    def __init__(
        self,
        keys: Keys,
        rules: TokenRules,
        *,
        remembered: int = 4096,
        clock: Callable[[], float] = time.time,  # noqa: TID251 - here the clock becomes a parameter
    ) -> None:
        if rules.lifetime != "expires":
            raise ValueError("a Verifier needs the rules of session JWTs")
        self._keys = keys
        self._rules = rules
        self._clock = clock
        self._remembered = remembered
        self._seen: dict[bytes, _Seen] = {}
        self._lock = threading.Lock()

    def verify(self, text: str) -> Caller:
        """Give the caller who presents ``text``.

        Raises a ``Rejected``: ``InvalidCredential``, ``CredentialExpired`` or ``WrongEnvironment``; or
        ``KeysUnavailable`` when no verdict is possible at the moment. May wait for the issuer's keys; coroutines use
        ``verify_async``.
        """
        digest = _digest(text)
        seen = self._seen.get(digest)
        if seen is not None and self._keys.find(seen.key.kid) is seen.key:
            return self._recall(seen)
        token = self._read(text)
        return self._judge(token, self._keys.find(token.kid), digest)

    async def verify_async(self, text: str) -> Caller:
        """Do what ``verify`` does without ever blocking the event loop."""
        digest = _digest(text)
        seen = self._seen.get(digest)
        if seen is not None and await self._keys.find_async(seen.key.kid) is seen.key:
            return self._recall(seen)
        token = self._read(text)
        return self._judge(token, await self._keys.find_async(token.kid), digest)

    def _read(self, text: str) -> UnverifiedToken:
        token = read_unverified(text)
        # Told here too, before the look-up: another environment's token must not send us to our issuer for its key.
        if token.issuer in self._rules.other_issuers:
            raise WrongEnvironment
        return token

    def _judge(self, token: UnverifiedToken, key: VerificationKey | None, digest: bytes) -> Caller:
        caller = caller_of(verify_token(token, key=key, rules=self._rules, now=self._clock()))
        if key is not None and self._remembered:
            with self._lock:
                while len(self._seen) >= self._remembered:
                    del self._seen[next(iter(self._seen))]  # the one remembered longest
                self._seen[digest] = _Seen(caller, key)
        return caller

    def _recall(self, seen: _Seen) -> Caller:
        # All else was judged when it was seen first and cannot have changed since. Equality is expired, as in
        # verify_token.
        if self._clock() >= seen.caller.expires_at + self._rules.leeway:
            raise CredentialExpired
        return seen.caller


def _digest(text: str) -> bytes:
    # Before anything else is done with it, even this: no long text is hashed, and none that would not encode.
    if len(text) > TOKEN_MAX_LENGTH or not text.isascii():
        raise InvalidCredential
    return hashlib.sha256(text.encode("ascii")).digest()


def caller_of(claims: Mapping[str, object]) -> Caller:
    """Parse a session JWT's claims, once ``verify_token`` gave them; ``InvalidCredential`` when they are not whole."""
    kind, company, scope = claims.get(Claim.KIND), claims.get(Claim.COMPANY), claims.get(Claim.SCOPE, "")
    environment, expires_at = claims.get(Claim.ENVIRONMENT), claims.get(Claim.EXPIRES_AT)
    if not _is_kind(kind) or not isinstance(expires_at, int):
        raise InvalidCredential
    if not isinstance(environment, str) or ENVIRONMENT_PATTERN.fullmatch(environment) is None:
        raise InvalidCredential
    if not isinstance(scope, str) or len(scope) > _SCOPE_MAX_LENGTH or _SCOPE.fullmatch(scope) is None:
        raise InvalidCredential
    return Caller(
        partner=_word(claims, Claim.PARTNER),
        company=_company(kind, company),
        kind=kind,
        tier=_word(claims, Claim.TIER),
        scopes=frozenset(scope.split()),
        credential_id=_word(claims, Claim.CLIENT_ID),
        session=_word(claims, Claim.SESSION),
        token_id=_word(claims, Claim.TOKEN_ID),
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
