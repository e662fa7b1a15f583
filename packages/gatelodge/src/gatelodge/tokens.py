"""Signed tokens, made and judged: the only file that touches JOSE.

What happens to a presented token, in order; `verify.py` calls it and `keyset.py` supplies the key:

1. ``read_unverified``: the length, the compact form, the base64url and the JSON are checked, strictly. Nothing is
   trusted yet.
2. The caller finds the ``VerificationKey`` that the token's ``kid`` names, in the key set it already holds and nowhere
   else.
3. ``verify_token``: the signature (PyJWT's algorithms over cryptography), then the type, then the claims, and the
   expiry last, so that only the holder of a genuine token ever learns that it has expired.

Tokens are read with our own strict reader and not with PyJWT's, so that exactly one parser decides what a token says:
the one that refuses a second spelling of it. An ``InvalidCredential`` is raised outside of the ``except`` block that
noticed the fault, because a parser's exception carries the text it choked on, and that text is a credential.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, Literal, Self, TypeAlias, TypeGuard, get_args

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_der_private_key
from jwt.algorithms import Algorithm, get_default_algorithms

from gatelodge.errors import CredentialExpired, InvalidCredential, WrongEnvironment
from gatelodge.strict import decode_base64url, encode_base64url, parse_json_object
from gatelodge.wire import ACCESS_TYPES, SESSION_TYPES, TOKEN_MAX_LENGTH, Claim

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey
"""A P-256 key that signs with ES256."""
PublicKey: TypeAlias = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey

Lifetime = Literal["expires", "unexpiring"]

LEEWAY_MAX: Final = 60
"""The most seconds by which two clocks may be taken to differ."""

_SIGNING_ALGORITHM: Final = "ES256"
_P256_SCALAR_BYTES: Final = 32
_ECDSA_SHA256: Final = ec.ECDSA(hashes.SHA256())
_RSA_BITS_MIN, _RSA_BITS_MAX = 2048, 8192  # NIST SP 800-131A; and a bound on the work that one signature may cost us
_RSA_EXPONENT_MIN, _RSA_EXPONENT_MAX = 2**16 + 1, 2**64 - 1  # FIPS 186-5 A.1.1; OpenSSL takes none larger
_CLAIM_MAX_LENGTH: Final = 255
_TIME_MAX: Final = 253_402_300_799  # the last second of the year 9999, beyond which a datetime cannot go

_COMPACT = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)")
_KID = re.compile(r"[A-Za-z0-9._-]{1,128}")


# --- Algorithms: a table --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Kind:
    """What one ``alg`` asks of its key: the ``kty`` and ``crv`` of its JWK, and who checks its signatures."""

    kty: str
    crv: str | None
    method: Algorithm


_PYJWT = get_default_algorithms()
# No HS*, whose verifier could also sign, and no "none". RFC 8725 3.1: whatever is not in this table does not exist.
_KINDS: Final[Mapping[str, _Kind]] = {
    "ES256": _Kind("EC", "P-256", _PYJWT["ES256"]),
    "ES384": _Kind("EC", "P-384", _PYJWT["ES384"]),
    "EdDSA": _Kind("OKP", "Ed25519", _PYJWT["EdDSA"]),
    "RS256": _Kind("RSA", None, _PYJWT["RS256"]),
    "PS256": _Kind("RSA", None, _PYJWT["PS256"]),
}
_CURVES: Final[Mapping[str, ec.EllipticCurve]] = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1()}
_CURVE_NAMES: Final = {curve.name: name for name, curve in _CURVES.items()}
# RFC 7638 3.2: the members that a thumbprint is taken over.
_THUMBPRINT_MEMBERS: Final = {"EC": ("crv", "kty", "x", "y"), "OKP": ("crv", "kty", "x"), "RSA": ("e", "kty", "n")}
# RFC 7518 6.2.2, 6.3.2 and 6.4: a public key set that shows one of these has given its key away.
_PRIVATE_MEMBERS: Final = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})


# --- Keys -----------------------------------------------------------------------------------------------------------


class UnsupportedKey(ValueError):
    """A JWK of a kind that is not in our table. RFC 7517 section 5: in a set, such a key is to be ignored."""


def generate_private_key() -> PrivateKey:
    """Make a new P-256 signing key."""
    return ec.generate_private_key(ec.SECP256R1())


def private_key_to_bytes(key: PrivateKey) -> bytes:
    """Give ``key`` as unencrypted PKCS #8 in DER. A secret: wrap it before it is stored."""
    return key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


