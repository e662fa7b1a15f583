"""Registration: an organisation makes itself a partner, with an e-mail address that it can read.

What happens when one registers (``POST /api/v2/Partners/Register``):

1. ``http/registration.py`` has checked every field. ``Registrations.register`` makes a code and its slow digest, for every
   address alike: how long it takes must not tell what is known of the address.
2. ``store/registration.py`` ``begin_registration`` keeps the digest and queues the mail, in one transaction, or finds that the
   address has had its share of mails; nobody is told which. The mailer sends later, out of the sight of whoever waits.

What happens when the code comes back (``…/Register/Verify``):

1. ``claim_attempt`` counts the attempt before anything is judged. So of any number of guesses at once, five are judged.
2. The slow digest of what was presented is compared here; with nothing to judge, one is made all the same.
3. ``confirm_registration`` lets a right code have its effect, once, and takes the attempt off the count. The new key is also
   kept sealed under the code, so that an answer that got lost can be asked for again: ``repeat_confirmation``.
"""

import asyncio
import hashlib
import hmac
import unicodedata
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol, TypeAlias, assert_never

from gatelodge.errors import Unavailable
from gatelodge_server.core.credentials import Credentials
from gatelodge_server.core.ids import uuid7
from gatelodge_server.core.mails import mail_secret_label
from gatelodge_server.core.model import (
    MINUTE,
    SECOND,
    Clock,
    Credential,
    Duration,
    Entropy,
    Instant,
    Tier,
)
from gatelodge_server.core.ports import (
    Begun,
    Challenge,
    Confirmation,
    Confirmed,
    Deactivated,
    Digester,
    Limited,
    MailLimits,
    PartnerStore,
    Recovery,
    Refused,
    Registrant,
    Registration,
    RegistrationStore,
    Replay,
    Rolled,
    RolledBefore,
    RolledTooOften,
    Sealer,
)
from gatelodge_server.core.refusals import InvalidVerificationCode, KeyNotFound, PartnerNotFound, TooManyRequests
from gatelodge_server.core.secrets import Secret

CODE_TTL: Final[Duration] = 10 * MINUTE
"""For so long is a code good (OWASP ASVS 6.5.5), and may the answer to it be asked for again."""
CODE_ATTEMPTS: Final = 5
"""So often may one code be guessed at: the chance to be right is then 5 in a million."""
DAY_FAILURES: Final = 25
"""So often may be guessed at the codes of one address in a day by UTC, however many codes it is sent."""
ADDRESS_MAX: Final = 320
"""Characters of an address in its canonical form, which may be longer than the one that was written."""
KEYS_AN_HOUR: Final = 30
"""So many keys may a partner have been given in the last hour when it asks for one more: rows of keys are kept for ever."""
REPLAY_WINDOW: Final[Duration] = 10 * MINUTE
"""For so long may the answer to a rotation be asked for again, unless the new key is used before."""

_CODE_DIGITS: Final = 6
_CODES: Final = 10**_CODE_DIGITS
_DRAW_BYTES: Final = 4
_FAIR_DRAWS: Final = 256**_DRAW_BYTES // _CODES * _CODES

_SALT_BYTES: Final = 16
_NOBODYS_SALT: Final = bytes(_SALT_BYTES)
_NOBODYS_DIGEST: Final = bytes(32)
_AT_ONCE: Final = 2
_PLACES: Final = 64

_SLUGS: Final = 50
_SUFFIX_BYTES: Final = 5
_FALLBACK_SLUG: Final = "partner"


