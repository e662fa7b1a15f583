"""What the database knows of its deployment."""

from typing import Protocol

from gatelodge_server.core.model import Instant


class DeploymentStore(Protocol):
    """The names (`iss`) that this deployment issues tokens under: several, if it runs under several or had others before."""

    async def note_issuer(self, url: str, *, now: Instant) -> None:
        """Tokens are issued under this name: they are good wherever this database is."""
        ...

    async def is_issuer(self, url: str) -> bool:
        """Whether tokens were ever issued under this name."""
        ...
