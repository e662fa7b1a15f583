"""Signing keys: published before they sign, and for as long as what they signed may live.

The life of a key, each step an instant of ``model.SigningKey``:

1. ``published_at``: in the key set as *next*, signing nothing, so that every cache of the key set learns of it.
2. ``signs_from``: *current*. A rotation sets it, never sooner than ``KEY_SET_MAX_AGE`` after 1.
3. ``signs_until``: *retiring*, in the key set still.
4. ``gone_at``: out of the key set; by then the last token it signed has expired. Retiring it by hand sets it to now.

There are two rings of keys, one for session JWTs and one for access tokens (``KeyPurpose``), and neither knows the other's: a
key that gets out of one ring makes no token of the other kind. An access token does not expire, so a key of that ring has no
``gone_at`` before no live token needs it (``plan_withdrawals``), and cannot be retired by hand until then.

Every node reads the keys from the store and keeps them for at most ``RING_MAX_AGE``, and no longer than until it hears of a
change (``SigningKeys.hear``); a reading that fails is a 503 and never an old key trusted for longer. The other two files:
``store/signing.py``, ``http/metadata.py``.

A private half is taken out of its seal when it is to sign, not before. So keys that are sealed under a master key that this
process does not have are verified with and published all the same; only what they would have to sign is a 503.
"""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from gatelodge.errors import Unavailable
from gatelodge.tokens import (
    PrivateKey,
    VerificationKey,
    generate_private_key,
    private_key_from_bytes,
    private_key_to_bytes,
    public_jwk,
    sign_token,
)
from gatelodge_server.core.following import RESTORED
from gatelodge_server.core.model import MINUTE, Clock, Duration, Instant, KeyPurpose, SigningKey
from gatelodge_server.core.ports import Refused, Sealer, SigningKeyStore