def canonical_address(text: str) -> str:
    """The form in which e-mail addresses are compared. Takes one that a validator has accepted and normalised.

    - The part before the last `@`: NFKC, then case-folded (Unicode 3.13, D144), then NFKC again, since folding may undo it. So
      `Mike`, `mike` and a `mike` with a Kelvin sign are one; with a dotless i it is another.
    - The domain: lower case, each label that is not ASCII as its A-label (RFC 5890 2.3.2.1). The validator has mapped and
      checked the labels by IDNA 2008, so what is left to do is Punycode (RFC 3492). `straße.de` is not `strasse.de`.

    It is for comparing only: mail goes to an address as its owner wrote it (CVE-2019-19844).
    """
    local, _, domain = text.rpartition("@")
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", local).casefold())
    labels = (unicodedata.normalize("NFC", label.lower()) for label in domain.split("."))
    return f"{folded}@{'.'.join(map(_a_label, labels))}"


def _a_label(label: str) -> str:
    return label if label.isascii() else "xn--" + label.encode("punycode").decode("ascii")


def verification_code(entropy: Entropy) -> str:
    """Six digits, each code as likely as any other: a draw that would favour the lower ones is drawn again."""
    while True:
        draw = int.from_bytes(entropy(_DRAW_BYTES))
        if draw < _FAIR_DRAWS:
            return f"{draw % _CODES:0{_CODE_DIGITS}}"


def slow_digest(peppered: bytes, salt: bytes) -> bytes:
    """Scrypt (RFC 7914) of a code's keyed digest: some 50 ms of a core and 16 MiB."""
    return hashlib.scrypt(peppered, salt=salt, n=2**14, r=8, p=1, dklen=32)


Purpose: TypeAlias = Literal["register", "verify"]
"""What a slow digest is made for."""


class SlowDigests:
    """Makes the slow digests of codes: in threads, two at once, and for so many callers only as can be served in a while.

    A code has 20 bits, so no digest alone keeps it from whoever has the database: it is keyed with the deployment's pepper,
    which is not there. Salt and slowness are for the day when the pepper is lost as well.
    """

    def __init__(self, *, digester: Digester) -> None:
        self._digester = digester
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._taken: Counter[Purpose] = Counter()

    @contextmanager
    def place(self, purpose: Purpose) -> Iterator[None]:
        """Take a place in the queue, before anything is decided that would be lost. Raises ``Unavailable`` if it is full.

        Each purpose has places of its own: a crowd that registers keeps nobody from using the code that was mailed.
        """
        if self._taken[purpose] >= _PLACES:
            raise Unavailable
        self._taken[purpose] += 1
        try:
            yield
        finally:
            self._taken[purpose] -= 1

    async def digest(self, address: str, code: Secret, salt: bytes) -> bytes:
        """The digest that is stored of an address's code."""
        peppered = self._digester.digest(_bound(address, code), purpose="verification-code")
        async with self._turns:
            return await asyncio.to_thread(slow_digest, peppered, salt)


def _bound(address: str, code: Secret) -> bytes:
    # No canonical address has a line break, so no two pairs look alike. What is no text at all is a wrong code, not a fault.
    return f"{address}\n{code.reveal()}".encode("utf-8", "surrogatepass")


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRegistration:
    """What somebody says who wants to be a partner. Every field has been checked; ``None`` is "not said"."""

    contact_email: str
    display_name: str
    organization_name: str | None = None
    website_url: str | None = None
    intended_use: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrationRules:
    """What is configured about registration."""

    tier: str
    """The tier of a partner that has registered itself."""
    recovery: Recovery
    limits: MailLimits


class Registering(NamedTuple):
    """What became of a registration. ``outcome`` is for the log alone: the asker is told the same of every address."""

    expires_at: Instant
    outcome: Begun | Limited


class VerifiedKey(NamedTuple):
    """A partner's new key, to be shown this once."""

    api_key: Secret
    partner_id: str
    tier: Tier
    expires_at: Instant | None = None
    sequence: int | None = None
    """The change in which it took the place of another, or a later one; ``None`` where it did not, and for a rotation that is
    asked for again."""


def _verified(key: Secret, done: Confirmed) -> VerifiedKey:
    return VerifiedKey(key, done.partner_id, done.tier, sequence=done.sequence if done.is_recovery else None)


class Standing(NamedTuple):
    """What a partner may know of itself and of the key that it uses."""

    registrant: Registrant
    key: Credential


