"""What has been revoked since a session JWT was signed, for a verifier that asks nobody. No I/O: ``feed.py`` brings the pages.

``RevocationSet`` knows what each subject has come to. A page of the issuer's feed says the whole state of every subject in it,
so a newer word takes the place of an older one, a repetition changes nothing, and a reset forgets all that was said before.

``Following`` decides what may be believed. The life of what is known, by its age since the request was *sent* that last brought
everything there was::

    (nothing) ──────────── 0 ───────────────────── max_staleness ──────────→
      refused                believed                refused: RevocationsUnavailable until a request brings everything

So a revocation is heeded, or everything refused, within that time, however long an answer took and whatever became of this
process meanwhile. A feed says whose it is, and is believed about JWTs of just that issuer and environment: another deployment's
knows nothing of them, and its silence must not let them in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple, Protocol

from gatelodge.errors import (
    CredentialExpired,
    CredentialRevoked,
    CredentialRotated,
    InvalidCredential,
    PartnerSuspended,
    Rejected,
    RevocationsUnavailable,
)
from gatelodge.strict import parse_json_object
from gatelodge.wire import ENVIRONMENT_PATTERN, Claim

MAX_STALENESS: Final = 10.0
"""Seconds; the issuer may ask for less."""
_POSITION_MAX: Final = 256
_SUBJECT_MAX: Final = 256
_ISSUER_MAX: Final = 1024
_TIDY_FROM: Final = 1024

_REASONS: Final[Mapping[str, type[Rejected]]] = {
    reason.code: reason
    for reason in (CredentialExpired, CredentialRevoked, CredentialRotated, InvalidCredential, PartnerSuspended)
}
_KINDS: Final = frozenset({"session", "credential", "company", "partner", "signing-key"})


class Source(NamedTuple):
    """Which deployment a JWT, or a feed, is of."""

    issuer: str
    environment: str


class JwtMarks(NamedTuple):
    """All that a revocation may name of a session JWT, and the deployment that can tell of it."""

    source: Source
    kid: str
    session: str
    credential_id: str
    company: str | None
    partner: str
    epoch: int

    @classmethod
    def of(cls, claims: Mapping[str, object], kid: str) -> "JwtMarks":
        """Read them off claims that ``verify_token`` gave."""
        company, epoch = claims.get(Claim.COMPANY), claims.get(Claim.EPOCH, 0)
        if type(epoch) is not int:
            raise InvalidCredential
        return cls(
            Source(str(claims.get(Claim.ISSUER)), str(claims.get(Claim.ENVIRONMENT))),
            kid,
            str(claims.get(Claim.SESSION)),
            str(claims.get(Claim.CLIENT_ID)),
            None if company is None else str(company),
            str(claims.get(Claim.PARTNER)),
            epoch,
        )


class Revocations(Protocol):
    """Whatever knows what has been revoked."""

    def check(self, jwt: JwtMarks, now: float) -> None:
        """Raise the ``Rejected`` that the JWT is refused with at ``now`` (Unix seconds), if it is.

        ``RevocationsUnavailable`` when that cannot be known. May wait a little for an answer of the issuer.
        """
        ...

    async def check_async(self, jwt: JwtMarks, now: float) -> None:
        """Do what ``check`` does without ever blocking the event loop."""
        ...


# --- The set ----------------------------------------------------------------------------------------------------------


class Revocation(NamedTuple):
    """What a subject has come to."""

    sequence: int
    kind: str
    subject: str
    reason: type[Rejected] | None
    """``None``: its JWTs are good again, but for their epoch."""
    ends_at: float
    """In Unix seconds: from when on they are refused."""
    epoch: int
    """Of a partner: JWTs of an earlier one are revoked."""
    until: float
    """In Unix seconds: from then on no JWT is left that it concerns."""


@dataclass(frozen=True, slots=True)
class FeedPage:
    """An answer of the feed."""

    source: Source
    """Whose feed it is."""
    sequence: int
    position: str
    is_reset: bool
    has_more: bool
    max_staleness: float
    revocations: Sequence[Revocation]

    @classmethod
    def parse(cls, document: bytes) -> "FeedPage":
        """Read an answer. ``ValueError`` unless it is whole: half of it would be believed for all of it.

        Kinds of subjects that are not known are left out; a reason that is not known is a ``CredentialRevoked``.
        """
        members = parse_json_object(document)
        if members is None:
            raise ValueError("the feed's answer is not a JSON object")
        entries, position = members.get("revocations"), members.get("position")
        if not isinstance(entries, list) or not isinstance(position, str) or not 0 < len(position) <= _POSITION_MAX:
            raise ValueError("the feed's answer has no revocations or no position")
        staleness = members.get("maxStaleness")
        if isinstance(staleness, bool) or not isinstance(staleness, (int, float)) or staleness <= 0:
            raise ValueError("the feed's answer has no maximum staleness")
        return cls(
            source=_source_of(members),
            sequence=_whole(members, "sequence"),
            position=position,
            is_reset=_switch(members, "reset"),
            has_more=_switch(members, "more"),
            max_staleness=float(staleness),
            revocations=[entry for entry in map(_revocation_of, entries) if entry is not None],
        )


def _source_of(members: Mapping[str, object]) -> Source:
    issuer, environment = members.get("issuer"), members.get("environment")
    if not isinstance(issuer, str) or not 0 < len(issuer) <= _ISSUER_MAX:
        raise ValueError("the feed's answer does not say its issuer")
    if not isinstance(environment, str) or ENVIRONMENT_PATTERN.fullmatch(environment) is None:
        raise ValueError("the feed's answer does not say its environment")
    return Source(issuer, environment)


def _revocation_of(entry: object) -> Revocation | None:
    if not isinstance(entry, Mapping):
        raise ValueError("a revocation is not an object")  # noqa: TRY004 - data, not a caller's mistake
    kind, subject, code = entry.get("kind"), entry.get("subject"), entry.get("code")
    if not isinstance(kind, str) or not isinstance(subject, str) or not 0 < len(subject) <= _SUBJECT_MAX:
        raise ValueError("a revocation has no kind or no subject")
    if code is not None and not isinstance(code, str):
        raise ValueError("a revocation's code is not text")
    epoch = 0 if entry.get("epoch") is None else _whole(entry, "epoch")
    revocation = Revocation(
        sequence=_whole(entry, "sequence"),
        kind=kind,
        subject=subject,
        reason=None if code is None else _REASONS.get(code, CredentialRevoked),
        ends_at=_time(entry, "endsAt", float("-inf")),
        epoch=epoch,
        until=_time(entry, "until", float("inf")),
    )
    return revocation if kind in _KINDS else None


def _whole(members: Mapping[str, object], name: str) -> int:
    value = members.get(name)
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is not a whole number")
    return value


def _switch(members: Mapping[str, object], name: str) -> bool:
    value = members.get(name)
    if not isinstance(value, bool):
        raise ValueError(f"{name} is not true or false")  # noqa: TRY004 - data, not a caller's mistake
    return value


def _time(entry: Mapping[str, object], name: str, otherwise: float) -> float:
    value = entry.get(name)
    if value is None:
        return otherwise
    moment = datetime.fromisoformat(value) if isinstance(value, str) else None
    if moment is None or moment.tzinfo is None:
        raise ValueError(f"{name} is not a time with an offset")
    return moment.timestamp()


class RevocationSet:
    """What each subject has come to, as far as it was told. Not thread-safe: its driver locks."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Revocation] = {}
        self._tidy_at = _TIDY_FROM

    def __len__(self) -> int:
        return len(self._known)

    def apply(self, page: FeedPage, now: float) -> None:
        """Take in a page. ``now``, in Unix seconds, is when what concerns no JWT any more is let go."""
        if page.is_reset:
            self._known.clear()
        for revocation in page.revocations:
            name = revocation.kind, revocation.subject
            known = self._known.get(name)
            if known is None or known.sequence <= revocation.sequence:
                self._known[name] = revocation
        if len(self._known) >= self._tidy_at:
            self._known = {name: one for name, one in self._known.items() if now < one.until}
            self._tidy_at = max(_TIDY_FROM, 2 * len(self._known))

    def judge(self, jwt: JwtMarks, now: float) -> type[Rejected] | None:
        """With what a genuine session JWT is refused at ``now``; ``None`` if it is not. In the issuer's own order."""
        find = self._known.get
        for name in (
            ("signing-key", jwt.kid),
            ("session", jwt.session),
            ("credential", jwt.credential_id),
            ("company", jwt.company or ""),
            ("partner", jwt.partner),
        ):
            found = find(name)
            # The same "on or after" as of an expiry.
            if found is not None and found.reason is not None and now >= found.ends_at:
                return found.reason
        partner = find(("partner", jwt.partner))
        return CredentialRevoked if partner is not None and jwt.epoch < partner.epoch else None


