"""What the sample partner API knows: VINs, makers, states and the catalogue, each without a request."""

import re
from datetime import date
from decimal import ROUND_HALF_UP, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plans_api.catalogue import AGE_BANDS, MILEAGE_BANDS, PLANS, STATE_FACTORS
from plans_api.makers import COUNTRIES, MAKERS, Kind
from plans_api.pricing import price_plans
from plans_api.problems import PROBLEMS
from plans_api.search import MILEAGE_MAX
from plans_api.states import BY_PREFIX, STATES, find_state
from plans_api.vehicles import Vin, check_digit, describe, find_model_year

ALPHABET = "0123456789ABCDEFGHJKLMNPRSTUVWXYZ"
LETTER_VALUES = dict(zip("ABCDEFGHJKLMNPRSTUVWXYZ", "12345678123457923456789", strict=True))
THIS_YEAR = date(2026, 6, 26).year

characters = st.text(ALPHABET, min_size=16, max_size=16)


def whole(sixteen):
    """A VIN of sixteen characters and the check digit in their midst."""
    return Vin.parse(sixteen[:8] + check_digit(sixteen[:8] + "0" + sixteen[8:]) + sixteen[8:])


def vin_of(code, seventh="1", wmi="1HG"):
    """A VIN with this model year code and 7th character."""
    return whole(f"{wmi}CM5{seventh}3{code}A000001")


def years(code, seventh, wmi="1HG", latest=THIS_YEAR + 1):
    vehicle = describe(vin_of(code, seventh, wmi), this_year=latest - 1)
    return vehicle.model_year


# VINs


@pytest.mark.parametrize(
    "vin",
    [
        "1HGBH41JXMN109186",
        "1M8GDM9AXKP042788",
        "11111111111111111",
        "5GZCZ43D13S812715",
        "JHMCM56557C404453",
    ],
)
def test_known_vins_are_taken(vin):
    assert Vin.parse(vin) == vin


@given(characters)
def test_of_eleven_check_digits_one_is_right(sixteen):
    right = [digit for digit in "0123456789X" if is_vin(sixteen[:8] + digit + sixteen[8:])]
    assert right == [check_digit(sixteen[:8] + "0" + sixteen[8:])]


@given(characters)
def test_the_check_digit_is_the_weighted_sum_of_the_regulation(sixteen):
    vin = whole(sixteen)
    values = [int(LETTER_VALUES.get(character, character)) for character in vin[:8] + "0" + vin[9:]]
    weights = [*range(8, 1, -1), 10, 0, *range(9, 1, -1)]
    remainder = sum(value * weight for value, weight in zip(values, weights, strict=True)) % 11
    assert vin[8] == ("X" if remainder == 10 else str(remainder))


@given(characters, st.integers(0, 16), st.sampled_from(ALPHABET))
def test_one_wrong_character_is_found_unless_it_counts_the_same(sixteen, place, other):
    vin = whole(sixteen)
    slip = vin[:place] + other + vin[place + 1 :]
    counts_the_same = place != 8 and LETTER_VALUES.get(vin[place], vin[place]) == LETTER_VALUES.get(other, other)
    assert is_vin(slip) == (slip == vin or counts_the_same)


@given(characters)
def test_a_vin_in_small_letters_is_the_same_vin(sixteen):
    assert Vin.parse(whole(sixteen).lower()) == whole(sixteen)


@given(st.text())
def test_what_is_taken_for_a_vin_has_the_shape_of_one(text):
    try:
        vin = Vin.parse(text)
    except ValueError:
        return
    assert re.fullmatch(r"[A-HJ-NPR-Z0-9]{17}", vin, re.ASCII)


def is_vin(text):
    try:
        Vin.parse(text)
    except ValueError:
        return False
    return True


# Model years


@pytest.mark.parametrize(
    ("code", "year"),
    [*zip("ABCDEFGHJKLMNPRSTVWXY123456789", range(1980, 2010), strict=True)],
)
def test_with_a_digit_in_the_seventh_place_a_light_vehicle_is_of_before_2010(code, year):
    assert years(code, "1") == year


@pytest.mark.parametrize(("code", "year"), [*zip("ABCDEFGHJKLMNPRSTV", range(2010, 2028), strict=True)])
def test_with_a_letter_in_the_seventh_place_it_is_of_2010_or_later(code, year):
    assert years(code, "B") == year