def private_key_from_bytes(data: bytes) -> PrivateKey:
    """Read what ``private_key_to_bytes`` gave. ``ValueError`` for anything but a P-256 private key."""
    key = load_der_private_key(data, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("not a P-256 private key")  # noqa: TRY004 - data, not a caller's mistake
    return key


def public_jwk(key: PrivateKey) -> dict[str, str]:
    """Give the public half of ``key`` as a JWK (RFC 7517) whose ``kid`` is its thumbprint: ready to be published."""
    point = key.public_key().public_numbers()
    members = {
        "kty": "EC",
        "crv": "P-256",
        # RFC 7518 6.2.1.2: a coordinate is always written in full, leading zeroes and all.
        "x": encode_base64url(point.x.to_bytes(_P256_SCALAR_BYTES, "big")).decode("ascii"),
        "y": encode_base64url(point.y.to_bytes(_P256_SCALAR_BYTES, "big")).decode("ascii"),
    }
    return {**members, "kid": thumbprint(members), "use": "sig", "alg": _SIGNING_ALGORITHM}


def thumbprint(jwk: Mapping[str, object]) -> str:
    """Give the RFC 7638 SHA-256 thumbprint of ``jwk``. ``ValueError`` when a member that it covers is missing."""
    kty = jwk.get("kty")
    names = _THUMBPRINT_MEMBERS.get(kty) if isinstance(kty, str) else None
    if names is None:
        raise UnsupportedKey("a thumbprint is defined for the key types EC, OKP and RSA only")
    members = {name: _text_member(jwk, name) for name in names}
    # RFC 7638 3.3: no white space, members in lexicographic order.
    canonical = json.dumps(members, separators=(",", ":"), sort_keys=True).encode("utf-8")
    return encode_base64url(hashlib.sha256(canonical).digest()).decode("ascii")


@dataclass(frozen=True, slots=True)
class VerificationKey:
    """A public key bound to its name and to its one algorithm (RFC 8725 3.1). A weak one cannot be built."""

    kid: str
    algorithm: str
    public_key: PublicKey = field(hash=False)  # cryptography's keys can be compared, not hashed

    def __post_init__(self) -> None:
        if _KID.fullmatch(self.kid) is None:
            raise ValueError("a kid is 1 to 128 characters of A-Z a-z 0-9 . _ -")
        kind = _KINDS.get(self.algorithm)
        if kind is None:
            raise UnsupportedKey("the key's algorithm is not supported")
        if _shape(self.public_key) != (kind.kty, kind.crv):
            raise ValueError("the key's type or curve is not that of its algorithm")
        if isinstance(self.public_key, rsa.RSAPublicKey):
            _refuse_weak_rsa(self.public_key.public_numbers())

    @classmethod
    def from_jwk(cls, jwk: Mapping[str, object]) -> Self:
        """Read a public JWK (RFC 7517); it must say its ``kid``, ``kty`` and ``alg``.

        ``UnsupportedKey`` (a ``ValueError``) when it is of a kind, or for a use, that is not ours; a plain
        ``ValueError`` when it is malformed, weak, or shows a private member.
        """
        if not _PRIVATE_MEMBERS.isdisjoint(jwk):
            raise ValueError("the key shows a private or symmetric member")
        if jwk.get("use", "sig") != "sig":
            raise UnsupportedKey("the key is not for signatures")
        algorithm = jwk.get("alg")
        kind = _KINDS.get(algorithm) if isinstance(algorithm, str) else None
        if not isinstance(algorithm, str) or kind is None:
            raise UnsupportedKey("the key's algorithm is missing or not supported")
        if (jwk.get("kty"), jwk.get("crv")) != (kind.kty, kind.crv):
            raise ValueError("the key's type or curve is not that of its algorithm")
        return cls(_text_member(jwk, "kid"), algorithm, _READERS[kind.kty](jwk))


def _read_ec(jwk: Mapping[str, object]) -> PublicKey:
    curve = _CURVES[_text_member(jwk, "crv")]
    size = (curve.key_size + 7) // 8
    x, y = _bytes_member(jwk, "x"), _bytes_member(jwk, "y")
    if len(x) != size or len(y) != size:
        raise ValueError("a coordinate has the wrong length")
    return ec.EllipticCurvePublicNumbers(int.from_bytes(x, "big"), int.from_bytes(y, "big"), curve).public_key()


def _read_okp(jwk: Mapping[str, object]) -> PublicKey:
    return ed25519.Ed25519PublicKey.from_public_bytes(_bytes_member(jwk, "x"))


def _read_rsa(jwk: Mapping[str, object]) -> PublicKey:
    modulus, exponent = (int.from_bytes(_bytes_member(jwk, name), "big") for name in ("n", "e"))
    numbers = rsa.RSAPublicNumbers(exponent, modulus)
    _refuse_weak_rsa(numbers)  # before cryptography looks: its own complaint depends on its version
    return numbers.public_key()


_READERS: Final[Mapping[str, Callable[[Mapping[str, object]], PublicKey]]] = {
    "EC": _read_ec,
    "OKP": _read_okp,
    "RSA": _read_rsa,
}


def _shape(key: PublicKey) -> tuple[str, str | None]:
    """Say which ``kty`` and ``crv`` a JWK of ``key`` would have; ``("", None)`` for a kind that is not ours."""
    match key:
        case ec.EllipticCurvePublicKey():
            return "EC", _CURVE_NAMES.get(key.curve.name)
        case ed25519.Ed25519PublicKey():
            return "OKP", "Ed25519"
        case rsa.RSAPublicKey():
            return "RSA", None
        case _:
            return "", None  # type: ignore[unreachable]  # the annotation cannot stop a caller without a type checker


def _refuse_weak_rsa(numbers: rsa.RSAPublicNumbers) -> None:
    if not _RSA_BITS_MIN <= numbers.n.bit_length() <= _RSA_BITS_MAX:
        raise ValueError(f"an RSA key has {_RSA_BITS_MIN} to {_RSA_BITS_MAX} bits")
    if not _RSA_EXPONENT_MIN <= numbers.e <= _RSA_EXPONENT_MAX or numbers.e % 2 == 0:
        raise ValueError("an RSA exponent is odd and at least 65537")
    if _has_roca_print(numbers.n):
        raise ValueError("the RSA key comes from a generator whose keys can be factored (CVE-2017-15361)")


# The primes that tell such a modulus apart: those below 170 modulo which the powers of 65537 miss some residues. The
# faulty generator made every prime a power of 65537 modulo all of them; a modulus of any other origin is one by a
# chance of 2^-27.
_ROCA_PRIMES: Final = (11, 13, 17, 19, 37, 53, 61, 71, 73, 79, 97, 103, 107, 109, 127, 151, 157)


def _has_roca_print(modulus: int) -> bool:
    return all(modulus % p in {pow(65537, i, p) for i in range(p - 1)} for p in _ROCA_PRIMES)


def _text_member(jwk: Mapping[str, object], name: str) -> str:
    value = jwk.get(name)
    if not isinstance(value, str):
        raise ValueError(f"the key's member {name} is missing or no string")  # noqa: TRY004 - data, not a caller's mistake
    return value


def _bytes_member(jwk: Mapping[str, object], name: str) -> bytes:
    value = decode_base64url(_text_member(jwk, name))
    if value is None:
        raise ValueError(f"the key's member {name} is not base64url")
    return value


# --- Making tokens --------------------------------------------------------------------------------------------------

_ENCODER: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False)


