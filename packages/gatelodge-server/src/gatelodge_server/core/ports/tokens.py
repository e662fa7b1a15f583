"""Where access tokens live."""

from collections.abc import Sequence
from typing import Protocol

from gatelodge_server.core.model import AccessToken, Instant, Standing
from gatelodge_server.core.ports.common import Done, Refused


class TokenStore(Protocol):
    """Where access tokens live: what was issued, not the tokens themselves."""

    async def issue_token(self, token: AccessToken, *, by: str) -> Done | Refused:
        """Store what was issued.

        Refused with ``PartnerNotFound``, ``PartnerDeactivated``, or ``SigningKeyNotFound`` if the key that signed it is gone.
        """
        ...

    async def find_token(self, token_id: str) -> Standing | None:
        """An access token's standing at this moment. Micro-batched."""
        ...

    async def get_token(self, token_id: str) -> AccessToken | None:
        """An access token as it is stored."""
        ...

    async def list_tokens(self, partner_id: str) -> Sequence[AccessToken]:
        """All versions of a partner's tokens, newest first, with how the partner stands."""
        ...

    async def list_token_versions(self, lineage_id: str) -> Sequence[AccessToken]:
        """The versions of one token, newest first, with how the partner stands."""
        ...

    async def roll_token(
        self, token_id: str, replacement: AccessToken, *, ends_at: Instant, now: Instant, by: str
    ) -> Done | Refused:
        """Put ``replacement`` in the place of a live token, which ends at ``ends_at``. The owner is told.

        Refused with ``TokenNotFound``, ``TokenEnded`` (rotated or revoked before), ``PartnerDeactivated``, or
        ``SigningKeyNotFound`` if the key that signed the replacement is gone. A suspended partner's token can be replaced.
        """
        ...

    async def revoke_token(self, token_id: str, *, now: Instant, by: str) -> Done | Refused:
        """End a token for good, however it was to end or has ended. Doing it twice is no fault.

        Refused with ``TokenNotFound``.
        """
        ...