@pytest.mark.parametrize(("latest", "year"), [(2026, 1997), (2027, 2027), (2028, 2027)])
def test_a_year_is_never_later_than_the_next(latest, year):
    assert years("V", "B", latest=latest) == year


@pytest.mark.parametrize("seventh", ["1", "B"])
def test_the_seventh_place_of_a_motorcycle_or_a_heavy_truck_says_nothing(seventh):
    for wmi, kind in (("1HD", Kind.MOTORCYCLE), ("1XP", Kind.HEAVY)):
        assert MAKERS[wmi].kind is kind
        assert years("F", seventh, wmi) == 2015
        assert years("X", seventh, wmi) == 1999


@pytest.mark.parametrize("code", ["0", "U", "Z"])
def test_some_characters_are_no_year_and_then_there_are_no_plans(code):
    vehicle = describe(vin_of(code), this_year=THIS_YEAR)
    assert (vehicle.model_year, vehicle.age) == (None, None)
    assert price_plans(vehicle, mileage=1, state="TX") == ()


def test_before_the_first_year_of_a_code_there_is_none():
    assert find_model_year(vin_of("B"), Kind.LIGHT, latest=1980) is None
    assert find_model_year(vin_of("B"), Kind.LIGHT, latest=1981) == 1981


@pytest.mark.parametrize(("code", "age"), [("S", 1), ("T", 0), ("V", 0)])
def test_the_model_of_next_year_has_no_age(code, age):
    assert describe(vin_of(code, "B"), this_year=THIS_YEAR).age == age


@given(characters, st.integers(1980, 2100))
def test_every_vin_is_described(sixteen, this_year):
    vehicle = describe(whole(sixteen), this_year=this_year)
    assert vehicle.model_year is None or 1980 <= vehicle.model_year <= this_year + 1
    assert vehicle.vin.endswith(vehicle.plant_code + vehicle.serial) or vehicle.wmi.endswith(vehicle.vin[11:14])


# Makers


def test_the_table_of_makers_is_whole():
    assert len(MAKERS) >= 150
    for wmi, maker in MAKERS.items():
        assert re.fullmatch(r"[A-HJ-NPR-Z0-9]{3}", wmi)
        assert wmi[:2] in COUNTRIES
        assert maker.manufacturer


def test_no_code_stands_twice():
    from plans_api import makers  # noqa: PLC0415 - the rows behind the table

    rows = [*makers._LIGHT, *makers._HEAVY, *makers._MOTORCYCLES]
    assert sum(len(wmis.split()) for _, _, wmis in rows) == len(MAKERS)


@pytest.mark.parametrize(
    ("wmi", "make", "country"),
    [
        ("1HG", "Honda", "United States"),
        ("2T1", "Toyota", "Canada"),
        ("3VW", "Volkswagen", "Mexico"),
        ("5YJ", "Tesla", "United States"),
        ("JF1", "Subaru", "Japan"),
        ("KMH", "Hyundai", "South Korea"),
        ("SAL", "Land Rover", "United Kingdom"),
        ("WBA", "BMW", "Germany"),
        ("YV1", "Volvo", "Sweden"),
        ("ZFF", "Ferrari", "Italy"),
        ("1C4", None, "United States"),
        ("NMA", None, "Turkey"),
        ("999", None, "Brazil"),
        ("000", None, None),
    ],
)
def test_the_first_characters_tell_make_and_country(wmi, make, country):
    vehicle = describe(vin_of("M", wmi=wmi), this_year=THIS_YEAR)
    assert (vehicle.make, vehicle.country) == (make, country)


def test_small_makers_share_a_code_and_have_three_more_characters():
    vehicle = describe(whole("1F9AB123MA456789"), this_year=THIS_YEAR)
    assert (vehicle.wmi, vehicle.plant_code, vehicle.serial) == ("1F9456", "A", "789")


# States


def test_there_are_fifty_states_and_the_district_of_columbia():
    assert len(STATES) == 51
    assert "DC" in STATES


def test_every_prefix_is_three_digits_and_every_state_has_one():
    assert all(re.fullmatch(r"[0-9]{3}", prefix) for prefix in BY_PREFIX)
    assert set(BY_PREFIX.values()) == STATES


def test_no_prefix_is_of_two_states():
    from plans_api import states  # noqa: PLC0415

    assert sum(len(states._spread(ranges)) for ranges in states._PREFIXES.values()) == len(BY_PREFIX)


