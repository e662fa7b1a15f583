"""Somebody who keeps secrets."""

from typing import Protocol


class Sealer(Protocol):
    """Seals small secrets (AES-256-GCM) under keys that come from the deployment's master key and a label."""

    def seal(self, plaintext: bytes, *, label: bytes) -> bytes:
        """Seal; only ``open`` with the same label gives it back, so a label may itself be a secret."""
        ...

    def open(self, sealed: bytes, *, label: bytes) -> bytes:
        """Open, under any master key that is still honoured. Raises ``ValueError`` if it is not whole or not ours."""
        ...


class Digester(Protocol):
    """Keyed digests for what must be recognised again but not stored."""

    def digest(self, message: bytes, *, purpose: str) -> bytes:
        """32 bytes that stand for ``message``."""
        ...
