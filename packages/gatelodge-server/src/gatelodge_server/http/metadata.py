"""What the service says of itself: its keys, its health, its description."""

import hashlib
from collections.abc import Sequence
from http import HTTPStatus
from typing import Final

import msgspec

from gatelodge.errors import Unavailable
from gatelodge_server.core.following import ChangeFollower
from gatelodge_server.core.model import SECOND
from gatelodge_server.core.ports import TrailStore
from gatelodge_server.core.signing import KEY_SET_MAX_AGE, SigningKeys
from gatelodge_server.http.draining import Draining
from gatelodge_server.http.operation import Answer, Call, Operation
from gatelodge_server.http.problems import AboutToStop

_FRESH: Final = (b"cache-control", b"no-cache")


class KeySetAnswer(msgspec.Struct, frozen=True):
    """A JWK set (RFC 7517): public keys only, the next one included before it signs."""

    keys: list[dict[str, str]]


class HealthAnswer(msgspec.Struct, frozen=True):
    """How it goes."""

    status: str


class MetadataRoutes:
    """The handlers of what needs no credential."""

    def __init__(
        self,
        *,
        store: TrailStore,
        signing_keys: SigningKeys,
        access_keys: SigningKeys,
        follower: ChangeFollower,
        draining: Draining,
    ) -> None:
        self._store = store
        self._follower = follower
        self._draining = draining
        self._rings = (signing_keys, access_keys)

    async def key_set(self, call: Call, _: None) -> Answer:
        """The keys that session JWTs and access tokens are verified with; the `typ` of a token tells which it is."""
        body = KeySetAnswer(await self._published())
        tag = b'"' + hashlib.sha256(msgspec.json.encode(body)).hexdigest()[:32].encode("ascii") + b'"'
        caching = f"public, max-age={KEY_SET_MAX_AGE // SECOND}".encode("ascii")
        headers = ((b"cache-control", caching), (b"etag", tag))
        if _names(call.header(b"if-none-match"), tag):
            return Answer(HTTPStatus.NOT_MODIFIED, None, headers)
        return Answer(HTTPStatus.OK, body, headers)

    async def health(self, _call: Call, _: None) -> Answer:
        """The process runs and answers."""
        return Answer(HTTPStatus.OK, HealthAnswer("alive"), (_FRESH,))

    async def readiness(self, _call: Call, _: None) -> Answer:
        """The process can take traffic: it is not about to stop, the store answers, changes are heard, keys can sign."""
        if self._draining.has_begun:
            raise AboutToStop
        await self._store.ping()
        if not self._follower.is_following():
            # As every request does that cannot believe what is remembered: what refuses them refuses here.
            await self._follower.catch_up()
        await self._published()
        return Answer(HTTPStatus.OK, HealthAnswer("ready"), (_FRESH,))

    async def _published(self) -> list[dict[str, str]]:
        return [key for ring in self._rings for key in await ring.key_set()]

    def operations(self) -> Sequence[Operation]:
        """What is served here."""
        return [
            Operation(
                method="GET",
                path="/.well-known/jwks.json",
                tag="Service",
                summary="The key set",
                description="Public keys for verifying tokens offline. Cache it; a new key is here before its first use.",
                handler=self.key_set,
                answers={200: KeySetAnswer, 304: None},
                refusals=(Unavailable,),
            ),
            Operation(
                method="GET",
                path="/healthz",
                tag="Service",
                summary="Liveness",
                handler=self.health,
                answers={200: HealthAnswer},
            ),
            Operation(
                method="GET",
                path="/readyz",
                tag="Service",
                summary="Readiness",
                description="For load balancers: 503 when the process is about to stop, or cannot serve.",
                handler=self.readiness,
                answers={200: HealthAnswer},
                refusals=(AboutToStop, Unavailable),
            ),
        ]


def _names(known: bytes | None, tag: bytes) -> bool:
    """Whether an `If-None-Match` names the tag (RFC 9110 13.1.2: a list, compared weakly; caches on the way weaken tags)."""
    if known is None:
        return False
    return known.strip() == b"*" or tag in {each.strip().removeprefix(b"W/") for each in known.split(b",")}
