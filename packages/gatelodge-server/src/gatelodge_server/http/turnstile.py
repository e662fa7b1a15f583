"""The turnstile: counts whoever the gate lets in, and says in each answer what is left.

The gate is ``gatelodge.gate.Gate``; who calls is known when it asks here.
"""

from typing import Any, Final, Literal

from gatelodge.gate import REQUEST_ID, Scope
from gatelodge.rates import Header, RateForm
from gatelodge.verify import Caller
from gatelodge_server.core.model import MINUTE, Clock
from gatelodge_server.core.quotas import Quotas, QuotaStatus
from gatelodge_server.http.operation import credential_free
from gatelodge_server.log import log

_REMEMBERED: Final = 10_000


class Turnstile:
    """Counts requests against the partner's quota. A ``gatelodge.gate.Count``."""

    def __init__(self, *, quotas: Quotas, clock: Clock) -> None:
        self._quotas = quotas
        self._clock = clock
        self._logged: dict[tuple[str, str], int] = {}
        self._forms: dict[str, tuple[QuotaStatus, RateForm]] = {}

    async def __call__(self, caller: Caller, scope: Scope) -> list[Header]:
        """Let one request in; the rate headers. Raises ``QuotaExceeded`` or ``Unavailable``."""
        now = self._clock()
        address = address_of(scope)
        kind: Literal["key", "token"] = "token" if caller.credential == "access-token" else "key"
        self._quotas.note_use(kind, caller.credential_id, address, now)
        status = await self._quotas.count(caller.partner, now)
        self._log(caller, scope, address, now // MINUTE)
        hour, day = status.hour, status.day
        return self._form(caller.partner, status).headers((hour.remaining, day.remaining), now)

    def _form(self, partner: str, status: QuotaStatus) -> RateForm:
        known = self._forms.get(partner)
        if known is not None:
            then, form = known
            same_windows = then.hour.resets_at == status.hour.resets_at and then.day.resets_at == status.day.resets_at
            if then.tier is status.tier and same_windows:
                return form
        if len(self._forms) >= _REMEMBERED:
            self._forms.clear()
        form = RateForm(status.windows())
        self._forms[partner] = (status, form)
        return form

    def _log(self, caller: Caller, scope: Scope, address: str, minute: int) -> None:
        # Each request is counted as usage; a line for each would cost more than all else here. Once a minute says who came
        # from where.
        key = (caller.credential_id, address)
        if self._logged.get(key) == minute:
            return
        if len(self._logged) >= _REMEMBERED:
            self._logged.clear()
        self._logged[key] = minute
        log.info("admitted", **_who(caller), method=scope.get("method"), path=credential_free(scope["path"]), **_whence(scope))


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
