"""A desk for spare parts: a Litestar application with the gate of a Gatelodge deployment in its own process.

Started once, `gatelodge serve` makes the data directory and, in it, the certificate that is used here. Then::

    export GATELODGE_DATA=./gatelodge-data
    gatelodge partner add "Acme Motors" --email dev@acme.example    # prints the API key: KEY=…
    uvicorn examples.litestar_app:app --port 8444 \
        --ssl-certfile $GATELODGE_DATA/tls/server.pem --ssl-keyfile $GATELODGE_DATA/tls/server.key

    curl --cacert $GATELODGE_DATA/tls/ca.pem https://localhost:8444/orders \
        -H "Authorization: Bearer $KEY" -H "Content-Type: application/json" -d '{"part": "brake pad", "quantity": 4}'

An access token (`gatelodge token issue acme-motors`) does as well as the key, and so does the session JWT that a login gives.
"""

from dataclasses import dataclass
from itertools import count

from litestar import Litestar, get, post
from litestar.di import Provide
from litestar.middleware import DefineMiddleware
from litestar.types import Scope

from gatelodge import Caller, Gate, caller_of
from gatelodge_server.embedded import at_work, open_lodge

lodge = open_lodge()
numbers = count(1)


@dataclass
class Wanted:
    """What a partner orders."""

    part: str
    quantity: int


@dataclass
class Order(Wanted):
    """An order as it was taken."""

    number: int
    partner: str
    company: str | None


orders: list[Order] = []


def let_in(scope: Scope) -> Caller:
    """Whom the gate has let in. A request that it refuses is never seen here."""
    return caller_of(scope)


@post("/orders")
async def place_order(data: Wanted, caller: Caller) -> Order:
    """Take an order."""
    order = Order(data.part, data.quantity, next(numbers), caller.partner, caller.company)
    orders.append(order)
    return order


@get("/orders")
async def list_orders(caller: Caller) -> list[Order]:
    """The caller's own orders: whose they are is the gate's word, not the request's."""
    return [order for order in orders if order.partner == caller.partner]


app = Litestar(
    route_handlers=[place_order, list_orders],
    dependencies={"caller": Provide(let_in, sync_to_thread=False)},
    # Gate's types are those of every ASGI framework; Litestar's are narrower.
    middleware=[DefineMiddleware(Gate, verifier=lodge.verifier, count=lodge.turnstile)],  # type: ignore[arg-type]
    lifespan=[lambda _: at_work(lodge)],
)
