"""What every verb may answer with, and the record of an answer that may be asked for again."""

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from gatelodge.errors import Rejected
from gatelodge_server.core.model import Instant
from gatelodge_server.core.refusals import Refusal

Reason: TypeAlias = type[Rejected] | type[Refusal]
"""Why not: the class of the refusal that the caller is to raise."""


class Refused(NamedTuple):
    """It was not done, for this reason."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class Done:
    """It was done, and is step ``sequence`` of the change sequence."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Replay:
    """Lets an answer that held a new API key be asked for again, with the key sealed under what the asker presented."""

    id: bytes
    """Stands for the caller, the call and the Idempotency-Key."""
    fingerprint: bytes
    """Stands for what was asked."""
    sealed: bytes
    readable_until: Instant
    """The sealed key goes at this moment, or when the key is first used."""
