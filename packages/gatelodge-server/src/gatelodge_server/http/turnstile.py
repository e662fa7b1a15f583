"""The turnstile: counts whoever the gate lets in, and says in each answer what is left.

The gate is ``gatelodge.gate.Gate``; who calls is known when it asks here.
"""

from collections.abc import Awaitable
from typing import Any, Final

from gatelodge.gate import REQUEST_ID, Rates, Scope
from gatelodge.rates import rate_headers
from gatelodge.verify import Caller
from gatelodge_server.core.model import SECOND, Clock, Instant
from gatelodge_server.core.quotas import Quotas
from gatelodge_server.core.usage import UseKind
from gatelodge_server.http.operation import credential_free
from gatelodge_server.log import log

_REMEMBERED: Final = 10_000


class Turnstile:
    """Counts requests against the partner's quota. A ``gatelodge.gate.Count``."""

    def __init__(self, *, quotas: Quotas, clock: Clock) -> None:
        self._quotas = quotas
        self._clock = clock
        self._noted: dict[tuple[str, str], int] = {}

    def __call__(self, caller: Caller, scope: Scope) -> Rates | Awaitable[Rates]:
        """Let one request in; the rate headers. Raises ``QuotaExceeded`` or ``Unavailable``."""
        now = self._clock()
        visitor = (caller.credential_id, address_of(scope))
        # Each request is counted; that a credential is in use is noted once a second.
        if self._noted.get(visitor) != now // SECOND:
            self._note(caller, scope, visitor, now)
        return self._quotas.take(caller.partner, now) or self._wait(caller.partner, now)

    async def _wait(self, partner: str, now: Instant) -> Rates:
        status = await self._quotas.count(partner, now)
        return rate_headers(status.windows(), status.now)

    def _note(self, caller: Caller, scope: Scope, visitor: tuple[str, str], now: Instant) -> None:
        second, before = now // SECOND, self._noted.get(visitor, 0)
        if len(self._noted) >= _REMEMBERED:
            self._noted.clear()
        self._noted[visitor] = second
        kind: UseKind = "token" if caller.credential == "access-token" else "key"
        self._quotas.note_use(kind, *visitor, now)
        # A line for each request would cost more than all else here: once a minute one says who came from where.
        if second // 60 != before // 60:
            path = credential_free(scope["path"])
            log.info("admitted", **_who(caller), method=scope.get("method"), path=path, **_whence(scope))


def log_refusal(scope: Scope, refused: Exception, caller: Caller | None) -> None:
    """Log what the gate has refused. A ``gatelodge.gate.OnRefused``."""
    log.info(
        "refused",
        code=getattr(refused, "code", ""),
        method=scope.get("method"),
        path=credential_free(scope["path"]),
        **(_who(caller) if caller is not None else {}),
        **_whence(scope),
    )


def address_of(scope: Scope) -> str:
    """Who sent the request, as far as trusted proxies say: the edge's word if there is an edge, else the peer."""
    client = scope.get("client")
    return str(scope.get("gatelodge.address") or (client[0] if client else ""))


def _who(caller: Caller) -> dict[str, Any]:
    company = {} if caller.company is None else {"company": caller.company}
    return {"partner": caller.partner, "credential": caller.credential_id, **company}


def _whence(scope: Scope) -> dict[str, Any]:
    return {"address": address_of(scope), "request_id": scope[REQUEST_ID]}