def sign_token(claims: Mapping[str, object], *, key: PrivateKey, kid: str, typ: str) -> str:
    """Sign ``claims`` with ES256 and give the token in compact form.

    ``ValueError`` when the result would be longer than any verifier of ours accepts, or ``kid`` is not a name of ours.
    """
    payload = encode_base64url(_ENCODER.encode(dict(claims)).encode("ascii"))
    signing_input = _protected_header(kid, typ) + payload
    # cryptography directly: PyJWT's detour over hexadecimal costs a tenth of the whole. RFC 7518 3.4: R and S in full,
    # joined.
    r, s = decode_dss_signature(key.sign(signing_input, _ECDSA_SHA256))
    signature = r.to_bytes(_P256_SCALAR_BYTES, "big") + s.to_bytes(_P256_SCALAR_BYTES, "big")
    token = b"%b.%b" % (signing_input, encode_base64url(signature))
    if len(token) > TOKEN_MAX_LENGTH:
        raise ValueError(f"the token would exceed {TOKEN_MAX_LENGTH} characters")
    return token.decode("ascii")


@lru_cache(maxsize=64)  # a handful of keys times two types; only an issuer's own values come here
def _protected_header(kid: str, typ: str) -> bytes:
    if _KID.fullmatch(kid) is None:
        raise ValueError("a kid is 1 to 128 characters of A-Z a-z 0-9 . _ -")
    header = {"alg": _SIGNING_ALGORITHM, "kid": kid, "typ": typ}
    return encode_base64url(_ENCODER.encode(header).encode("ascii")) + b"."


