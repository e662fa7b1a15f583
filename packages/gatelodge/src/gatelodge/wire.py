"""What both sides of the wire must agree on: the shape of an API key, the names of claims, the types of tokens.

An API key reads ``<brand>_<environment>_<pk|ck>_<id>_<secret><checksum>``: ``pk`` for a partner's key, ``ck`` for a
company's; a public id of 12 Base62 characters; a secret of 30 (178 bits); and the CRC-32 of all that stands before it
as 6 Base62 characters. The checksum is no secret: it lets a typing mistake, or the guess of a scanner, be refused
without a look-up.
"""

import re
import zlib
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

BASE62: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

_PAIRS: Final = tuple(first + second for first in BASE62 for second in BASE62)
"""Two digits at a time: every key that is presented has its checksum taken."""

KEY_ID_LENGTH: Final = 12
KEY_SECRET_LENGTH: Final = 30
KEY_CHECKSUM_LENGTH: Final = 6

KeyKind = Literal["pk", "ck"]
KEY_KINDS: Final[tuple[KeyKind, ...]] = get_args(KeyKind)

ENVIRONMENT_PATTERN: Final = re.compile(r"[a-z][a-z0-9]{0,31}", re.ASCII)
BRAND_PATTERN: Final = re.compile(r"[a-z][a-z0-9]{1,15}", re.ASCII)
_KEY_PATTERN: Final = re.compile(
    rf"({BRAND_PATTERN.pattern})_({ENVIRONMENT_PATTERN.pattern})_(pk|ck)"
    rf"_([0-9A-Za-z]{{{KEY_ID_LENGTH}}})_([0-9A-Za-z]{{{KEY_SECRET_LENGTH}}})([0-9A-Za-z]{{{KEY_CHECKSUM_LENGTH}}})",
    re.ASCII,
)
_KEY_MAX_LENGTH: Final = 128

# RFC 9068 section 2.1: the `typ` of a session JWT. Both spellings must be accepted, the first is the one we write.
SESSION_TYPES: Final = ("at+jwt", "application/at+jwt")
# A pre-generated token without expiry. Its own type keeps the two kinds from ever passing for one another (RFC 8725
# 3.11).
ACCESS_TYPES: Final = ("JWT",)

TOKEN_MAX_LENGTH: Final = 8192
"""The longest token, in characters, that is looked at; anything longer is refused before it is decoded."""


class Claim:
    """Names of the claims in a session JWT: RFC 7519 4.1 and RFC 9068 2.2 first, then our own."""

    ISSUER: Final = "iss"
    SUBJECT: Final = "sub"
    AUDIENCE: Final = "aud"
    ISSUED_AT: Final = "iat"
    NOT_BEFORE: Final = "nbf"
    EXPIRES_AT: Final = "exp"
    TOKEN_ID: Final = "jti"  # noqa: S105 - a claim's name
    CLIENT_ID: Final = "client_id"
    SESSION: Final = "sid"
    ENVIRONMENT: Final = "env"
    KIND: Final = "kind"
    PARTNER: Final = "partner"
    COMPANY: Final = "company"
    TIER: Final = "tier"
    SCOPE: Final = "scope"
    EPOCH: Final = "epoch"
    """How often all sessions of the partner had been ended at once before this one began."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key taken apart. Its secret half is not shown by ``repr``; ``text`` is the way to the whole key."""

    brand: str
    environment: str
    kind: KeyKind
    id: str
    secret: str = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> "ApiKey | None":
        """Take ``text`` apart; ``None`` unless it has exactly the shape of a key and its checksum is right."""
        if len(text) > _KEY_MAX_LENGTH:
            return None
        match = _KEY_PATTERN.fullmatch(text)
        if match is None:
            return None
        brand, environment, kind, id_, secret, check = match.groups()
        if check != checksum(text[:-KEY_CHECKSUM_LENGTH]):
            return None
        return cls(brand, environment, "pk" if kind == "pk" else "ck", id_, secret)

    @property
    def text(self) -> str:
        """The key as its holder presents it. A secret: never log it."""
        body = f"{self.brand}_{self.environment}_{self.kind}_{self.id}_{self.secret}"
        return body + checksum(body)

    @property
    def masked(self) -> str:
        """The key with its secret left out, fit to be shown and stored: enough to recognise it by."""
        return f"{self.brand}_{self.environment}_{self.kind}_{self.id}_…"


def checksum(text: str) -> str:
    """Give the CRC-32 of ``text`` as six Base62 characters, most significant first."""
    high, low = divmod(zlib.crc32(text.encode("ascii")), len(_PAIRS))
    high, middle = divmod(high, len(_PAIRS))
    return _PAIRS[high] + _PAIRS[middle] + _PAIRS[low]
