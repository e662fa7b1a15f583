"""A service on another host, with the light package only: it knows session JWTs by their signature, and asks for none of them.

    export GATELODGE_ISSUER=https://uat.example.com GATELODGE_AUDIENCE=partner-api-uat
    uvicorn examples.offline_app:app --port 8445 --ssl-certfile chain.pem --ssl-keyfile key.pem

    JWT=…    # from POST $GATELODGE_ISSUER/auth/login {"apiKey": "…"}
    curl https://localhost:8445/stock/brake-pad -H "R-Auth: $JWT"

The issuer is asked for its public keys now and then, and all the time for what it has revoked (if its certificate is of an
authority of your own, name that in `SSL_CERT_FILE`). So a session that has ended is refused here within moments, and everything
is when the issuer was not heard for ten seconds. What cannot be known here:

- whose an API key is, or whether an access token was ever issued: both are refused, `invalid_credential`;
- how much of its quota a partner has used: nothing is counted, and answers have no rate headers.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from gatelodge import Gate, RemoteKeys, RemoteRevocations, TokenRules, Verifier, caller_of

ISSUER: Final = os.environ["GATELODGE_ISSUER"]
AUDIENCE: Final = os.environ.get("GATELODGE_AUDIENCE", "partner-api-uat")
STOCK: Final = {"brake-pad": 112, "wiper-blade": 36}


async def tell_stock(request: Request) -> JSONResponse:
    """How many there are of a part, for whoever the gate has let in."""
    part = request.path_params["part"]
    return JSONResponse({"part": part, "stock": STOCK.get(part, 0), "askedBy": caller_of(request.scope).partner})


revocations = RemoteRevocations(f"{ISSUER}/auth/revocations", name="stock")
verifier = Verifier(
    RemoteKeys(f"{ISSUER}/.well-known/jwks.json"),
    TokenRules.for_sessions(issuer=ISSUER, audience=AUDIENCE),
    revocations=revocations,
)


@asynccontextmanager
async def following(_: Starlette) -> AsyncIterator[None]:
    """Follow the issuer's feed from the start to the end, so that the first request need not wait for it."""
    with revocations:
        yield


app = Gate(Starlette(routes=[Route("/stock/{part}", tell_stock)], lifespan=following), verifier=verifier)
