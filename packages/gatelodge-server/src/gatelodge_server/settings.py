"""Settings: one table. A flag goes before a `GATELODGE_*` variable, that before the TOML file, that before the default.

Everything that is wrong is said at once, by the name under which it was set. No setting shows a secret, and none has a secret
default: the master key is a file (or the variable `GATELODGE_MASTER_KEY`), the password for the mail server the variable
`GATELODGE_SMTP_PASSWORD`; both are read where they are used. A password in the address of a database is wrapped.
"""

import ipaddress
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, TypeVar, cast
from urllib.parse import urlsplit

from gatelodge.wire import BRAND_PATTERN, ENVIRONMENT_PATTERN
from gatelodge_server.core.model import DAY, HOUR, MINUTE, SECOND, Duration
from gatelodge_server.core.sessions import SessionLifetimes
from gatelodge_server.mail.servers import MailServer, Protection
from gatelodge_server.store.address import Address, SqliteAddress, parse_address

Value = TypeVar("Value")
Switch: TypeAlias = Literal["on", "off"]
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

_UNITS: Final[Mapping[str, Duration]] = {"ms": 1, "s": SECOND, "m": MINUTE, "h": HOUR, "d": DAY}
_DURATION: Final = re.compile(r"(\d{1,9})(ms|s|m|h|d)", re.ASCII)
_LONGEST: Final[Duration] = 3650 * DAY
_PLAIN_LIMIT: Final = re.compile(r"[1-9]\d{0,8}/(second|minute|hour|day)", re.ASCII)
_DRAIN_BEHIND_PROXY: Final[Duration] = 5 * SECOND
"""Long enough for a proxy that asks every second, or every two, and believes the second answer."""
_PORT_MAX: Final = 65_535
_WORKERS_MAX: Final = 64
_POOL_MAX: Final = 200
_MAILS_MAX: Final = 100_000
_ATOM: Final = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_LABEL: Final = "[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_SENDER: Final = re.compile(rf"{_ATOM}(?:\.{_ATOM})*@{_LABEL}(?:\.{_LABEL})*")
"""A dot-atom of RFC 5321 4.1.2 at a name, which may be of this machine or network only."""
_SENDER_LENGTH: Final = 254


class SettingsFault(Exception):
    """Settings that cannot be used. ``faults`` are sentences, one for each."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All that is configured, checked."""

    environment: str
    brand: str
    data: Path
    database: Address
    database_pool: int
    public_url: str
    audience: str
    other_issuers: frozenset[str]
    host: str
    port: int
    workers: int
    tls_cert: Path | None
    tls_key: Path | None
    behind_proxy: tuple[Network, ...]
    drain: Duration
    lifetimes: SessionLifetimes
    login_failure_limit: str
    registration: Switch
    registration_tier: str
    recovery: Switch
    registration_limit: str
    verification_failure_limit: str
    mails_per_address: int
    mails_per_address_daily: int
    mails_overall: int
    smtp: MailServer | None
    smtp_user: str
    mail_from: str
    sample_api: Switch
    stated: frozenset[str]
    """The names of what somebody has set; the rest are defaults."""

    @property
    def local_authority(self) -> Path | None:
        """What clients must trust if the certificate is the one that the server made itself (``tls.certificate_of``)."""
        return None if self.behind_proxy or self.tls_cert else self.data / "tls" / "ca.pem"

    def states(self, name: str) -> bool:
        """Whether somebody has set it."""
        return name in self.stated


def default_audience(environment: str) -> str:
    """The `aud` of an environment's tokens."""
    return f"partner-api-{environment}"


