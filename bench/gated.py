"""One constant answer of a Starlette application, with the gate before it or without: what is measured is the difference.

``python -m bench.gated serve --json --port 0 --data DIR`` serves it on plain HTTP, as behind a proxy that ends TLS. The
variable ``GATE`` is ``on`` or ``off``.
"""

import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gatelodge.gate import Gate
from gatelodge_server.core.model import Tier
from gatelodge_server.core.partners import NewPartner
from gatelodge_server.embedded import Lodge, at_work, open_lodge
from gatelodge_server.log import configure_log

GATED = (sys.executable, "-m", "bench.gated")
PATH = "/plans"
_PLENTY = 2_000_000_000


def _lodge(data: Path) -> Lodge:
    return open_lodge({"GATELODGE_DATA": str(data)})


async def make_credentials(data: Path) -> Mapping[str, str]:
    """One credential of each kind, all of one partner whose quota does not run out."""
    lodge = _lodge(data)
    async with at_work(lodge):
        now = lodge.clock()
        await lodge.store.set_tier(Tier("plenty", _PLENTY, _PLENTY), now=now, by="bench")
        partner, key = await lodge.partners.add(NewPartner("Acme Motors", "dev@acme.example", tier="plenty"), by="bench")
        token = await lodge.access_tokens.issue(partner.id, label="bench", by="bench")
        session = await lodge.sessions.log_in(key.text)
        return {"API key": key.text.reveal(), "access token": token.text.reveal(), "session JWT": session.jwt.reveal()}


async def constant(_: Request) -> Response:
    return Response(b'{"status":"alive"}', media_type="application/json")


def make_app(data: Path, *, gate: bool) -> Starlette:
    """The application. Its middleware is the only difference."""
    routes = [Route(PATH, constant)]
    if not gate:
        return Starlette(routes=routes)
    lodge = _lodge(data)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with at_work(lodge):
            yield

    gate_ = Middleware(Gate, verifier=lodge.verifier, count=lodge.turnstile)
    return Starlette(routes=routes, middleware=[gate_], lifespan=lifespan)


def main() -> None:
    """Serve, by the flags of `gatelodge serve` that the bench uses."""
    configure_log()
    data = Path(sys.argv[sys.argv.index("--data") + 1])
    app = make_app(data, gate=os.environ["GATE"] == "on")
    config = uvicorn.Config(app, log_level="error", proxy_headers=True, forwarded_allow_ips="127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as sock:
        print(json.dumps({"port": sock.getsockname()[1]}), flush=True)
        uvicorn.Server(config).run([sock])


if __name__ == "__main__":
    main()
