"""What a VIN says of its vehicle (ISO 3779, 49 CFR part 565)."""

import re
from typing import Final, Self

import msgspec

from plans_api.makers import COUNTRIES, MAKERS, Kind, Maker

_SHAPE: Final = re.compile(r"[A-HJ-NPR-Z0-9]{17}", re.ASCII | re.IGNORECASE)
# 49 CFR 565.15(c): letters count as these digits, and each position has its weight. The check digit itself weighs nothing.
_VALUES: Final = dict(
    zip("0123456789ABCDEFGHJKLMNPRSTUVWXYZ", (int(d) for d in "012345678912345678123457923456789"), strict=True)
)
_WEIGHTS: Final = (8, 7, 6, 5, 4, 3, 2, 10, 0, 9, 8, 7, 6, 5, 4, 3, 2)
_REMAINDERS: Final = "0123456789X"
_CHECK_POSITION: Final = 8
# 49 CFR 565.15(d)(1), table VII: thirty codes for thirty years, again and again.
_YEAR_CODES: Final = "ABCDEFGHJKLMNPRSTVWXY123456789"
_YEAR_CYCLES: Final = (1980, 2010)


class Vin(str):
    """A vehicle identification number in capitals, its check digit right.

    ISO 3779 leaves the check digit to each country. It is wanted of every vehicle here, wherever it was built: 49 CFR 565.15
    wants it of all that are made for the United States, the only place where these plans are sold, and it finds nearly every
    slip of a typist.
    """

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Check ``text``. Raises ``ValueError`` with a sentence for its sender."""
        # The shape is asked for before capitals are made: outside ASCII they may be longer, or be letters of the alphabet.
        if _SHAPE.fullmatch(text) is None:
            raise ValueError("must be 17 letters and digits, without I, O and Q")
        vin = cls(text.upper())
        if vin[_CHECK_POSITION] != check_digit(vin):
            raise ValueError("must have the right check digit in its 9th character: look for a mistyped one")
        return vin


class Vehicle(msgspec.Struct, frozen=True, rename="camel"):
    """What is known of a vehicle. What its VIN does not tell is ``None``."""

    vin: str
    wmi: str
    make: str | None
    manufacturer: str | None
    country: str | None
    kind: Kind
    model_year: int | None
    age: int | None
    """In whole years, of which next year's model has none."""
    plant_code: str
    serial: str


def check_digit(vin: str) -> str:
    """What the 9th character of 17 capitals and digits has to be."""
    return _REMAINDERS[sum(_VALUES[character] * weight for character, weight in zip(vin, _WEIGHTS, strict=True)) % 11]


def find_model_year(vin: Vin, kind: Kind, *, latest: int) -> int | None:
    """The model year in the 10th character, no later than ``latest``; ``None`` if there is none.

    A code comes again after thirty years. 49 CFR 565.15(b): in light vehicles the 7th character tells the cycles apart, being a
    digit before 2010 and a letter since. Of others nothing is said, and the latest year that can be is taken; so it is for a
    light one whose letter would mean a year that is yet to come.
    """
    place = _YEAR_CODES.find(vin[9])
    if place < 0:
        return None
    cycles = _YEAR_CYCLES[:1] if kind is Kind.LIGHT and vin[6].isdigit() else _YEAR_CYCLES
    return max((first + place for first in cycles if first + place <= latest), default=None)


def describe(vin: Vin, *, this_year: int) -> Vehicle:
    """All that the VIN says. ``this_year`` bounds the model year: next year's models are sold already."""
    maker = MAKERS.get(vin[:3], Maker(None, None, Kind.LIGHT))
    model_year = find_model_year(vin, maker.kind, latest=this_year + 1)
    # ISO 3780: a 9 in the third place is shared by small makers, which the 12th to 14th characters tell apart.
    is_small = vin[2] == "9"
    return Vehicle(
        vin=str(vin),
        wmi=vin[:3] + vin[11:14] if is_small else vin[:3],
        make=maker.make,
        manufacturer=maker.manufacturer,
        country=COUNTRIES.get(vin[:2]),
        kind=maker.kind,
        model_year=model_year,
        age=None if model_year is None else max(0, this_year - model_year),
        plant_code=vin[10],
        serial=vin[14:] if is_small else vin[11:],
    )
