"""The API itself: one call, and the form of its refusals.

Who calls is found in the scope, where the gate in front has put it: the gate has refused whoever may not call, has held the
body's `partner` to the credential, and has counted the call. So no credential is looked at here, and none could be.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime
from http import HTTPStatus
from typing import Final

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from gatelodge.gate import caller_of
from gatelodge.strict import parse_json_object
from plans_api.pricing import PricedPlan, price_plans
from plans_api.problems import Problem, answer
from plans_api.search import read_search
from plans_api.vehicles import Vehicle, describe

SEARCH_PATH: Final = "/api/v2/Partners/PlansSearchAsync/VIN"
BODY_MAX: Final = 64 * 1024
"""Bytes."""


class Found(msgspec.Struct, frozen=True):
    """The answer to a search."""

    partner: str
    company: str | None
    vehicle: Vehicle
    mileage: int
    state: str
    plans: tuple[PricedPlan, ...]


class PlansApi:
    """The call, and the one thing that it needs from outside: what day it is."""

    def __init__(self, today: Callable[[], date]) -> None:
        self._today = today

    async def search(self, request: Request) -> Response:
        """Plans for the vehicle with a VIN. The same request on the same day has the same answer."""
        caller = caller_of(request.scope)
        asked = read_search(await _read_json(request))
        vehicle = describe(asked.vin, this_year=self._today().year)
        found = Found(
            partner=caller.partner,
            company=caller.company,
            vehicle=vehicle,
            mileage=asked.mileage,
            state=asked.state,
            plans=price_plans(vehicle, mileage=asked.mileage, state=asked.state),
        )
        return Response(msgspec.json.encode(found), media_type="application/json")


def make_app(today: Callable[[], date]) -> Starlette:
    """The API as an ASGI application, to be put behind a gate. ``today`` says what day it is."""
    app = Starlette(
        routes=[Route(SEARCH_PATH, PlansApi(today).search, methods=["POST"])],
        exception_handlers={
            Problem: _tell_problem,
            HTTPException: _tell_route,
            ClientDisconnect: _tell_nobody,
            Exception: _tell_failure,
        },
    )
    # A path has one spelling: a redirect from another would send the body, and whatever is with it, a second time.
    app.router.redirect_slashes = False
    return app


async def _read_json(request: Request) -> Mapping[str, object]:
    types = [value.partition(";")[0].strip().lower() for value in request.headers.getlist("content-type")]
    if types != ["application/json"] or request.headers.get("content-encoding", "identity") != "identity":
        raise Problem("unsupported_media_type")
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > BODY_MAX:
            raise Problem("body_too_large")
    # The reader that the gate reads `partner` with: two readers might see two different bodies in the same bytes.
    fields = parse_json_object(bytes(data))
    if fields is None:
        raise Problem("malformed_json")
    return fields


def _tell(request: Request, problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    return answer(problem, request.scope.get("gatelodge.request_id", ""), headers)


async def _tell_problem(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, Problem)  # noqa: S101 - Starlette's types do not say what it is registered for
    return _tell(request, problem)


_ROUTE_CODES: Final = {HTTPStatus.NOT_FOUND: "not_found", HTTPStatus.METHOD_NOT_ALLOWED: "method_not_allowed"}


async def _tell_route(request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, HTTPException)  # noqa: S101
    code = _ROUTE_CODES.get(HTTPStatus(refusal.status_code), "malformed_request")
    return _tell(request, Problem(code), refusal.headers)


async def _tell_nobody(request: Request, _: Exception) -> Response:
    return _tell(request, Problem("malformed_request"))  # the client is gone; what it had sent of a body is no request


async def _tell_failure(request: Request, _: Exception) -> Response:
    return _tell(request, Problem("internal_error"))


def _utc_today() -> date:
    return datetime.now(UTC).date()  # noqa: TID251 - here the day becomes a parameter


app: Final = make_app(_utc_today)