# --- Judging tokens -------------------------------------------------------------------------------------------------

# What a token must say beside `iss`, `aud` and its times. RFC 9068 2.2 for session JWTs; `sid` is ours.
_REQUIRED_TEXTS: Final[Mapping[Lifetime, tuple[str, ...]]] = {
    "expires": (Claim.SUBJECT, Claim.TOKEN_ID, Claim.CLIENT_ID, Claim.SESSION),
    "unexpiring": (Claim.SUBJECT, Claim.TOKEN_ID),
}


@dataclass(frozen=True, slots=True)
class TokenRules:
    """What a token of one kind must say, apart from being genuine. The two kinds exclude each other (RFC 8725 3.12).

    ``leeway`` is in whole seconds, 0 to 60. ``other_issuers`` are the issuers of the same owner's other environments:
    their tokens are refused like any foreign one, but are told the reason.
    """

    issuer: str
    audience: str
    types: tuple[str, ...]
    lifetime: Lifetime
    leeway: int = 0
    other_issuers: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.issuer or not self.audience:
            raise ValueError("rules need an issuer and an audience")
        # A lone string would be searched for parts of itself by `in`, and nothing but a type checker would say so.
        if str in {type(self.types), type(self.other_issuers)}:
            raise TypeError("types and other issuers are collections of strings")
        if not self.types:
            raise ValueError("rules need one type or more")
        if self.lifetime not in get_args(Lifetime):
            raise ValueError("a lifetime is 'expires' or 'unexpiring'")
        if not 0 <= self.leeway <= LEEWAY_MAX:
            raise ValueError(f"a leeway is 0 to {LEEWAY_MAX} seconds")
        if self.issuer in self.other_issuers:
            raise ValueError("an issuer is not one of the others")

    @classmethod
    def for_sessions(
        cls,
        *,
        issuer: str,
        audience: str,
        leeway: int = 0,
        other_issuers: frozenset[str] = frozenset(),
    ) -> Self:
        """Rules for the session JWTs that a login or a refresh returns."""
        return cls(issuer, audience, SESSION_TYPES, "expires", leeway, other_issuers)

    @classmethod
    def for_access_tokens(
        cls,
        *,
        issuer: str,
        audience: str,
        leeway: int = 0,
        other_issuers: frozenset[str] = frozenset(),
    ) -> Self:
        """Rules for the tokens that a partner manager hands out and that do not expire."""
        return cls(issuer, audience, ACCESS_TYPES, "unexpiring", leeway, other_issuers)


@dataclass(frozen=True, slots=True)
class UnverifiedToken:
    """A token that is well-formed, and no more: all of it may be a lie. ``verify_token`` alone gives its claims."""

    kid: str
    algorithm: str
    type: str
    issuer: str | None
    environment: str | None
    _claims: Mapping[str, object] = field(repr=False)
    _signing_input: bytes = field(repr=False)
    _signature: bytes = field(repr=False)


