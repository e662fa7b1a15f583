"""Where registrations wait for their code, and mails for being sent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol, TypeAlias

from gatelodge_server.core.model import Credential, Duration, Instant, MailKind, Partner, Tier
from gatelodge_server.core.ports.common import Refused


class Mail(NamedTuple):
    """A mail to be written. ``facts`` fill its template and hold no secret; ``sealed`` holds one (``core/mails.py``)."""

    id: bytes
    """A UUIDv7, or of a notice what stands for its step of the change sequence; also its `Message-ID`."""
    kind: MailKind
    recipient: str
    facts: Mapping[str, str]
    sealed: bytes | None
    created_at: Instant
    expires_at: Instant
    """After this moment nobody needs it any more."""
    attempts: int = 0
    """How often it has been claimed, this time included."""
    ahead: Duration = 0
    """By what the store's clock, by which the instants of a mail are, is ahead of the clock of whoever has claimed it."""


class MailLimits(NamedTuple):
    """How many mails registration may cause."""

    per_address: int
    """To one address in an hour."""
    overall: int
    """To all addresses in an hour: so many to new ones, and as many to those of partners, whom no flood of the former may lock
    out."""
    per_address_daily: int
    """To one address in 24 hours."""


LimitName: TypeAlias = Literal["mails_per_address", "mails_per_address_daily", "mails_overall", "recovery"]
"""The setting that kept a mail back."""


class Begun(NamedTuple):
    """A mail of this kind has been queued."""

    kind: MailKind


class Limited(NamedTuple):
    """Nothing has changed and nobody is sent anything."""

    by: LimitName


@dataclass(frozen=True, slots=True)
class Registration:
    """Somebody asks to be registered. What was said has been checked; the code is known by its slow digest only."""

    address: str
    """In the form in which addresses are compared (``registration.canonical_address``)."""
    contact_email: str
    display_name: str
    organization_name: str | None
    website_url: str | None
    intended_use: str | None
    salt: bytes
    digest: bytes
    now: Instant
    expires_at: Instant
    mail_id: bytes
    mail_secret: bytes
    """The code, sealed for the mail."""

    def at(self, now: Instant) -> "Registration":
        """The same at another moment: the code is to live as long."""
        return replace(self, now=now, expires_at=self.expires_at + now - self.now)


class Challenge(NamedTuple):
    """An attempt to be judged: it has been counted already."""

    salt: bytes
    digest: bytes
    created_at: Instant
    """Which code it is: a newer one has another."""
    partner_id: str | None
    """Whose key is to be recovered; ``None``: a new partner."""
    display_name: str
    organization_name: str | None
    is_confirmed: bool
    sealed: bytes | None
    """The answer of a Verify that has succeeded, while it may be asked for again."""


@dataclass(frozen=True, slots=True)
class Confirmation:
    """The code was right: make a partner of it, or give the partner that there is a new key."""

    address: str
    challenge: Challenge
    candidates: Sequence[str]
    """Ids for a new partner, the best first; the first that nobody has or had is taken."""
    tier: str
    key: Credential
    """Its ``partner_id`` is set by the verb."""
    sealed: bytes
    """The new key, sealed under the code, so that a lost answer can be asked for again until the code expires."""
    now: Instant


class Confirmed(NamedTuple):
    """The partner stands and has this key."""

    partner_id: str
    tier: Tier
    sequence: int
    is_recovery: bool
    """Whether the key took the place of others that the partner had: those have ended with step ``sequence``, or before it."""


Recovery: TypeAlias = Literal["on", "off"]
"""Whether a mailed code may give a partner that has registered itself a new key."""


class Sent(NamedTuple):
    """The mail was taken by a server, or lies in the directory."""


class Deferred(NamedTuple):
    """It was not, and is to be tried again at ``due_at``."""

    due_at: Instant
    fault: str


class GivenUp(NamedTuple):
    """It cannot be delivered, or nobody needs it any more."""

    fault: str


MailOutcome: TypeAlias = Sent | Deferred | GivenUp


@dataclass(frozen=True, slots=True)
class Registrant:
    """A partner, with the tier's limits."""

    partner: Partner
    tier: Tier


class RegistrationStore(Protocol):
    """Where registrations wait for their code, and mails for being sent."""

    async def begin_registration(
        self, registration: Registration, *, limits: MailLimits, recovery: Recovery
    ) -> Begun | Limited:
        """Keep a new code for the address in place of the one before, and queue its mail.

        A new address gets a verification code; one with an active partner that registered itself a recovery code, by mail to
        the address that the partner has on record (nothing if ``recovery`` is off); one whose partner is suspended no code
        but a mail that says so. Past a limit nothing changes and no mail is queued. Which it was is for the log: whoever asked
        must not see it, nor feel it by the time that it takes.
        """
        ...

    async def claim_attempt(self, address: str, *, now: Instant) -> Challenge | None:
        """Count an attempt at the address's code and say what to judge it by.

        ``None`` if there is nothing to judge: no code, an expired one, five attempts at it or 25 failures of the day (by
        UTC) already. Of any number of attempts at once, no more than five are given a challenge for one code.
        """
        ...

    async def confirm_registration(self, confirmation: Confirmation) -> Confirmed | Refused:
        """Let a right code have its effect, once; the attempt is taken off the count again.

        Refused with ``InvalidVerificationCode`` if the code has been replaced or confirmed meanwhile or the partner can no
        longer be recovered; with ``TierNotFound``.
        """
        ...

    async def repeat_confirmation(self, address: str, challenge: Challenge, *, now: Instant) -> Confirmed | Refused:
        """A right code came again after it had its effect: the attempt is taken off the count.

        Refused with ``InvalidVerificationCode`` if the key has been used, replaced or revoked meanwhile, or time is over.
        """
        ...

    async def find_registrant(self, partner_id: str) -> Registrant | None:
        """What there is to say of a partner to itself."""
        ...

    async def claim_mails(self, *, limit: int, now: Instant, until: Instant) -> Sequence[Mail]:
        """Mails that are due, codes before the rest, for this caller alone until ``until``: then they are due again."""
        ...

    async def settle_mail(self, mail_id: bytes, outcome: MailOutcome, *, now: Instant) -> None:
        """Say what became of a mail, in instants of the store's clock. A sealed secret is gone once it is sent or given up."""
        ...

    async def purge_mails(self, *, ended_before: Instant, now: Instant) -> None:
        """Delete mails that are over since then, and codes that are over, once nothing is counted against their address."""
        ...