@pytest.mark.parametrize(
    ("code", "state"),
    [
        ("00501", "NY"),
        ("02108", "MA"),
        ("05501", "MA"),
        ("05601", "VT"),
        ("06390", "NY"),
        ("06391", "CT"),
        ("10001", "NY"),
        ("20001", "DC"),
        ("20101", "VA"),
        ("20588", "MD"),
        ("20601", "MD"),
        ("33101", "FL"),
        ("39901", "GA"),
        ("60601", "IL"),
        ("73301", "TX"),
        ("73401", "OK"),
        ("75001", "TX"),
        ("83414", "WY"),
        ("88510", "TX"),
        ("90210", "CA"),
        ("96701", "HI"),
        ("99501", "AK"),
        ("00601", None),
        ("00801", None),
        ("09001", None),
        ("21300", None),
        ("34001", None),
        ("96201", None),
        ("96799", None),
        ("96910", None),
        ("00000", None),
    ],
)
def test_a_zip_code_is_of_its_state_or_of_none(code, state):
    assert find_state(code) == state


# The catalogue


def test_the_catalogue_is_whole():
    assert len({plan.code for plan in PLANS}) == len(PLANS)
    for plan in PLANS:
        assert plan.covers
        assert plan.terms == tuple(sorted(plan.terms))
        assert list(plan.deductibles) == sorted(plan.deductibles)
        assert plan.not_sold_in <= STATES
        assert plan.mileage_max <= MILEAGE_MAX
    for bands in (AGE_BANDS, MILEAGE_BANDS):
        assert bands[0].start == 0
        assert bands == tuple(sorted(bands))
    assert STATE_FACTORS.keys() <= STATES


@given(characters, st.integers(1, MILEAGE_MAX), st.sampled_from(sorted(STATES)))
def test_a_price_is_the_product_of_its_factors_rounded_once(sixteen, mileage, state):
    vehicle = describe(whole("1HG" + sixteen[3:]), this_year=THIS_YEAR)
    for priced in price_plans(vehicle, mileage=mileage, state=state):
        plan = next(plan for plan in PLANS if plan.code == priced.code)
        for offer in priced.offers:
            term = next(term for term in plan.terms if term.months == offer.months)
            exact = Decimal(plan.base_cents) / term.months
            for per_cent in (
                [band.factor for band in AGE_BANDS if band.start <= vehicle.age][-1],
                [band.factor for band in MILEAGE_BANDS if band.start <= mileage][-1],
                STATE_FACTORS.get(state, 100),
                plan.deductibles[offer.deductible_cents],
                term.factor,
            ):
                exact = exact * per_cent / 100
            # Thirds of a cent come out just beside themselves; nothing else lies so near to half a cent.
            assert offer.monthly_cents == int(exact.quantize(Decimal("1e-12")).quantize(Decimal(1), ROUND_HALF_UP))
            assert offer.total_cents == offer.monthly_cents * offer.months


@pytest.mark.parametrize(("mileage", "monthly"), [(30_000, 3067), (30_001, 3496), (30_002, 3496)])
def test_a_price_from_the_table(mileage, monthly):
    # Powertrain for a vehicle of this year: 368 dollars for twelve months, 14 per cent more from 30 001 miles on.
    plans = price_plans(describe(vin_of("T", "B"), this_year=THIS_YEAR), mileage=mileage, state="NV")
    powertrain = next(plan for plan in plans if plan.code == "powertrain")
    offer = next(offer for offer in powertrain.offers if (offer.months, offer.deductible_cents) == (12, 10_000))
    assert offer.monthly_cents == monthly


def test_a_lower_deductible_never_costs_less():
    for plan in price_plans(describe(vin_of("T", "B"), this_year=THIS_YEAR), mileage=1, state="NV"):
        for months in {offer.months for offer in plan.offers}:
            prices = [offer.monthly_cents for offer in plan.offers if offer.months == months]
            assert prices == sorted(prices, reverse=True)


def test_motorcycles_and_heavy_trucks_have_no_plans():
    for wmi in ("1HD", "1XP"):
        assert price_plans(describe(vin_of("T", "B", wmi), this_year=THIS_YEAR), mileage=1, state="TX") == ()


def test_every_refusal_has_an_error_status_and_a_sentence():
    for status, detail in PROBLEMS.values():
        assert 400 <= status < 600
        assert detail.endswith(".")
