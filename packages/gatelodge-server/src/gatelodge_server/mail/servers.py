"""Mail servers, as the settings name them."""

import ipaddress
from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from urllib.parse import urlsplit


class Protection(StrEnum):
    """How a connection to a mail server is protected."""

    OPPORTUNISTIC = "smtp"
    """STARTTLS if the server has it; whose certificate it is does not matter, since there might be none at all."""
    STARTTLS = "smtp+starttls"
    IMPLICIT = "smtps"


_PORTS: Final = {Protection.OPPORTUNISTIC: 25, Protection.STARTTLS: 587, Protection.IMPLICIT: 465}


@dataclass(frozen=True, slots=True)
class MailServer:
    """A mail server, as the setting `smtp` names it."""

    protection: Protection
    host: str
    port: int

    @classmethod
    def parse(cls, url: str) -> "MailServer":
        """Read ``smtp://HOST[:PORT]``, ``smtp+starttls://…`` or ``smtps://…``. Raises ``ValueError``."""
        try:
            parts = urlsplit(url)
            protection, port = Protection(parts.scheme), parts.port
        except ValueError:
            raise ValueError("must be smtp://HOST:PORT, smtp+starttls://HOST:PORT or smtps://HOST:PORT") from None
        if "@" in parts.netloc:
            raise ValueError("must not name a user or a password: there are smtp_user and GATELODGE_SMTP_PASSWORD for them")
        plain = url.isascii() and url.isprintable() and " " not in url
        if not parts.hostname or parts.path or parts.query or parts.fragment or port == 0 or not plain:
            raise ValueError("must be smtp://HOST:PORT, smtp+starttls://HOST:PORT or smtps://HOST:PORT")
        return cls(protection, parts.hostname, port or _PORTS[protection])

    @property
    def is_near(self) -> bool:
        """Whether it is on this machine, so that what is sent to it is on no wire."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