KEY_SET_MAX_AGE: Final[Duration] = 5 * MINUTE
"""How long others may cache the key set, and so how long a key is published before it signs."""
GRACE: Final[Duration] = 2 * MINUTE
"""How much longer than it is needed a key stays published: for clocks that differ and for nodes that read late."""
RING_MAX_AGE: Final = 1.0
"""Seconds, by the monotonic clock, for which a reading of the keys is trusted."""
_RENEWAL_AGE: Final = 0.5
"""Seconds after which the next reading begins, so that a busy server never waits for one."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """What a rotation changes, and what it leads to."""

    changed: Sequence[SigningKey]
    kid: str
    signs_from: Instant


def plan_rotation(
    keys: Sequence[SigningKey], candidate: SigningKey, *, lead: Duration, life: Duration | None, now: Instant
) -> Rotation:
    """Let the next key sign as soon as every cache can know it, and publish ``candidate`` as the new next.

    ``keys`` are those of one ring. ``life`` is how long the old key stays published; ``None``: until it is withdrawn.
    A rotation that is still to take effect is not overtaken: asking again gives the same one and changes nothing.
    """
    waiting = [key for key in keys if key.state(now) == "next"]
    pending = next((key for key in waiting if key.signs_from is not None), None)
    if pending is not None and pending.signs_from is not None:
        return Rotation((), pending.kid, pending.signs_from)
    successor = waiting[0]
    starts = max(now, successor.published_at + lead)
    changed = [replace(successor, signs_from=starts), candidate]
    gone_at = None if life is None else starts + life
    changed += [replace(key, signs_until=starts, gone_at=gone_at) for key in keys if key.state(now) == "current"]
    return Rotation(changed, successor.kid, starts)


def plan_retirement(keys: Sequence[SigningKey], kid: str, *, live_tokens: int, now: Instant) -> Sequence[SigningKey] | None:
    """Withdraw a key at once; ``None`` if that would leave no key to sign with, or end ``live_tokens`` access tokens.

    Nobody would be told that these have ended, nor could they be rotated afterwards; so they are rotated or revoked first.
    The current key can go once a rotation is under way: its successor then signs from now, known to every cache or not,
    because whoever withdraws a key does not want another token from it.
    """
    key = next(key for key in keys if key.kid == kid)
    state = key.state(now)
    gone = replace(key, signs_until=min(key.signs_until or now, now), gone_at=now)
    if state == "gone":
        return []
    if live_tokens:
        return None
    if state == "retiring":
        return [gone]
    pending = next((k for k in keys if k.state(now) == "next" and k.signs_from is not None and k.kid != kid), None)
    if state == "next" or pending is None:
        return None
    return [gone, replace(pending, signs_from=now)]


def plan_withdrawals(keys: Sequence[SigningKey], live_tokens: Mapping[str, int], *, now: Instant) -> Sequence[SigningKey]:
    """Withdraw the keys for access tokens that no longer sign and that no live token needs. ``live_tokens``: by `kid`.

    Not before every node has stopped signing with them: an access token that is signed a moment too late could not be issued.
    """
    return [
        replace(key, gone_at=now)
        for key in keys
        if key.purpose is KeyPurpose.ACCESS
        and key.state(now) == "retiring"
        and key.signs_until is not None
        and now >= key.signs_until + GRACE
        and not live_tokens.get(key.kid)
    ]


@dataclass(frozen=True, slots=True)
class _Ring:
    """The keys as they were read at one moment."""

    keys: Sequence[SigningKey]
    public: Mapping[str, VerificationKey]
    read_at: float


class Signer(NamedTuple):
    """A key that signs."""

    kid: str
    key: PrivateKey

    def sign(self, claims: Mapping[str, object], *, typ: str) -> str:
        """A token with these claims."""
        return sign_token(claims, key=self.key, kid=self.kid, typ=typ)


class SigningKeys:
    """One ring: signs what is of its purpose, and tells others what to verify that with.

    ``jwt_ttl`` is how long the longest-lived token lives that it signs; ``None`` for tokens that do not expire.
    ``on_unopened`` is told, once for each key, the `kid` of a key that is to sign and cannot be opened.
    """

    def __init__(
        self,
        *,
        purpose: KeyPurpose,
        store: SigningKeyStore,
        sealer: Sealer,
        clock: Clock,
        monotonic: Callable[[], float],
        jwt_ttl: Duration | None,
        on_unopened: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._purpose = purpose
        self._store = store
        self._sealer = sealer
        self._clock = clock
        self._monotonic = monotonic
        self._life = None if jwt_ttl is None else jwt_ttl + GRACE
        self._on_unopened = on_unopened
        self._ring: _Ring | None = None
        self._private: dict[str, PrivateKey] = {}
        """Those that have signed and are not gone."""
        self._unopened: set[str] = set()
        self._reading: asyncio.Task[_Ring] | None = None

    async def signer(self, now: Instant) -> Signer:
        """What signs at ``now``. Asked for before a decision, so that what was decided can be told. Raises ``Unavailable``.

        Also for a key that is sealed under another master key: a command that reads the key file anew has rotated to it.
        """
        ring = await self._fresh_ring()
        for key in ring.keys:
            if key.state(now) == "current":
                return self._signer_of(key)
        # The clock has been set back behind the day on which the first key began to sign. Nobody is shut out for that: the
        # first key it is. One that was told nothing yet (`signs_from`) may not be known to every cache.
        known = [key for key in ring.keys if key.signs_from is not None and key.state(now) == "next"]
        if not known:
            raise Unavailable
        first = min(known, key=lambda key: key.signs_from or 0)
        return self._signer_of(first)

    def find(self, kid: str) -> VerificationKey | None:
        """Not without the store: a ``Verifier`` over these keys is to be asked with ``verify_async``."""
        raise NotImplementedError

    async def find_async(self, kid: str) -> VerificationKey | None:
        """The ring's key with this id if a live token may be signed with it; the same object for as long as that is so."""
        ring = await self._fresh_ring()
        now = self._clock()
        return next((ring.public[kid] for key in ring.keys if key.kid == kid and key.state(now) != "gone"), None)

    async def key_set(self) -> list[dict[str, str]]:
        """The public JWKs of the key set (RFC 7517 section 5), oldest first."""
        return [json.loads(key.jwk) for key in await self._published()]

    async def list_keys(self) -> Sequence[SigningKey]:
        """Every key of the ring that there is or was, oldest first."""
        return [key for key in await self._store.list_signing_keys() if key.purpose is self._purpose]

    async def count_live_tokens(self) -> Mapping[str, int]:
        """How many access tokens that may still be used each key has signed, by `kid`."""
        return await self._store.count_live_tokens(now=self._clock())

    async def establish(self) -> None:
        """Make the ring's first current and its first next key, unless it has keys."""
        if await self.list_keys():
            return  # the usual case, and it needs no write
        now = self._clock()
        first = [replace(self._make(now), signs_from=now), self._make(now)]
        await self._store.establish_signing_keys(first, now=now)

    async def rotate(self, *, by: str) -> SigningKey:
        """Let the next key sign. It does so at once, or at its ``signs_from`` if caches may not know it yet."""
        now = self._clock()
        await self._store.rotate_signing_keys(self._make(now), lead=KEY_SET_MAX_AGE, life=self._life, now=now, by=by)
        keys = await self.list_keys()
        return max((key for key in keys if key.signs_from is not None), key=lambda key: key.signs_from or 0)

    async def retire(self, kid: str, *, by: str) -> int:
        """Withdraw a key of any ring, and with it what it signed. The change's sequence number.

        Raises ``SigningKeyNotFound`` or ``SigningKeyInUse``.
        """
        match await self._store.retire_signing_key(kid, now=self._clock(), by=by):
            case Refused(reason):
                raise reason
            case done:
                return done.sequence

    def hear(self, kind: str, _subject: str) -> None:
        """Something has changed (``following.ChangeFollower``). If it is a signing key, what was read before is not used again.

        A verifier forgets whom it let in when a key is withdrawn; it must not let them in anew by a ring that is a second old.
        """
        if kind in {"signing-key", RESTORED}:
            self._reading = None  # it may have begun before the change
            if self._ring is not None:
                self._ring = replace(self._ring, read_at=float("-inf"))

    async def _published(self) -> Sequence[SigningKey]:
        now = self._clock()
        return [key for key in (await self._fresh_ring()).keys if key.state(now) != "gone"]

    async def _fresh_ring(self) -> _Ring:
        ring, now = self._ring, self._monotonic()
        if ring is None or now >= ring.read_at + RING_MAX_AGE:
            # Shielded, and all wait for the one task: a lock would let them go on one by one, a round of the loop for each.
            return await asyncio.shield(self._begin_reading())
        if now >= ring.read_at + _RENEWAL_AGE:
            self._begin_reading()
        return ring

    def _begin_reading(self) -> asyncio.Task[_Ring]:
        if self._reading is None:
            self._reading = asyncio.get_running_loop().create_task(self._read_ring())
            self._reading.add_done_callback(self._end_reading)
        return self._reading

    def _end_reading(self, reading: asyncio.Task[_Ring]) -> None:
        if self._reading is reading:
            self._reading = None
        if not reading.cancelled():
            reading.exception()  # those who wait hear of it; if nobody does yet, the next reading will tell

    async def _read_ring(self) -> _Ring:
        read_at = self._monotonic()  # before the reading: what is written during it may not be in it
        now = self._clock()
        keys = [key for key in await self.list_keys() if key.state(now) != "gone"]
        old = self._ring or _Ring((), {}, read_at)
        ring = _Ring(
            keys,
            {key.kid: old.public.get(key.kid) or VerificationKey.from_jwk(json.loads(key.jwk)) for key in keys},
            read_at,
        )
        if self._reading is asyncio.current_task():
            self._ring = ring
            self._private = {key.kid: self._private[key.kid] for key in keys if key.kid in self._private}
        return ring

    def _make(self, now: Instant) -> SigningKey:
        private = generate_private_key()
        jwk = public_jwk(private)
        kid = jwk["kid"]
        wrapped = self._sealer.seal(private_key_to_bytes(private), label=_label(kid))
        return SigningKey(kid, json.dumps(jwk, separators=(",", ":")), wrapped, published_at=now, purpose=self._purpose)

    def _signer_of(self, key: SigningKey) -> Signer:
        private = self._private.get(key.kid)
        if private is None:
            try:
                opened = self._sealer.open(key.wrapped, label=_label(key.kid))
            except ValueError:
                if key.kid not in self._unopened:
                    self._unopened.add(key.kid)
                    self._on_unopened(key.kid)
                raise Unavailable from None
            private = self._private[key.kid] = private_key_from_bytes(opened)
        return Signer(key.kid, private)


def _label(kid: str) -> bytes:
    return b"signing-key:" + kid.encode("ascii")
