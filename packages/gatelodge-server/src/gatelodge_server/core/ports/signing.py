"""Where signing keys live."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from gatelodge_server.core.model import Duration, Instant, SigningKey
from gatelodge_server.core.ports.common import Done, Refused


class SigningKeyStore(Protocol):
    """Where signing keys live, their private halves sealed."""

    async def list_signing_keys(self) -> Sequence[SigningKey]:
        """Every key that there is or was, of every purpose, oldest first."""
        ...

    async def establish_signing_keys(self, first: Sequence[SigningKey], *, now: Instant) -> Sequence[SigningKey]:
        """Store ``first`` unless there are keys of their purpose; the keys of that purpose that there are then.

        Two nodes that start at once agree.
        """
        ...

    async def rotate_signing_keys(
        self, candidate: SigningKey, *, lead: Duration, life: Duration | None, now: Instant, by: str
    ) -> Done:
        """Let the next key sign (``signing.plan_rotation``) and publish ``candidate``, of the same purpose, as the new next."""
        ...

    async def count_live_tokens(self, *, now: Instant) -> Mapping[str, int]:
        """How many access tokens that may still be used each key has signed, by `kid`."""
        ...

    async def retire_unneeded_keys(self, *, now: Instant) -> Sequence[str]:
        """Withdraw keys for access tokens that no longer sign and that no live token needs (``signing.plan_withdrawals``).

        The `kid`s of those that this call has withdrawn: of several nodes that ask at once, each key is one's.
        """
        ...

    async def retire_signing_key(self, kid: str, *, now: Instant, by: str) -> Done | Refused:
        """Withdraw a key at once (``signing.plan_retirement``), and with it every token that it signed.

        Refused with ``SigningKeyNotFound``, or ``SigningKeyInUse`` if it is needed.
        """
        ...
