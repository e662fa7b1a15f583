"""The master key of a deployment, and every key that is derived from it.

The file holds one key a line, base64url of 32 random bytes, **newest first**. New things are made under the first; what an
older one made is still honoured for as long as its line is there. Replacing the master key is therefore: put a new line on
top, restart, wait until nothing of the old one is alive, take the old line out.
"""

import base64
import binascii
import hashlib
import hmac
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from gatelodge_server.core.model import Entropy

_KEY_BYTES: Final = 32
_KEY_ID_BYTES: Final = 4
_NONCE_BYTES: Final = 12


class MasterKeyFault(Exception):
    """The master key cannot be had or used. The message says what to do and shows nothing of it."""


@dataclass(frozen=True, slots=True)
class MasterKeys:
    """The master keys, newest first."""

    keys: tuple[bytes, ...] = field(repr=False)

    @classmethod
    def parse(cls, text: str, *, source: str) -> "MasterKeys":
        """Read keys, one a line. Raises ``MasterKeyFault``."""
        lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        if not lines:
            raise MasterKeyFault(f"{source} holds no key: put 32 random bytes there, as base64url on a line")
        return cls(tuple(_decode(line, number, source) for number, line in enumerate(lines, start=1)))

    @classmethod
    def load(cls, path: Path) -> "MasterKeys":
        """Read the keys of a file that nobody but its owner can read. Raises ``MasterKeyFault``."""
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
            text = path.read_text("ascii")
        except (OSError, UnicodeDecodeError) as fault:
            raise MasterKeyFault(f"{path} cannot be read: {type(fault).__name__}") from fault
        if mode & 0o077:
            raise MasterKeyFault(f"{path} can be read by others (mode {mode:04o}): chmod 600 it, and replace the key")
        return cls.parse(text, source=str(path))


def make_key_file(path: Path, entropy: Entropy) -> bool:
    """Make a key and its file; ``False`` if another process has been quicker.

    The file is whole and on the disk before it has its name, so no crash leaves half a key.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    line = base64.urlsafe_b64encode(entropy(_KEY_BYTES)).rstrip(b"=") + b"\n"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            return False
    finally:
        draft.unlink()
        sync_directory(path.parent)
    return True


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _decode(line: str, number: int, source: str) -> bytes:
    try:
        key = base64.b64decode(line + "=" * (-len(line) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != _KEY_BYTES:
        raise MasterKeyFault(f"{source}, line {number}: not 32 bytes as base64url")
    if len(set(key)) < _KEY_BYTES // 4:
        raise MasterKeyFault(f"{source}, line {number}: does not look random; use 32 bytes from a generator")
    return key


def _derive(master: bytes, info: bytes) -> bytes:
    # RFC 5869. The master key is uniformly random already, so the extract step needs no salt.
    return HKDF(algorithm=SHA256(), length=_KEY_BYTES, salt=None, info=b"gatelodge:" + info).derive(master)


class Vault:
    """What the core asks of a keeper of secrets: MACs of refresh tokens, keyed digests, sealing. Keys never leave it."""

    def __init__(self, keys: MasterKeys, entropy: Entropy) -> None:
        self._masters = keys.keys
        self._entropy = entropy
        self._mac_keys = [_derive(master, b"refresh-token") for master in self._masters]
        self._digest_key = _derive(self._masters[0], b"digest")
        self._by_id = {_key_id(master): master for master in self._masters}

    def make_mac(self, message: bytes) -> bytes:
        """HMAC-SHA-256 under the newest key."""
        return hmac.digest(self._mac_keys[0], message, "sha256")

    def check_mac(self, message: bytes, mac: bytes) -> bool:
        """Whether the MAC of ``message`` begins with ``mac`` under any key."""
        return any(hmac.compare_digest(hmac.digest(key, message, "sha256")[: len(mac)], mac) for key in self._mac_keys)

    def digest(self, message: bytes, *, purpose: str) -> bytes:
        """A digest of 32 bytes that nobody can recompute without the newest key."""
        return hmac.digest(self._digest_key, purpose.encode("ascii") + b"\0" + message, "sha256")

    def seal(self, plaintext: bytes, *, label: bytes) -> bytes:
        """``key id ‖ nonce ‖ ciphertext``, under a key of its own for this label."""
        master = self._masters[0]
        nonce = self._entropy(_NONCE_BYTES)
        return _key_id(master) + nonce + AESGCM(_derive(master, b"seal:" + label)).encrypt(nonce, plaintext, None)

    def seal_under_each(self, plaintext: bytes, *, label: bytes) -> Mapping[bytes, bytes]:
        """The same under every key, by the key's id."""
        return {
            key_id: Vault(MasterKeys((master,)), self._entropy).seal(plaintext, label=label)
            for key_id, master in self._by_id.items()
        }

    def open(self, sealed: bytes, *, label: bytes) -> bytes:
        """What was sealed with this label. Raises ``ValueError``."""
        key_id, rest = sealed[:_KEY_ID_BYTES], sealed[_KEY_ID_BYTES:]
        master = self._by_id.get(key_id)
        if master is None:
            raise ValueError("sealed under a master key that is not among the present ones")
        nonce, ciphertext = rest[:_NONCE_BYTES], rest[_NONCE_BYTES:]
        try:
            return AESGCM(_derive(master, b"seal:" + label)).decrypt(nonce, ciphertext, None)
        except InvalidTag:
            raise ValueError("the seal is broken") from None


def _key_id(master: bytes) -> bytes:
    return hashlib.sha256(b"gatelodge:id:" + master).digest()[:_KEY_ID_BYTES]


def system_entropy(size: int) -> bytes:
    """So many bytes from the operating system."""
    return os.urandom(size)


__all__: Sequence[str] = ("MasterKeyFault", "MasterKeys", "Vault", "make_key_file", "sync_directory", "system_entropy")