class RegistrarStore(RegistrationStore, PartnerStore, Protocol):
    """What registration needs of a store."""


async def _admit_all() -> None:
    """Nobody is counted."""


class Registrations:
    """Partners that register themselves in one environment, and what they do with their key later."""

    def __init__(
        self,
        *,
        store: RegistrarStore,
        credentials: Credentials,
        sealer: Sealer,
        digester: Digester,
        clock: Clock,
        entropy: Entropy,
        slugify: Callable[[str], str],
        rules: RegistrationRules,
        on_mail_queued: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._credentials = credentials
        self._sealer = sealer
        self._digester = digester
        self._digests = SlowDigests(digester=digester)
        self._clock = clock
        self._entropy = entropy
        self._slugify = slugify
        self._rules = rules
        self._on_mail_queued = on_mail_queued

    async def register(self, new: NewRegistration, *, admit: Callable[[], Awaitable[None]] = _admit_all) -> Registering:
        """Send a code to an address, if it is to have one. The asker is told when that code expires, sent or not.

        ``admit`` counts the asker's registrations, and raises: only once there is a place, so that a 503 costs nobody a try.
        """
        now = self._clock()
        address = canonical_address(new.contact_email)
        expires_at = now + CODE_TTL
        code, salt, mail_id = Secret(verification_code(self._entropy)), self._entropy(_SALT_BYTES), uuid7(now, self._entropy)
        with self._digests.place("register"):
            await admit()
            digest = await self._digests.digest(address, code, salt)
        registration = Registration(
            address=address,
            contact_email=new.contact_email,
            display_name=new.display_name,
            organization_name=new.organization_name,
            website_url=new.website_url,
            intended_use=new.intended_use,
            salt=salt,
            digest=digest,
            now=now,
            expires_at=expires_at,
            mail_id=mail_id,
            mail_secret=self._sealer.seal(code.reveal().encode("ascii"), label=mail_secret_label(mail_id)),
        )
        rules = self._rules
        outcome = await self._store.begin_registration(registration, limits=rules.limits, recovery=rules.recovery)
        self._on_mail_queued()
        return Registering(expires_at, outcome)

    async def verify(self, contact_email: str, code: Secret) -> VerifiedKey:
        """Exchange a code for a partner's key. Raises ``InvalidVerificationCode`` for whatever is not right with it."""
        now = self._clock()
        address = canonical_address(contact_email)
        with self._digests.place("verify"):
            challenge = await self._store.claim_attempt(address, now=now)
            salt = _NOBODYS_SALT if challenge is None else challenge.salt
            presented = await self._digests.digest(address, code, salt)
        known = _NOBODYS_DIGEST if challenge is None else challenge.digest
        if not hmac.compare_digest(known, presented) or challenge is None:
            raise InvalidVerificationCode
        if challenge.is_confirmed:
            return await self._repeat(address, code, challenge, now)
        return await self._confirm(address, code, challenge, now)

    async def rotate(self, presented: Secret, *, overlap: Duration, idempotency_key: str | None) -> VerifiedKey:
        """Give the presenter of a key a new one; the old one works on for ``overlap``.

        Raises a ``Rejected``, ``NotAllowed`` for a company's key, ``KeyEnded`` for one that has been rotated already,
        ``TooManyRequests`` for one key more than ``KEYS_AN_HOUR``, and the refusals of an Idempotency-Key.
        """
        now = self._clock()
        old = self._credentials.recognise(presented)
        issued = self._credentials.issue("", None, now)
        # Both the id and the seal need what is presented, and the row alone opens nothing.
        caller = None if idempotency_key is None else f"rotate:{presented.reveal()}\n{idempotency_key}".encode()
        replay = None if caller is None else self._replay(caller, overlap, issued.text, now)
        outcome = await self._store.roll_own_key(
            old.id, old.digest, issued.credential, ends_at=now + overlap, replay=replay, now=now
        )
        sequence: int | None = None
        match outcome:
            case Rolled(partner_id, tier, sequence):
                self._on_mail_queued()
                key = issued.text
            case RolledBefore(partner_id, tier, sealed):
                key = Secret(self._sealer.open(sealed, label=caller or b"").decode("ascii"))
            case RolledTooOften(again_at):
                raise TooManyRequests(-((now - again_at) // SECOND))
            case Refused(reason):
                raise reason
            case unreachable:
                assert_never(unreachable)
        return VerifiedKey(key, partner_id, tier, sequence=sequence)

    async def describe(self, partner_id: str, key_id: str) -> Standing:
        """What there is to say of a partner and of one of its keys."""
        key = await self._store.get_key(key_id)
        if key is None:
            raise KeyNotFound
        registrant = await self._store.find_registrant(partner_id)
        if registrant is None:
            raise PartnerNotFound
        return Standing(registrant, key)

    async def deactivate(self, presented: Secret) -> Deactivated:
        """End the partner of the presenter of a key, for good.

        Raises a ``Rejected``; ``NotAllowed`` for a company's key, and for a partner that has not registered itself: what a
        partner manager has made, one API key that got out does not end.
        """
        key = self._credentials.recognise(presented)
        match await self._store.deactivate_own(key.id, key.digest, now=self._clock()):
            case Refused(reason):
                raise reason
            case done:
                self._on_mail_queued()
                return done

    async def _confirm(self, address: str, code: Secret, challenge: Challenge, now: Instant) -> VerifiedKey:
        issued = self._credentials.issue(challenge.partner_id or "", None, now)
        confirmation = Confirmation(
            address=address,
            challenge=challenge,
            candidates=self._candidates(challenge.organization_name or challenge.display_name),
            tier=self._rules.tier,
            key=issued.credential,
            sealed=self._sealer.seal(issued.text.reveal().encode("ascii"), label=_answer_label(address, code)),
            now=now,
        )
        match await self._store.confirm_registration(confirmation):
            case Confirmed() as done:
                self._on_mail_queued()
                return _verified(issued.text, done)
            case Refused(reason) if reason is InvalidVerificationCode:
                # The same code may have been sent twice, and the other one was quicker: its answer is this one's too.
                found = await self._store.claim_attempt(address, now=now)
                if found is None or not found.is_confirmed or found.digest != challenge.digest:
                    raise reason
                return await self._repeat(address, code, found, now)
            case Refused(reason):
                raise reason
            case unreachable:
                assert_never(unreachable)

    async def _repeat(self, address: str, code: Secret, challenge: Challenge, now: Instant) -> VerifiedKey:
        if challenge.sealed is None:
            raise InvalidVerificationCode
        try:
            key = Secret(self._sealer.open(challenge.sealed, label=_answer_label(address, code)).decode("ascii"))
        except ValueError:  # sealed under a master key that is not honoured any more
            raise InvalidVerificationCode from None
        match await self._store.repeat_confirmation(address, challenge, now=now):
            case Confirmed() as done:
                return _verified(key, done)
            case Refused(reason):
                raise reason
            case unreachable:
                assert_never(unreachable)

    def _candidates(self, name: str) -> Sequence[str]:
        slug = self._slugify(name) or _FALLBACK_SLUG
        return [slug, *(f"{slug}-{n}" for n in range(2, _SLUGS + 1)), f"{slug}-{self._entropy(_SUFFIX_BYTES).hex()}"]

    def _replay(self, caller: bytes, overlap: Duration, key: Secret, now: Instant) -> Replay:
        return Replay(
            id=self._digester.digest(caller, purpose="replay-id"),
            fingerprint=self._digester.digest(caller + b"\n" + str(overlap).encode("ascii"), purpose="replay-fingerprint"),
            sealed=self._sealer.seal(key.reveal().encode("ascii"), label=caller),
            readable_until=now + REPLAY_WINDOW,
        )


def _answer_label(address: str, code: Secret) -> bytes:
    return b"verify:" + _bound(address, code)
