"""The certificate of a server that was given none: made once by a local authority, whose key is thrown away at once.

So `ca.pem` is good for exactly the one certificate that stands beside it, and trusting it cannot be turned against anybody.
"""

import ipaddress
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import trustme
from cryptography import x509

from gatelodge_server.settings import Settings
from gatelodge_server.vault import sync_directory

_HOST_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")


@dataclass(frozen=True, slots=True)
class Certificate:
    """Where a server's certificate chain and key are, and the authority that a client must trust if it was made here."""

    chain: Path
    key: Path
    authority: Path | None


def certificate_of(settings: Settings) -> Certificate | None:
    """The configured certificate, or the local one, made if need be; ``None`` behind a proxy, which ends TLS itself."""
    if settings.behind_proxy:
        return None
    if settings.tls_cert is not None and settings.tls_key is not None:
        return Certificate(settings.tls_cert, settings.tls_key, None)
    directory = settings.data / "tls"
    local = Certificate(directory / "server.pem", directory / "server.key", directory / "ca.pem")
    names = _names(settings)
    if not _covers(local.chain, names):
        directory.mkdir(mode=0o700, exist_ok=True)
        authority = trustme.CA(organization_name="Gatelodge", organization_unit_name="local authority")
        issued = authority.issue_cert(*sorted({*names, *_machine()}), organization_name="Gatelodge")
        chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        _write(local.key, issued.private_key_pem.bytes(), mode=0o600)
        _write(directory / "ca.pem", authority.cert_pem.bytes(), mode=0o644)
        _write(local.chain, chain, mode=0o644)  # last: a start that was cut off finds it missing and begins again
        sync_directory(directory)
    return local


def _names(settings: Settings) -> Sequence[str]:
    names = {"localhost", "127.0.0.1", "::1", urlsplit(settings.public_url).hostname or ""}
    if settings.host not in {"0.0.0.0", "::"}:  # noqa: S104 - compared, not bound
        names.add(settings.host)
    return sorted(name.lower() for name in names if name)


def _machine() -> Sequence[str]:
    """The machine's own name, if a certificate can carry it. It may change from start to start, and is not looked for later."""
    name = socket.gethostname().lower()
    return [name] if _HOST_NAME.fullmatch(name) else []


def _covers(chain: Path, names: Sequence[str]) -> bool:
    try:
        certificate = x509.load_pem_x509_certificate(chain.read_bytes())
    except (OSError, ValueError):
        return False
    alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    known = {*alternative.get_values_for_type(x509.DNSName)}
    known |= {str(address) for address in alternative.get_values_for_type(x509.IPAddress)}
    return {_canonical(name) for name in names} <= known


def _canonical(name: str) -> str:
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name


def _write(path: Path, content: bytes, *, mode: int) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
