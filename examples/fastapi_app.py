"""A desk for spare parts: a FastAPI application with the gate of a Gatelodge deployment in its own process.

Started once, `gatelodge serve` makes the data directory and, in it, the certificate that is used here. Then::

    export GATELODGE_DATA=./gatelodge-data
    gatelodge partner add "Acme Motors" --email dev@acme.example    # prints the API key: KEY=…
    uvicorn examples.fastapi_app:app --port 8444 \
        --ssl-certfile $GATELODGE_DATA/tls/server.pem --ssl-keyfile $GATELODGE_DATA/tls/server.key

    curl --cacert $GATELODGE_DATA/tls/ca.pem https://localhost:8444/orders \
        -H "Authorization: Bearer $KEY" -H "Content-Type: application/json" -d '{"part": "brake pad", "quantity": 4}'

An access token (`gatelodge token issue acme-motors`) does as well as the key, and so does the session JWT that a login gives.
"""

from itertools import count
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from pydantic import BaseModel, PositiveInt

from gatelodge import Caller, Gate, caller_of
from gatelodge_server.embedded import at_work, open_lodge

lodge = open_lodge()
app = FastAPI(title="Spare parts", lifespan=lambda _: at_work(lodge))
app.add_middleware(Gate, verifier=lodge.verifier, count=lodge.turnstile)


def let_in(request: Request) -> Caller:
    """Whom the gate has let in. A request that it refuses is never seen here."""
    return caller_of(request.scope)


LetIn = Annotated[Caller, Depends(let_in)]


class Wanted(BaseModel):
    """What a partner orders."""

    part: str
    quantity: PositiveInt


class Order(Wanted):
    """An order as it was taken."""

    number: int
    partner: str
    company: str | None


numbers = count(1)
orders: list[Order] = []


@app.post("/orders", status_code=201)
async def place_order(wanted: Wanted, caller: LetIn) -> Order:
    """Take an order."""
    order = Order(number=next(numbers), partner=caller.partner, company=caller.company, **wanted.model_dump())
    orders.append(order)
    return order


@app.get("/orders")
async def list_orders(caller: LetIn) -> list[Order]:
    """The caller's own orders: whose they are is the gate's word, not the request's."""
    return [order for order in orders if order.partner == caller.partner]
