"""Fields of request bodies: text that has been checked is of a type that says so.

Each type knows its rule (``parse``) and how it is told to others (``schema``). ``decode`` turns a body into a struct of such
fields and tells all faults at once, not the first.
"""

import re
import unicodedata
from collections.abc import Mapping
from typing import Any, ClassVar, Final, Self, TypeVar
from urllib.parse import urlsplit

import msgspec
from stdnum import bic, iban
from stdnum.eu import vat
from stdnum.exceptions import ValidationError as NumberError

from gatelodge_server.core.companies import canonical_tax_number
from gatelodge_server.core.registration import ADDRESS_MAX, canonical_address
from gatelodge_server.core.secrets import Secret
from gatelodge_server.http.problems import FieldError, InvalidFields

Body = TypeVar("Body", bound=msgspec.Struct)


class Line(str):
    """One line of text: 1 to ``longest`` characters after trimming, none of them a control or half a surrogate pair."""

    __slots__ = ()
    longest: ClassVar[int] = 200
    schema: ClassVar[Mapping[str, object]] = {}

    @classmethod
    def parse(cls, text: str) -> Self:
        """Check ``text``. Raises ``ValueError`` with a sentence for its sender."""
        text = text.strip()
        if not text:
            raise ValueError("must not be empty")
        if len(text) > cls.longest:
            raise ValueError(f"must not be longer than {cls.longest} characters")
        if any(unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"} for character in text):
            raise ValueError("must be one line without control characters")
        return cls(cls.check(text))

    @classmethod
    def check(cls, text: str) -> str:
        """What is particular to the kind of text; the text as it is to be kept."""
        return text


class Name(Line):
    """A name of up to 200 characters."""


class Address(Line):
    """A postal address of up to 500 characters."""

    longest = 500

    @classmethod
    def parse(cls, text: str) -> Self:
        """Check ``text``; a line break between its parts counts as a comma."""
        return super().parse(", ".join(part.strip() for part in text.splitlines() if part.strip()))


class State(Line):
    """A state or province of up to 50 characters."""

    longest = 50


class PostalCode(Line):
    """A postal code."""

    longest = 32


class TaxNumber(Line):
    """A tax number, as the country writes it."""

    longest = 64

    @classmethod
    def check(cls, text: str) -> str:
        """It has at least two letters or digits, and is no longer in the form in which tax numbers are compared."""
        compared = canonical_tax_number(text)
        if sum(character.isalnum() for character in compared) < 2 or len(compared) > cls.longest:  # noqa: PLR2004
            raise ValueError("is not a tax number")
        return text


class Country(Line):
    """An ISO 3166-1 alpha-2 code."""

    schema: ClassVar[Mapping[str, object]] = {"pattern": "^[A-Z]{2}$", "examples": ["DE"]}

    @classmethod
    def check(cls, text: str) -> str:
        """There is such a country."""
        import pycountry  # noqa: PLC0415 - most commands need no list of countries

        if re.fullmatch(r"[A-Z]{2}", text) is None or pycountry.countries.get(alpha_2=text) is None:
            raise ValueError("is not an ISO 3166-1 alpha-2 code in capitals, such as `DE`")
        return text


class Language(Line):
    """A language tag (BCP 47) such as `de` or `pt-BR`."""

    schema: ClassVar[Mapping[str, object]] = {"examples": ["de", "pt-BR"]}
    _TAG: ClassVar[re.Pattern[str]] = re.compile(r"([A-Za-z]{2,3})(-[A-Za-z0-9]{1,8})*", re.ASCII)

    @classmethod
    def check(cls, text: str) -> str:
        """Its first part is an ISO 639 code."""
        match = cls._TAG.fullmatch(text) if len(text) <= 35 else None  # noqa: PLR2004 - RFC 5646 4.4.1
        code = match[1].lower() if match else ""
        sort = "alpha_2" if len(code) == 2 else "alpha_3"  # noqa: PLR2004
        import pycountry  # noqa: PLC0415

        if match is None or pycountry.languages.get(**{sort: code}) is None:
            raise ValueError("is not a language tag, such as `de` or `pt-BR`")
        return text


class Email(Line):
    """An e-mail address."""

    longest = 255
    schema: ClassVar[Mapping[str, object]] = {"format": "email"}

    @classmethod
    def check(cls, text: str) -> str:
        """It has the form of an address; whether it takes mail is not asked."""
        from email_validator import EmailNotValidError, validate_email  # noqa: PLC0415

        try:
            return validate_email(text, check_deliverability=False).normalized
        except EmailNotValidError as fault:
            raise ValueError("is not an e-mail address") from fault


class RegistrantEmail(Email):
    """An e-mail address that somebody reads the mail of."""

    @classmethod
    def check(cls, text: str) -> str:
        """It also has a canonical form that is not too long to be kept: folding may make one letter many."""
        address = super().check(text)
        if len(canonical_address(address)) > ADDRESS_MAX:
            raise ValueError("is not an e-mail address")
        return address


class IntendedUse(Line):
    """What somebody means to do, in up to 1000 characters on one line."""

    longest = 1000


class WebsiteUrl(Line):
    """An absolute http or https URL of up to 500 characters."""

    longest = 500
    schema: ClassVar[Mapping[str, object]] = {"format": "uri", "examples": ["https://www.example.com/"]}

    @classmethod
    def check(cls, text: str) -> str:
        """It names a host, and nobody's password; whether anything is there is not asked."""
        try:
            parts = urlsplit(text)
            is_url = parts.scheme in {"http", "https"} and bool(parts.hostname) and "@" not in parts.netloc and parts.port != 0
        except ValueError:  # of the port, or of an IPv6 address
            is_url = False
        if not is_url or any(character.isspace() or not character.isprintable() for character in text):
            raise ValueError("is not an http or https URL")
        return text


class Agreement:
    """`true`: the only thing that counts as having agreed."""

    schema: ClassVar[Mapping[str, object]] = {
        "type": "boolean",
        "const": True,
        "description": "True, and nothing else: the terms of the API are agreed to.",
    }

    @classmethod
    def parse(cls, value: object) -> Self:
        """Check it. Raises ``ValueError`` for anything but `true`, such as 1 or `"true"`."""
        if value is not True:
            raise ValueError("must be true")
        return cls()


class Iban(Line):
    """An IBAN (ISO 13616), its check digits right."""

    longest = 64
    schema: ClassVar[Mapping[str, object]] = {"examples": ["DE89370400440532013000"]}

    @classmethod
    def check(cls, text: str) -> str:
        """Length, country's form and check digits."""
        try:
            return str(iban.validate(text))
        except NumberError as fault:
            raise ValueError("is not an IBAN") from fault


class Bic(Line):
    """A BIC (ISO 9362)."""

    longest = 64
    schema: ClassVar[Mapping[str, object]] = {"examples": ["DEUTDEFF"]}

    @classmethod
    def check(cls, text: str) -> str:
        """Eight or eleven characters of the right kinds."""
        try:
            return str(bic.validate(text))
        except NumberError as fault:
            raise ValueError("is not a BIC") from fault


class VatNumber(Line):
    """A VAT number; one of the European Union, known by its first two letters, must have the right form and check digits."""

    longest = 64
    schema: ClassVar[Mapping[str, object]] = {"examples": ["DE136695976"]}

    @classmethod
    def check(cls, text: str) -> str:
        """Letters and digits; the Union's own rules where they apply."""
        compact = re.sub(r"[ ./-]", "", text).upper()
        if re.fullmatch(r"[0-9A-Z]{4,20}", compact, re.ASCII) is None:
            raise ValueError("is not a VAT number")
        if compact[:2].lower() in {*vat.MEMBER_STATES, "el"} and not vat.is_valid(compact):
            raise ValueError("is not a VAT number of the country that it begins with")
        return compact


def decode(fields: Mapping[str, object], body: type[Body]) -> Body:
    """A body of this type. Unknown fields are ignored. Raises ``InvalidFields`` with all that is wrong."""
    try:
        return msgspec.convert(fields, body, dec_hook=_parse)
    except msgspec.ValidationError:
        raise InvalidFields(_faults(fields, body)) from None


def _faults(fields: Mapping[str, object], body: type[msgspec.Struct]) -> list[FieldError]:
    faults = []
    for field in msgspec.structs.fields(body):
        name = field.encode_name
        if name not in fields:
            if field.required:
                faults.append(FieldError(f"/{name}", "is required"))
            continue
        try:
            msgspec.convert(fields[name], field.type, dec_hook=_parse)
        except msgspec.ValidationError as fault:
            # What msgspec says of a wrong type is right but in Python's words; our own sentences stand as they are.
            text = _range(field.type) or str(fault).partition(" - at `")[0]
            faults.append(FieldError(f"/{name}", text[:1].lower() + text[1:]))
    return faults


def _range(wanted: Any) -> str | None:  # noqa: ANN401 - whatever a field can be annotated with
    known = msgspec.inspect.type_info(wanted)
    if isinstance(known, msgspec.inspect.IntType) and known.ge is not None and known.le is not None:
        return f"must be a whole number from {known.ge} to {known.le}"
    return None


def _parse(wanted: type, value: Any) -> object:  # noqa: ANN401 - msgspec's signature
    if wanted is Agreement:
        return Agreement.parse(value)
    if not isinstance(value, str):
        raise ValueError("must be a string")  # noqa: TRY004 - msgspec reports a ValueError as the sender's fault
    return wanted.parse(value) if issubclass(wanted, Line) else Secret(value)


def write(value: object) -> object:
    """How a value that JSON does not know is written in an answer: the one place where a ``Secret`` leaves by wire."""
    if isinstance(value, Secret):
        return value.reveal()
    raise TypeError(f"{type(value).__name__} does not belong in an answer")


def schema_of(wanted: type) -> dict[str, object]:
    """The JSON schema of a field type, for the OpenAPI document."""
    if issubclass(wanted, Line):
        doc = " ".join((wanted.__doc__ or "").split())
        return {"type": "string", "minLength": 1, "maxLength": wanted.longest, "description": doc, **wanted.schema}
    if wanted is Secret:
        return {"type": "string"}
    if wanted is Agreement:
        return dict(Agreement.schema)
    raise TypeError(f"{wanted.__name__} has no schema")


ENCODER: Final = msgspec.json.Encoder(enc_hook=write)
