"""How far a revocation has got, in the answer to it: for those who ask with `?wait=S`."""

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

import msgspec

from gatelodge_server.core.revocations import Revocations
from gatelodge_server.http.draining import Draining
from gatelodge_server.http.operation import Answer, Call, invalid_parameter

WAIT_MAX: Final = 30.0
"""Seconds that a request may wait."""
_WAIT: Final = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3})?", re.ASCII)

WAIT_FOR_REACH: Final = {
    "wait": (
        f"Seconds, 0 to {WAIT_MAX:.0f}, to wait until every offline verifier has heard of it. With it the answer says how many "
        "there are and how many have. Those that have not within the maximum staleness refuse everything, and are not counted."
    )
}
"""The parameter of an operation that revokes, for its documentation."""


class ReachAnswer(msgspec.Struct, rename="camel", frozen=True):
    """Which step of the change sequence it was, how many verifiers follow, and how many of them have applied that step."""

    sequence: int
    verifiers: int
    acknowledged: int


def wait_in(call: Call) -> float | None:
    """The seconds that a request names in `wait`; ``None`` if it does not. Raises ``InvalidFields``."""
    text = call.query().get("wait")
    if text is None:
        return None
    if _WAIT.fullmatch(text) is None or float(text) > WAIT_MAX:
        raise invalid_parameter("wait", f"must be a number of seconds from 0 to {WAIT_MAX:.0f}")
    return float(text)


Count = int | msgspec.UnsetType
"""One of the same three in the answer to a rotation, which shows the new key; without `wait` it is left out."""


class ReachReport:
    """Makes the answers to revocations."""

    def __init__(self, *, revocations: Revocations, draining: Draining) -> None:
        self._revocations = revocations
        self._draining = draining

    async def answer(self, sequence: int | None, wait: float | None) -> Answer:
        """204, or, for whoever asked with a ``wait``, how far the step has got. ``None``: nothing was left to be revoked."""
        if wait is None:
            return Answer(HTTPStatus.NO_CONTENT)
        return Answer(HTTPStatus.OK, ReachAnswer(**await self.counts(sequence, wait)))

    async def counts(self, sequence: int | None, wait: float | None) -> Mapping[str, Any]:
        """How far the step has got, as fields of an answer that tells more; nothing for whoever asked without a ``wait``."""
        if wait is None:
            return {}
        # The process that is about to stop keeps nobody waiting.
        reach = await self._revocations.reach(sequence, wait=wait, leave=lambda: self._draining.has_begun)
        return {"sequence": reach.sequence, "verifiers": reach.verifiers, "acknowledged": reach.acknowledged}
