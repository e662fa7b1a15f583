"""Which plans a vehicle can have, and what each of them costs."""

import msgspec

from plans_api.catalogue import AGE_BANDS, MILEAGE_BANDS, PLANS, STATE_FACTORS, Band, Plan, Term
from plans_api.vehicles import Vehicle


class Offer(msgspec.Struct, frozen=True, rename="camel"):
    """A plan for one term with one deductible. ``total_cents`` is what the months come to, to the cent."""

    months: int
    miles: int
    deductible_cents: int
    monthly_cents: int
    total_cents: int


class PricedPlan(msgspec.Struct, frozen=True):
    """A plan with all that it can be had for: the shortest term first, and in it the lowest deductible."""

    code: str
    name: str
    covers: tuple[str, ...]
    currency: str
    offers: tuple[Offer, ...]


def price_plans(vehicle: Vehicle, *, mileage: int, state: str) -> tuple[PricedPlan, ...]:
    """The plans that are sold for the vehicle in that state. For one whose age is not known there are none."""
    if vehicle.age is None:
        return ()
    return tuple(
        _price(plan, age=vehicle.age, mileage=mileage, state=state)
        for plan in PLANS
        if vehicle.kind in plan.kinds
        and plan.age_min <= vehicle.age
        and (plan.age_max is None or vehicle.age <= plan.age_max)
        and mileage <= plan.mileage_max
        and state not in plan.not_sold_in
    )


def _price(plan: Plan, *, age: int, mileage: int, state: str) -> PricedPlan:
    risk = _factor(AGE_BANDS, age) * _factor(MILEAGE_BANDS, mileage) * STATE_FACTORS.get(state, 100)
    return PricedPlan(
        code=plan.code,
        name=plan.name,
        covers=plan.covers,
        currency="USD",
        offers=tuple(
            _offer(term, deductible, plan.base_cents * risk * factor)
            for term in plan.terms
            for deductible, factor in plan.deductibles.items()
        ),
    )


def _factor(bands: tuple[Band, ...], value: int) -> int:
    return max(band for band in bands if band.start <= value).factor


def _offer(term: Term, deductible: int, scaled: int) -> Offer:
    # Five factors in per cent: of the age, the mileage, the state, the deductible and the term.
    divisor = 100**5 * term.months
    # Half a cent goes up. The month is what is rounded, so that a bill of every month adds up to the total that was told.
    monthly = (2 * scaled * term.factor + divisor) // (2 * divisor)
    return Offer(
        months=term.months,
        miles=term.miles,
        deductible_cents=deductible,
        monthly_cents=monthly,
        total_cents=monthly * term.months,
    )
