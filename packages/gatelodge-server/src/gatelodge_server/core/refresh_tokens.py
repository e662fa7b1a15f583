"""The refresh token: a session's id, the generation that it is good for, and a MAC over both.

Nothing secret has to be stored for it: a forged one fails its MAC before the store hears of it, and the successor of a token is
a pure function of the session's next generation, so a refresh that is asked for again gives the very same successor.

A token reads ``<brand>_<environment>_rt_`` and 60 characters of base64url: id (16 bytes), generation (5), MAC (24). 45 bytes
fill 60 characters without a bit to spare, so each token has exactly one spelling.
"""

import base64
import re
from collections.abc import Callable
from typing import Final, NamedTuple, TypeAlias

from gatelodge.errors import InvalidCredential, WrongEnvironment
from gatelodge.wire import BRAND_PATTERN, ENVIRONMENT_PATTERN
from gatelodge_server.core.secrets import Secret

MacMaker: TypeAlias = Callable[[bytes], bytes]
"""HMAC-SHA-256 (32 bytes) of a message, under the deployment's present key for refresh tokens."""
MacChecker: TypeAlias = Callable[[bytes, bytes], bool]
"""Whether the second argument is how the MAC of the first begins, under any key of the deployment that is still honoured."""

_ID: Final = 16
_GENERATION: Final = 5
_MAC: Final = 24
_PATTERN: Final = re.compile(rf"({BRAND_PATTERN.pattern})_({ENVIRONMENT_PATTERN.pattern})_rt_([A-Za-z0-9_-]{{60}})", re.ASCII)
_MAX_LENGTH: Final = 128


class RefreshClaim(NamedTuple):
    """What a genuine refresh token says: this session, at this generation."""

    session_id: bytes
    generation: int


class RefreshTokens:
    """Writes and reads the refresh tokens of one deployment."""

    def __init__(self, *, brand: str, environment: str, make_mac: MacMaker, check_mac: MacChecker) -> None:
        self._brand = brand
        self._environment = environment
        self._prefix = f"{brand}_{environment}_rt_"
        # The prefix is under the MAC too: a token cannot be carried over by writing another environment in front of it.
        self._label = self._prefix.encode("ascii")
        self._make_mac = make_mac
        self._check_mac = check_mac

    def write(self, session_id: bytes, generation: int) -> Secret:
        """The token of this generation of the session: always the same for the same key."""
        body = session_id + generation.to_bytes(_GENERATION)
        mac = self._make_mac(self._label + body)[:_MAC]
        return Secret(self._prefix + base64.urlsafe_b64encode(body + mac).decode("ascii"))

    def read(self, token: Secret) -> RefreshClaim:
        """What ``token`` says, once its MAC is right. Raises ``InvalidCredential``, or ``WrongEnvironment`` by its prefix."""
        text = token.reveal()
        match = _PATTERN.fullmatch(text) if len(text) <= _MAX_LENGTH else None
        if match is None:
            raise InvalidCredential
        brand, environment, payload = match.groups()
        if brand != self._brand:
            raise InvalidCredential
        if environment != self._environment:
            raise WrongEnvironment(environment=environment)
        raw = base64.urlsafe_b64decode(payload)
        body, mac = raw[: _ID + _GENERATION], raw[_ID + _GENERATION :]
        if not self._check_mac(self._label + body, mac):
            raise InvalidCredential
        return RefreshClaim(body[:_ID], int.from_bytes(body[_ID:]))