# --- What may be believed -----------------------------------------------------------------------------------------------


class Following:
    """The decisions about one issuer's feed. Not thread-safe: its driver locks.

    All times but those of JWTs are seconds of one monotonic clock.
    """

    def __init__(self, *, max_staleness: float) -> None:
        if max_staleness <= 0:
            raise ValueError("a maximum staleness is a positive number of seconds")
        self._own_staleness = max_staleness
        self.max_staleness = max_staleness
        """Seconds: our own, or the issuer's if that asks for less."""
        self._set = RevocationSet()
        self._whole_at = float("-inf")
        self.source: Source | None = None
        """Whose feed it is, as the last page said."""
        self.position: str | None = None
        """How far was read: what the next request names; ``None`` for the beginning."""
        self.sequence = 0
        """The step up to which everything is known."""

    def is_fresh(self, now: float) -> bool:
        """Whether what is known may be believed."""
        return now < self._whole_at + self.max_staleness

    def age(self, now: float) -> float:
        """Seconds since the request was sent that last brought everything there was."""
        return now - self._whole_at

    def land(self, page: FeedPage, *, sent_at: float, now: float) -> None:
        """Take in the answer to the request that was sent at ``sent_at``. ``now`` is in Unix seconds.

        ``ValueError`` when it goes on where another deployment has begun: then all is to be read anew.
        """
        if not page.is_reset and self.source not in {None, page.source}:
            self.position, self._whole_at = None, float("-inf")
            raise ValueError("the feed has become another deployment's; it is read anew")
        self.source = page.source
        if page.is_reset:
            self._whole_at = float("-inf")  # half a beginning is not to be believed, whatever was known before
        self._set.apply(page, now)
        self.position, self.sequence = page.position, page.sequence
        # The issuer counts on its verifiers refusing by then. It may ask for less than we were told to take, never for more.
        self.max_staleness = min(self._own_staleness, page.max_staleness)
        if not page.has_more:
            self._whole_at = sent_at

    def judge(self, jwt: JwtMarks, *, monotonic: float, now: float) -> type[Rejected] | None:
        """With what a genuine session JWT is refused. ``RevocationsUnavailable`` when nothing fresh is known of its issuer."""
        if not self.is_fresh(monotonic) or jwt.source != self.source:
            raise RevocationsUnavailable
        return self._set.judge(jwt, now)
