"""What is asked for: the body of a search, read into exact types, with all that is wrong with it told at once."""

import re
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, TypeVar

from plans_api.problems import FieldError, Problem
from plans_api.states import STATES, find_state
from plans_api.vehicles import Vin

Value = TypeVar("Value")

MILEAGE_MAX: Final = 250_000
_STATE: Final = re.compile(r"[A-Z]{2}", re.ASCII | re.IGNORECASE)
_ZIP: Final = re.compile(r"[0-9]{5}", re.ASCII)


class Search(NamedTuple):
    """A search for plans."""

    vin: Vin
    mileage: int
    state: str


def read_search(body: Mapping[str, object]) -> Search:
    """The search in a body; unknown fields are ignored. Raises ``Problem`` with all that is wrong.

    `partner` may stand in the body too. Whose it is has been judged at the gate, and nothing is left to do with it here.
    """
    errors: list[FieldError] = []
    criteria = _read(body, "searchCriteria", "", _object, errors)
    if criteria is None:
        raise Problem("invalid_fields", errors=errors)
    within = "/searchCriteria"
    vin = _read(criteria, "vin", within, _vin, errors)
    mileage = _read(criteria, "mileage", within, _mileage, errors)
    state = _read_place(criteria, within, errors)
    if vin is None or mileage is None or state is None:
        raise Problem("invalid_fields", errors=errors)
    return Search(vin, mileage, state)


def _read_place(criteria: Mapping[str, object], within: str, errors: list[FieldError]) -> str | None:
    # Many programs write null for what they do not have.
    given = {name: value for name in ("stateShortName", "zip") if (value := criteria.get(name)) is not None}
    if not given:
        errors.append(FieldError(f"{within}/stateShortName", "is required, unless `zip` is given"))
        return None
    named = _read(given, "stateShortName", within, _state, errors) if "stateShortName" in given else None
    found = _read(given, "zip", within, _zip, errors) if "zip" in given else None
    if named is not None and found is not None and named != found:
        errors.append(FieldError(f"{within}/zip", f"is in {found}, but `stateShortName` says {named}"))
        return None
    if "zip" in given and found is None:
        return None  # one fault is enough, however good the other field is
    return named or found


def _read(
    fields: Mapping[str, object], name: str, within: str, parse: Callable[[object], Value], errors: list[FieldError]
) -> Value | None:
    if name not in fields:
        errors.append(FieldError(f"{within}/{name}", "is required"))
        return None
    try:
        return parse(fields[name])
    except ValueError as fault:
        errors.append(FieldError(f"{within}/{name}", str(fault)))
        return None


def _object(value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise ValueError("must be an object")  # noqa: TRY004 - a fault of the sender, as every other
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string")  # noqa: TRY004
    return value


def _vin(value: object) -> Vin:
    return Vin.parse(_text(value))


def _mileage(value: object) -> int:
    # `True` is an int in Python, and 55555.0 is a float in JSON: neither is a reading of an odometer.
    if type(value) is not int or not 1 <= value <= MILEAGE_MAX:
        raise ValueError(f"must be a whole number from 1 to {MILEAGE_MAX}")
    return value


def _state(value: object) -> str:
    text = _text(value)
    if _STATE.fullmatch(text) is None or text.upper() not in STATES:
        raise ValueError("must be the two-letter code of a state of the United States, or DC")
    return text.upper()


def _zip(value: object) -> str:
    text = _text(value)
    if _ZIP.fullmatch(text) is None:
        raise ValueError("must be 5 digits")
    state = find_state(text)
    if state is None:
        raise ValueError("is a ZIP code of no state of the United States")
    return state