def read_unverified(text: str) -> UnverifiedToken:
    """Read a token in JWS compact form (RFC 7515 7.1) strictly, trusting nothing.

    Of two spellings of one token at most one is read: a longer one, a padded one, one with stray bits in its base64url
    or with a doubled member is an ``InvalidCredential``, and so is everything else that does not belong into a token of
    ours.
    """
    if len(text) > TOKEN_MAX_LENGTH:
        raise InvalidCredential
    match = _COMPACT.fullmatch(text)
    if match is None:
        raise InvalidCredential
    header, claims, signature = _parse_part(match[1]), _parse_part(match[2]), decode_base64url(match[3])
    if header is None or claims is None or signature is None:
        raise InvalidCredential
    algorithm, kid, type_ = header.get("alg"), header.get("kid"), header.get("typ")
    if not (isinstance(algorithm, str) and isinstance(kid, str) and isinstance(type_, str)):
        raise InvalidCredential
    if algorithm not in _KINDS or _KID.fullmatch(kid) is None or not _UNACCEPTABLE_MEMBERS.isdisjoint(header):
        raise InvalidCredential
    issuer, environment = claims.get(Claim.ISSUER), claims.get(Claim.ENVIRONMENT)
    signing_input = text[: match.end(2)].encode("ascii")
    return UnverifiedToken(
        kid,
        algorithm,
        type_,
        issuer if isinstance(issuer, str) else None,
        environment if isinstance(environment, str) else None,
        claims,
        signing_input,
        signature,
    )


# RFC 7515 4.1.11: a `crit` must be understood, and we know no extension; `b64` (RFC 7797) and `zip` would change what
# was signed. Members that bring or name a key (`jwk`, `jku`, `x5u`, `x5c`) are not here: nobody reads them, so they do
# nothing.
_UNACCEPTABLE_MEMBERS: Final = frozenset({"crit", "b64", "zip"})


def issuer_of(text: str) -> str | None:
    """Say which issuer a token claims, unverified; ``None`` when it is no token. Good for routing, never for trust."""
    try:
        return read_unverified(text).issuer
    except InvalidCredential:
        return None


def verify_token(token: UnverifiedToken, *, key: VerificationKey | None, rules: TokenRules, now: float) -> Mapping[str, object]:
    """Judge ``token`` at the instant ``now`` (Unix seconds) and give its claims.

    ``key`` is what the key set holds under ``token.kid``. Raises ``WrongEnvironment`` for a token that names another
    environment's issuer, which says no more than the token does; ``CredentialExpired`` for one that is right in
    everything but its time; ``InvalidCredential`` for any other fault.
    """
    if token.issuer in rules.other_issuers:
        raise WrongEnvironment(environment=token.environment)
    if key is None or token.kid != key.kid or token.algorithm != key.algorithm:
        raise InvalidCredential
    # RFC 8725 3.3, before a claim is looked at.
    if not _KINDS[key.algorithm].method.verify(token._signing_input, key.public_key, token._signature):  # noqa: SLF001
        raise InvalidCredential
    claims = token._claims  # noqa: SLF001 - the one place where claims may leave
    if token.type not in rules.types or token.issuer != rules.issuer:
        raise InvalidCredential
    if not _names_audience(claims.get(Claim.AUDIENCE), rules.audience):
        raise InvalidCredential
    if not all(_is_bounded_text(claims.get(name)) for name in _REQUIRED_TEXTS[rules.lifetime]):
        raise InvalidCredential
    _check_times(claims, rules, now)
    return claims


def _check_times(claims: Mapping[str, object], rules: TokenRules, now: float) -> None:
    not_before = claims.get(Claim.NOT_BEFORE, 0)
    if not _is_time(claims.get(Claim.ISSUED_AT)) or not _is_time(not_before):
        raise InvalidCredential
    if now < not_before - rules.leeway:
        raise InvalidCredential
    if rules.lifetime == "unexpiring":
        if Claim.EXPIRES_AT in claims:
            raise InvalidCredential
        return
    expires_at = claims.get(Claim.EXPIRES_AT)
    if not _is_time(expires_at):
        raise InvalidCredential
    # RFC 7519 4.1.4: "on or after", so equality is expired. Last of all: only a genuine token's holder is told.
    if now >= expires_at + rules.leeway:
        raise CredentialExpired


def _is_time(value: object) -> TypeGuard[int]:
    # RFC 7519 would allow fractions; our issuer writes none, and one spelling of an instant is enough. Not isinstance:
    # True is an int.
    return type(value) is int and 0 <= value <= _TIME_MAX


def _is_bounded_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _CLAIM_MAX_LENGTH


def _names_audience(value: object, audience: str) -> bool:
    # RFC 7519 4.1.3: one string or an array of strings. Ours is one string.
    if isinstance(value, list):
        return audience in value and all(isinstance(item, str) for item in value)
    return value == audience


def _parse_part(text: str) -> dict[str, object] | None:
    data = decode_base64url(text)
    return None if data is None else parse_json_object(data)
