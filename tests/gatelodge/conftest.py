"""An issuer that can also make every token that no issuer should make."""

import base64
import json
from dataclasses import dataclass, field

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from gating import Book, a_grant, caller, digest

from gatelodge import AccessRing, CredentialRevoked, StaticKeys, Verifier
from gatelodge.tokens import (
    PrivateKey,
    TokenRules,
    VerificationKey,
    generate_private_key,
    public_jwk,
    read_unverified,
    sign_token,
    verify_token,
)

NOW = 1_780_000_000
ISSUER = "https://uat.example.com"
PRODUCTION = "https://api.example.com"


def b64(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def as_bytes(value):
    return value if isinstance(value, bytes) else json.dumps(value).encode()


@dataclass
class Issuer:
    key: PrivateKey = field(default_factory=generate_private_key)
    now: int = NOW
    url: str = ISSUER
    production: str = PRODUCTION

    @property
    def jwk(self):
        return public_jwk(self.key)

    @property
    def kid(self):
        return self.jwk["kid"]

    @property
    def verification_key(self):
        return VerificationKey.from_jwk(self.jwk)

    @property
    def session_rules(self):
        return TokenRules.for_sessions(issuer=ISSUER, audience=ISSUER)

    @property
    def access_rules(self):
        return TokenRules.for_access_tokens(issuer=ISSUER, audience=ISSUER)

    @property
    def header(self):
        return {"alg": "ES256", "kid": self.kid, "typ": "at+jwt"}

    def claims(self, **changes):
        """The claims of a good session JWT; a change to `...` leaves a claim out."""
        claims = {
            "iss": ISSUER,
            "sub": "acme-motors",
            "aud": ISSUER,
            "iat": NOW,
            "exp": NOW + 86_400,
            "jti": "0197a3f2-1111-7bbb-8ccc-0123456789ab",
            "client_id": "k3yk3yk3yk3y",
            "sid": "0197a3f2-2222-7bbb-8ccc-0123456789ab",
            "env": "uat",
            "kind": "partner",
            "partner": "acme-motors",
            "tier": "starter",
            "scope": "plans:read plans:write",
        } | changes
        return {name: value for name, value in claims.items() if value is not ...}

    def token(self, typ="at+jwt", **changes):
        return sign_token(self.claims(**changes), key=self.key, kid=self.kid, typ=typ)

    def access_token(self, **changes):
        return self.token("JWT", **({"exp": ..., "client_id": ..., "sid": ...} | changes))

    def compact(self, header, payload, key=None):
        """Sign any header and any payload, however wrong."""
        signing_input = f"{b64(as_bytes(header))}.{b64(as_bytes(payload))}"
        return f"{signing_input}.{b64(self.signature(signing_input, key))}"

    def signature(self, signing_input, key=None):
        r, s = decode_dss_signature((key or self.key).sign(signing_input.encode(), ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")

    def judge(self, text, *, rules=None, key=None, now=NOW):
        """The whole way of a token whose `kid` is in the key set."""
        token = read_unverified(text)
        return verify_token(token, key=key or self.verification_key, rules=rules or self.session_rules, now=now)


@pytest.fixture(scope="session")
def issuer():
    return Issuer()


@pytest.fixture(scope="session")
def stranger():
    """Another issuer with other keys, which is nobody to us."""
    return Issuer()


@pytest.fixture(scope="session")
def issuers():
    """The way to make more of them."""
    return Issuer


# --- A gate, and everything around it ---


class Clock:
    """Unix seconds that stand still until they are moved."""

    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now


class Gatehouse:
    """A verifier with records in memory, and one good credential of each kind."""

    KEY = "gatelodge_uat_pk_k3yk3yk3yk3y_secret"

    def __init__(self, issuer, access_issuer, **options):
        self.issuer, self.access_issuer = issuer, access_issuer
        self.clock = Clock(NOW)
        self.book = Book()
        rules = {"issuer": ISSUER, "audience": ISSUER, "other_issuers": frozenset({PRODUCTION})}
        self.verifier = Verifier(
            StaticKeys([issuer.verification_key]),
            TokenRules.for_sessions(**rules),
            records=self.book,
            access_ring=AccessRing(StaticKeys([access_issuer.verification_key]), TokenRules.for_access_tokens(**rules)),
            environment="uat",
            clock=self.clock,
            **options,
        )
        self.book.forget = self.verifier.forget
        self.session = issuer.token(sid="5e55", jti="jti-1")
        self.token = access_issuer.access_token(jti="at-1")
        self.book.keys[self.KEY] = a_grant(caller("api-key"))
        self.book.tokens["at-1"] = (digest(self.token), a_grant(caller("access-token")))
        self.book.sessions["5e55"] = a_grant(caller("session"))

    @property
    def credentials(self):
        return {"api-key": self.KEY, "access-token": self.token, "session": self.session}

    def end(self, credential, reason=CredentialRevoked):
        """End a credential, as an issuer does: on record first, then everybody is told."""
        if credential == "api-key":
            self.book.keys[self.KEY] = reason
            self.book.change("credential", "k3yk3yk3yk3y")
        elif credential == "access-token":
            self.book.tokens["at-1"] = (digest(self.token), reason)
            self.book.change("token", "at-1")
        else:
            self.book.sessions["5e55"] = reason
            self.book.change("session", "5e55")


@pytest.fixture(scope="session")
def access_issuer():
    """The same issuer's other ring: the keys of access tokens."""
    return Issuer()


@pytest.fixture
def gatehouse(issuer, access_issuer):
    return Gatehouse(issuer, access_issuer)


@pytest.fixture
def gatehouse_with(issuer, access_issuer):
    """The way to a verifier with other options."""
    return lambda **options: Gatehouse(issuer, access_issuer, **options)