def parse_duration(text: str) -> Duration:
    """A duration such as `90s`, `15m`, `24h` or `30d`. Raises ``ValueError``."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError("is not a duration such as 90s, 15m, 24h or 30d")
    duration = int(match[1]) * _UNITS[match[2]]
    if duration > _LONGEST:  # an instant must stay one that a calendar can show
        raise ValueError("must not be longer than 3650d")
    return duration


def _positive_duration(text: str) -> Duration:
    duration = parse_duration(text)
    if duration == 0:
        raise ValueError("must be longer than nothing")
    return duration


def _duration_or_none(text: str) -> Duration | None:
    return parse_duration(text) if text else None


def _environment(text: str) -> str:
    if ENVIRONMENT_PATTERN.fullmatch(text) is None:
        raise ValueError("must be a lower-case word such as uat or production")
    return text


def _brand(text: str) -> str:
    if BRAND_PATTERN.fullmatch(text) is None:
        raise ValueError("must be 2 to 16 lower-case letters or digits, a letter first")
    return text


def _whole(lowest: int, highest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) <= 6 and lowest <= int(text) <= highest):  # noqa: PLR2004
            raise ValueError(f"must be a whole number from {lowest} to {highest}")
        return int(text)

    return parse


def _switch(text: str) -> Switch:
    match text:
        case "on" | "off":
            return text
        case _:
            raise ValueError("must be on or off")


def _networks(text: str) -> tuple[Network, ...]:
    try:
        return tuple(ipaddress.ip_network(part) for part in re.split(r"[\s,]+", text.strip()) if part)
    except ValueError as fault:
        raise ValueError(f"must be networks such as 10.0.0.0/8 ({fault})") from fault


def _url(text: str) -> str:
    parts = urlsplit(text)
    # RFC 8414 section 2: an issuer is an https URL without query and fragment.
    written_plainly = text.isascii() and text.isprintable() and " " not in text  # urlsplit overlooks line breaks
    if (
        parts.scheme != "https"
        or not parts.hostname
        or parts.query
        or parts.fragment
        or text.endswith("/")
        or not written_plainly
    ):
        raise ValueError("must be an https URL without query, fragment or a slash at its end")
    return text


def _urls(text: str) -> frozenset[str]:
    return frozenset(_url(part) for part in re.split(r"[\s,]+", text.strip()) if part)


def _limit(text: str) -> str:
    if _PLAIN_LIMIT.fullmatch(text) is None:
        # Imported for what is out of the ordinary only: every command reads the limits, and none applies them.
        from limits import parse as parse_limit  # noqa: PLC0415

        parse_limit(text)
    return text


def _mail_server(text: str) -> MailServer | None:
    return MailServer.parse(text) if text else None


def _sender(text: str) -> str:
    if _SENDER.fullmatch(text) is None or len(text) > _SENDER_LENGTH:
        raise ValueError("must be an address such as api@example.com, in ASCII")
    return text


def _address(text: str) -> Address | None:
    return parse_address(text) if text else None


def _directory(text: str) -> Path:
    return Path(_word(text))


def _word(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError("must not be empty")
    return text


@dataclass(frozen=True, slots=True)
class Option:
    """One setting: its default as text, how it is read, what it is for."""

    default: str
    parse: Callable[[str], object]
    meaning: str


OPTIONS: Final[Mapping[str, Option]] = {
    "environment": Option("uat", _environment, "the environment: uat, production, or another lower-case word"),
    "brand": Option("gatelodge", _brand, "what every API key begins with"),
    "data": Option(
        "./gatelodge-data", _directory, "the directory of the embedded database, the master key and the certificate"
    ),
    "database": Option(
        "",
        _address,
        "sqlite:///PATH or postgresql://USER@HOST:PORT/NAME; unless set, gatelodge.db in the data directory",
    ),
    "database_pool": Option("8", _whole(2, _POOL_MAX), "connections that each worker keeps to a PostgreSQL server, at most"),
    "public_url": Option("", lambda text: _url(text) if text else "", "the base URL that partners use; also the issuer"),
    "audience": Option("", str, "the `aud` of session JWTs; unless set, partner-api-ENVIRONMENT"),
    "other_issuers": Option("", _urls, "public URLs of the other environments: their JWTs are told that they are not of here"),
    "host": Option("127.0.0.1", _word, "the address to listen on"),
    "port": Option("8443", _whole(0, _PORT_MAX), "the port to listen on; 0 takes a free one"),
    "workers": Option("1", _whole(1, _WORKERS_MAX), "how many processes serve"),
    "tls_cert": Option("", str, "certificate chain, PEM; unless set, one is made under DATA/tls"),
    "tls_key": Option("", str, "its private key, PEM"),
    "behind_proxy": Option("", _networks, "networks of proxies that end TLS and whose word on scheme and address is taken"),
    "drain": Option(
        "",
        _duration_or_none,
        "how long after SIGTERM the server goes on accepting while /readyz says 503; unless set, 5s behind a proxy, else 0s",
    ),
    "sample_api": Option("off", _switch, "on: serve the sample partner API behind the gate"),
    "jwt_ttl": Option("24h", _positive_duration, "how long a session JWT is good for"),
    "refresh_ttl": Option("30d", _positive_duration, "how long a refresh token is good for, and a session may lie idle"),
    "session_ttl": Option("90d", _positive_duration, "how long a session may live however busy it is"),
    "login_failure_limit": Option("20/minute", _limit, "failed logins and refreshes per address before 429"),
    "registration": Option("on", _switch, "whether organisations may register themselves: on or off"),
    "registration_tier": Option("starter", _word, "the tier of a partner that has registered itself"),
    "recovery": Option("on", _switch, "whether a code by mail gives such a partner a new API key: on or off"),
    "registration_limit": Option("120/hour", _limit, "registrations per sender's address before 429"),
    "verification_failure_limit": Option("20/minute", _limit, "wrong codes per sender's address before 429"),
    "mails_per_address": Option("5", _whole(1, _MAILS_MAX), "mails that registration may cause in an hour to one address"),
    "mails_per_address_daily": Option("15", _whole(1, _MAILS_MAX), "the same in 24 hours"),
    "mails_overall": Option(
        "1000",
        _whole(1, _MAILS_MAX),
        "mails that registration may cause in an hour to all new addresses, and recovery to all partners",
    ),
    "smtp": Option(
        "",
        _mail_server,
        "the mail server: smtp+starttls://HOST:PORT, smtps://HOST:PORT, or smtp://HOST:PORT (TLS if it is offered); "
        "unless set, mails are kept in DATA/outbox",
    ),
    "smtp_user": Option("", str, "who logs in there; the password comes from GATELODGE_SMTP_PASSWORD only"),
    "mail_from": Option("gatelodge@localhost", _sender, "the address that mails are from"),
}
"""The settings, by name: `tls_cert` in the file is `--tls-cert` as a flag and `GATELODGE_TLS_CERT` as a variable."""


def load_settings(flags: Mapping[str, str | None], environ: Mapping[str, str]) -> Settings:
    """Read the settings. Raises ``SettingsFault`` with all that is wrong."""
    faults: list[str] = []
    data = flags.get("data") or environ.get("GATELODGE_DATA") or OPTIONS["data"].default
    file = _read_file(Path(environ.get("GATELODGE_CONFIG") or Path(data) / "gatelodge.toml"), environ, faults)
    values: dict[str, Any] = {}
    stated = set()
    for name, option in OPTIONS.items():
        variable = f"GATELODGE_{name.upper()}"
        for source, text in (
            (f"--{name.replace('_', '-')}", flags.get(name)),
            (variable, environ.get(variable)),
            (name, file.get(name)),
            ("", option.default),
        ):
            if text is not None:
                if source and text:
                    stated.add(name)
                try:
                    values[name] = option.parse(text)
                except ValueError as fault:
                    faults.append(f"{source} {fault}")
                break
    faults += _contradictions(values)
    if faults:
        raise SettingsFault(faults)
    return _settle(values, frozenset(stated))


def _read_file(path: Path, environ: Mapping[str, str], faults: list[str]) -> Mapping[str, str]:
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        if "GATELODGE_CONFIG" in environ:
            faults.append(f"GATELODGE_CONFIG: there is no file {path}")
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as fault:
        faults.append(f"{path}: {fault}")
        return {}
    faults += [f"{path}: there is no setting {name}" for name in content if name not in OPTIONS]
    return {name: ",".join(map(str, value)) if isinstance(value, list) else str(value) for name, value in content.items()}


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    faults = []  # of what could be read: the rest is at fault already
    if bool(values["tls_cert"]) != bool(values["tls_key"]):
        faults.append("--tls-cert and --tls-key go together")
    if values["tls_cert"] and values.get("behind_proxy"):
        faults.append("--behind-proxy means that the proxy ends TLS: it excludes --tls-cert")
    if {"jwt_ttl", "session_ttl"} <= values.keys() and values["jwt_ttl"] > values["session_ttl"]:
        faults.append("jwt_ttl must not be longer than session_ttl")
    if {"jwt_ttl", "refresh_ttl"} <= values.keys() and values["jwt_ttl"] > values["refresh_ttl"]:
        # A session that nobody may refresh any more is over and its row is purged: a JWT would not outlive that.
        faults.append("jwt_ttl must not be longer than refresh_ttl")
    return faults + _contradictions_of_mail(values)


def _contradictions_of_mail(values: Mapping[str, Any]) -> list[str]:
    faults = []
    server, user = values.get("smtp"), values["smtp_user"]
    if user and "smtp" in values and server is None:
        faults.append("smtp_user needs a mail server: set smtp")
    if server is not None and not server.is_near:
        if user and server.protection is Protection.OPPORTUNISTIC:
            faults.append("smtp_user has a password: it is sent over smtp+starttls:// or smtps:// only, or to this machine")
        if values.get("mail_from") == OPTIONS["mail_from"].default:
            faults.append("smtp needs an address that mails are from: set mail_from")
    return faults


def _drain_of(values: Mapping[str, Any]) -> Duration:
    if values["drain"] is not None:
        return cast("Duration", values["drain"])
    # With nobody in front there is nobody who would send callers elsewhere meanwhile.
    return _DRAIN_BEHIND_PROXY if values["behind_proxy"] else 0


def _settle(values: Mapping[str, Any], stated: frozenset[str]) -> Settings:
    def path_or_none(name: str) -> Path | None:
        return Path(values[name]) if values[name] else None

    data = cast("Path", values["data"])
    return Settings(
        environment=values["environment"],
        brand=values["brand"],
        data=data,
        database=values["database"] or SqliteAddress(data / "gatelodge.db"),
        database_pool=values["database_pool"],
        public_url=values["public_url"] or f"https://localhost:{values['port']}",
        audience=values["audience"] or default_audience(values["environment"]),
        other_issuers=values["other_issuers"],
        host=values["host"],
        port=values["port"],
        workers=values["workers"],
        tls_cert=path_or_none("tls_cert"),
        tls_key=path_or_none("tls_key"),
        behind_proxy=values["behind_proxy"],
        drain=_drain_of(values),
        lifetimes=SessionLifetimes(values["jwt_ttl"], values["refresh_ttl"], values["session_ttl"]),
        login_failure_limit=values["login_failure_limit"],
        registration=values["registration"],
        registration_tier=values["registration_tier"],
        recovery=values["recovery"],
        registration_limit=values["registration_limit"],
        verification_failure_limit=values["verification_failure_limit"],
        mails_per_address=values["mails_per_address"],
        mails_per_address_daily=values["mails_per_address_daily"],
        mails_overall=values["mails_overall"],
        smtp=values["smtp"],
        smtp_user=values["smtp_user"],
        mail_from=values["mail_from"],
        sample_api=values["sample_api"],
        stated=stated,
    )
