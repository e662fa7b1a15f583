"""A desk for spare parts: a Starlette application with the gate of a Gatelodge deployment in its own process.

Started once, `gatelodge serve` makes the data directory and, in it, the certificate that is used here. Then::

    export GATELODGE_DATA=./gatelodge-data
    gatelodge partner add "Acme Motors" --email dev@acme.example    # prints the API key: KEY=…
    uvicorn examples.starlette_app:app --port 8444 \
        --ssl-certfile $GATELODGE_DATA/tls/server.pem --ssl-keyfile $GATELODGE_DATA/tls/server.key

    curl --cacert $GATELODGE_DATA/tls/ca.pem https://localhost:8444/orders \
        -H "Authorization: Bearer $KEY" -H "Content-Type: application/json" -d '{"part": "brake pad", "quantity": 4}'

An access token (`gatelodge token issue acme-motors`) does as well as the key, and so does the session JWT that a login gives.
"""

from itertools import count

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from gatelodge import Gate, caller_of
from gatelodge_server.embedded import at_work, open_lodge

lodge = open_lodge()
numbers = count(1)
orders: list[dict[str, object]] = []


async def place_order(request: Request) -> JSONResponse:
    """Take an order of whoever the gate has let in. A request that it refuses is never seen here."""
    caller = caller_of(request.scope)
    match await request.json():
        case {"part": str(part), "quantity": int(quantity)}:
            order = {
                "number": next(numbers),
                "partner": caller.partner,
                "company": caller.company,
                "part": part,
                "quantity": quantity,
            }
            orders.append(order)
            return JSONResponse(order, status_code=201)
        case _:
            return JSONResponse({"detail": "name a part and a quantity"}, status_code=422)


async def list_orders(request: Request) -> JSONResponse:
    """The caller's own orders: whose they are is the gate's word, not the request's."""
    caller = caller_of(request.scope)
    return JSONResponse([order for order in orders if order["partner"] == caller.partner])


app = Starlette(
    routes=[Route("/orders", place_order, methods=["POST"]), Route("/orders", list_orders)],
    middleware=[Middleware(Gate, verifier=lodge.verifier, count=lodge.turnstile)],
    lifespan=lambda _: at_work(lodge),
)
