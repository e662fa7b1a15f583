"""Where access tokens live."""

from collections.abc import Sequence
from typing import Protocol

from gatelodge_server.core.model import AccessToken, Instant, Standing
from gatelodge_server.core.ports.common import Done, Refused


class TokenStore(Protocol):
    """Where access tokens live: what was issued, not the tokens themselves."""

    async def issue_token(self, token: AccessToken, *, by: str) -> Done | Refused:
        """Store what was issued. Refused with ``PartnerNotFound`` or ``PartnerDeactivated``."""
        ...

    async def find_token(self, token_id: str) -> Standing | None:
        """An access token's standing at this moment. Micro-batched."""
        ...

    async def get_token(self, token_id: str) -> AccessToken | None:
        """An access token as it is stored."""
        ...

    async def list_tokens(self, partner_id: str) -> Sequence[AccessToken]:
        """All versions of a partner's tokens, newest first."""
        ...

    async def list_token_versions(self, lineage_id: str) -> Sequence[AccessToken]:
        """The versions of one token, newest first."""
        ...

    async def roll_token(
        self, token_id: str, replacement: AccessToken, *, ends_at: Instant, now: Instant, by: str
    ) -> Done | Refused:
        """Put ``replacement`` in the place of a live token, which ends at ``ends_at``. The owner is told.

        Refused with ``TokenNotFound``, ``TokenEnded`` (rotated or revoked before) or ``PartnerDeactivated``.
        """
        ...

    async def revoke_token(self, token_id: str, *, now: Instant, by: str) -> Done | Refused:
        """End a token. Doing it twice is no fault. Refused with ``TokenNotFound``."""
        ...
