"""Identifiers and API keys, made from a clock's reading and entropy."""

import base64
from typing import Final
from uuid import UUID

from gatelodge.wire import BASE62, KEY_ID_LENGTH, KEY_SECRET_LENGTH, ApiKey, KeyKind
from gatelodge_server.core.model import Entropy, Instant

ACCESS_TOKEN_ID_LENGTH: Final = 22


def uuid7(now: Instant, entropy: Entropy) -> bytes:
    """A UUIDv7 (RFC 9562 5.7) in 16 bytes: 48 bits of milliseconds, then 74 random bits."""
    random = int.from_bytes(entropy(10)) & ((1 << 74) - 1)
    high, low = random >> 62, random & ((1 << 62) - 1)
    return (now << 80 | 0x7 << 76 | high << 64 | 0b10 << 62 | low).to_bytes(16)


def company_id(now: Instant, entropy: Entropy) -> UUID:
    """An id for a new company."""
    return UUID(bytes=uuid7(now, entropy))


def token_id(entropy: Entropy) -> str:
    """The `jti` of a session JWT: 128 random bits as 22 characters of base64url."""
    return base64.urlsafe_b64encode(entropy(16))[:22].decode("ascii")


def access_token_id(entropy: Entropy) -> str:
    """The id of an access token, its `jti`: 131 random bits as 22 characters of Base62.

    It is typed as an argument of commands, so it never begins with a hyphen.
    """
    return _base62(ACCESS_TOKEN_ID_LENGTH, entropy)


def api_key(brand: str, environment: str, kind: KeyKind, entropy: Entropy) -> ApiKey:
    """A fresh API key."""
    return ApiKey(brand, environment, kind, _base62(KEY_ID_LENGTH, entropy), _base62(KEY_SECRET_LENGTH, entropy))


def _base62(length: int, entropy: Entropy) -> str:
    # Ten bytes more than the characters hold: what the modulo favours is then below 2^-80 and of no use to anybody.
    number = int.from_bytes(entropy(length + 10))
    characters = []
    for _ in range(length):
        number, digit = divmod(number, len(BASE62))
        characters.append(BASE62[digit])
    return "".join(characters)
