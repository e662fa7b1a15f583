"""What others must refuse from now on, read out of the change sequence, and who has heard of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from gatelodge.errors import Rejected
from gatelodge_server.core.model import Change, Duration, Instant
from gatelodge_server.core.ports.common import Refused


@dataclass(frozen=True, slots=True)
class Revocation:
    """What a subject has come to. It tells the whole state, so a newer one takes the place of an older one."""

    sequence: int
    """The step of the change sequence that it is told by."""
    kind: str
    """``session``, ``credential``, ``company``, ``partner`` or ``signing-key``."""
    subject: str
    """Its id: a session's in hexadecimal, a company's UUID, a key's public id, a partner's slug, a `kid`."""
    at: Instant | None
    """When the step was made; ``None`` for what is only restated."""
    reason: type[Rejected] | None
    """With what session JWTs of the subject are refused; ``None``: with nothing, any more."""
    ends_at: Instant | None = None
    """From when on they are refused; ``None``: at once."""
    epoch: int | None = None
    """Of a partner: session JWTs of an earlier epoch are revoked, whatever ``reason`` says."""


@dataclass(frozen=True, slots=True)
class Tail:
    """What is behind a step of the change sequence."""

    step: Change | None
    """That step itself, as it stands in the database; ``None`` if there is no such step."""
    oldest: Change | None
    """The first step behind it."""
    last: Change | None
    """The last step that was looked at; ``step`` if there is none behind it."""
    revocations: Sequence[Revocation]
    has_more: bool


class Beginning(NamedTuple):
    """What somebody who knows nothing is told first: what the steps that come next no longer say."""

    step: Change | None
    """The step to go on behind; ``None``: behind none, from the first on."""
    revocations: Sequence[Revocation]
    next: tuple[str, str] | None
    """Kind and subject to go on after; ``None``: this was all."""


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """A verifier has applied everything up to a step."""

    verifier: str
    sequence: int
    now: Instant
    within: Duration
    """Whoever was seen less than this ago is there, and keeps its place: the maximum staleness."""


class Reach(NamedTuple):
    """How many follow, and how many of them have applied a step."""

    sequence: int
    verifiers: int
    acknowledged: int


class RevocationStore(Protocol):
    """The feed of revocations and those who follow it."""

    async def read_revocations(self, *, after: int, limit: int) -> Tail:
        """What the next ``limit`` steps after ``after`` have changed for outside verifiers: each subject as it stands now."""
        ...

    async def begin_revocations(self, *, since: Instant, after: tuple[str, str] | None, limit: int) -> Beginning:
        """Where to begin so that every step made after ``since`` is read, and what older steps have left behind.

        That is suspended partners, and keys that end after ``since`` though their end was decided before: at most ``limit`` of
        them, in order, after the kind and subject ``after``.
        """
        ...

    async def acknowledge_step(self, acknowledgement: Acknowledgement) -> Refused | None:
        """Note what a verifier has applied and that it was there.

        A step that is not there is refused with ``StepNotFound``. A new verifier beyond ``VERIFIERS_MAX`` takes the place of
        the one that was seen longest ago, if that is not there any more, and is refused with ``TooManyRequests`` if all are.
        """
        ...

    async def count_reach(self, sequence: int, *, within: Duration, now: Instant) -> Reach:
        """How many verifiers were seen less than ``within`` ago, and how many of them have applied step ``sequence``."""
        ...

    async def forget_verifiers(self, *, away_for: Duration, now: Instant) -> int:
        """Delete verifiers that were last seen longer ago than that; how many there were."""
        ...
