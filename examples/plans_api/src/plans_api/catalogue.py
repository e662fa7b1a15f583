"""The plans that are sold, as data: what is covered, for how long, for which vehicles, where, and for how much.

The plans, prices and rules are made up, as are the states in which some are not sold; they have the shape of real ones.
Money is whole cents, and factors are whole per cent, so that a price is exact until it is rounded, once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from plans_api.makers import Kind


class Term(NamedTuple):
    """How long a plan runs: until the months are over or the miles are driven, whichever comes first."""

    months: int
    miles: int
    factor: int
    """Of the base price of twelve months."""


class Band(NamedTuple):
    """A factor from some age or mileage on, up to the next band."""

    start: int
    factor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A plan. It is offered for vehicles within all of its limits, which are inclusive."""

    code: str
    name: str
    covers: tuple[str, ...]
    base_cents: int
    """Twelve months for a new vehicle, with the deductible and in a state whose factors are 100."""
    terms: tuple[Term, ...]
    deductibles: Mapping[int, int]
    """The factor of each deductible, which is in cents."""
    age_min: int = 0
    age_max: int | None = None
    mileage_max: int
    kinds: frozenset[Kind] = frozenset({Kind.LIGHT})
    not_sold_in: frozenset[str] = field(default_factory=frozenset)


AGE_BANDS: Final = (Band(0, 100), Band(4, 118), Band(7, 142), Band(11, 175), Band(16, 215), Band(25, 240))
MILEAGE_BANDS: Final = (Band(0, 100), Band(30_001, 114), Band(60_001, 132), Band(100_001, 161), Band(150_001, 198))

STATE_FACTORS: Final[Mapping[str, int]] = {
    "AK": 114,
    "CA": 112,
    "FL": 109,
    "HI": 116,
    "LA": 106,
    "MI": 107,
    "NJ": 106,
    "NY": 108,
    "TX": 97,
    "WA": 104,
}
"""Of all states where the price is not that of the table: repairs cost more there, or less."""

_DEDUCTIBLES: Final = {0: 124, 10_000: 100, 25_000: 87}
_LONG: Final = (Term(24, 24_000, 190), Term(36, 36_000, 275), Term(60, 75_000, 430))
_SHORT: Final = (Term(12, 12_000, 100), Term(24, 24_000, 190))

PLANS: Final = (
    Plan(
        code="comprehensive",
        name="Comprehensive",
        covers=(
            "engine",
            "transmission",
            "drive axles",
            "steering",
            "brakes",
            "suspension",
            "electrics",
            "air conditioning",
            "electronics",
        ),
        base_cents=71_900,
        terms=_LONG,
        deductibles=_DEDUCTIBLES,
        age_max=10,
        mileage_max=100_000,
        not_sold_in=frozenset({"CA", "FL"}),
    ),
    Plan(
        code="essential",
        name="Essential",
        covers=("engine", "transmission", "drive axles", "steering", "brakes", "electrics"),
        base_cents=52_400,
        terms=(*_SHORT, Term(36, 36_000, 275)),
        deductibles=_DEDUCTIBLES,
        age_max=15,
        mileage_max=150_000,
        not_sold_in=frozenset({"FL"}),
    ),
    Plan(
        code="powertrain",
        name="Powertrain",
        covers=("engine", "transmission", "drive axles"),
        base_cents=36_800,
        terms=(*_SHORT, Term(36, 36_000, 275)),
        deductibles=_DEDUCTIBLES,
        age_max=20,
        mileage_max=200_000,
    ),
    Plan(
        code="classic",
        name="Classic",
        covers=("engine", "transmission", "drive axles"),
        base_cents=29_500,
        terms=(Term(12, 3_000, 100), Term(24, 6_000, 190)),
        deductibles={25_000: 100, 50_000: 84},
        age_min=25,
        mileage_max=120_000,
    ),
)
