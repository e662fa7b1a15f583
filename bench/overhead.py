"""What verifying costs: by itself in the process, and on the wire as the gate before an application."""

import asyncio
import statistics
import sys
import timeit
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from rich.table import Table

from bench.gated import GATED, PATH, make_credentials
from bench.servers import SERVER_CORE, running
from bench.wrk import Figure, load
from gatelodge.errors import CredentialExpired, InvalidCredential
from gatelodge.keyset import StaticKeys
from gatelodge.tokens import PrivateKey, TokenRules, VerificationKey, generate_private_key, public_jwk, sign_token
from gatelodge.verify import AccessRing, Caller, Grant, Verifier
from gatelodge.wire import ApiKey

FIRST_SIGHT, SEEN, GATED_RATIO = 120, 3, 0.7
"""The targets: microseconds in ``Verifier``, and the part of the rate without the gate."""
_NOBODY = Caller("", None, "partner", "starter", frozenset({"api"}), "api-key", "", None, None, "uat", None)
_ISSUANCE = {"issuer": "https://lodge.example", "audience": "partner-api-uat"}


class _Memory:
    """Records in a dictionary: what is measured is the verifier, not a database."""

    def __init__(self, key: ApiKey) -> None:
        self._known = {key.id: key.text}

    def is_current(self) -> bool:
        return True

    async def catch_up(self) -> None: ...

    async def is_own_issuer(self, issuer: str) -> bool:  # noqa: ARG002
        return False

    async def find_session(self, claimed: Caller) -> Grant:
        return Grant(claimed, float("inf"), CredentialExpired)

    async def find_token(self, claimed: Caller, digest: bytes) -> Grant:  # noqa: ARG002
        return Grant(claimed, float("inf"), CredentialExpired)

    async def find_key(self, text: str) -> Grant:
        key = ApiKey.parse(text)
        if key is None or self._known.get(key.id) != text:
            raise InvalidCredential
        return Grant(_NOBODY, float("inf"), CredentialExpired)


def _token(key: PrivateKey, typ: str, **more: object) -> str:
    claims: dict[str, object] = {
        "iss": "https://lodge.example", "aud": "partner-api-uat", "sub": "acme-motors", "iat": 1, "jti": "j" * 22, "env": "uat",
        "kind": "partner", "partner": "acme-motors", "scope": "api companies", **more,
    }  # fmt: skip
    return sign_token(claims, key=key, kid=public_jwk(key)["kid"], typ=typ)


def in_process() -> tuple[Table, bool]:
    """What the verifier of the light package costs by itself, in microseconds; whether the targets are met."""
    session_key, access_key = generate_private_key(), generate_private_key()
    keys, access_keys = (StaticKeys([VerificationKey.from_jwk(public_jwk(key))]) for key in (session_key, access_key))
    api_key = ApiKey("gatelodge", "uat", "pk", "0" * 12, "s" * 30)
    credentials = {
        "API key": api_key.text,
        "access token": _token(access_key, "JWT"),
        "session JWT": _token(
            session_key, "at+jwt", exp=4_000_000_000, client_id="c" * 12, sid="5" * 32, tier="starter"
        ),
    }  # fmt: skip
    ring = AccessRing(access_keys, TokenRules.for_access_tokens(**_ISSUANCE))
    seen, unseen = (
        Verifier(
            keys, TokenRules.for_sessions(**_ISSUANCE), records=_Memory(api_key), access_ring=ring, remembered=remembered
        )
        for remembered in (100, 0)
    )  # fmt: skip
    table = Table(title="Verifier, in process, µs each", title_justify="left", box=None)
    for column in ("what", "median", "best", "target"):
        table.add_column(column, justify="left" if column == "what" else "right")
    met = True
    for name, text in credentials.items():
        for when, verifier, target in (("at first sight", unseen, FIRST_SIGHT), ("seen before", seen, SEEN)):
            median, best = _time(verifier, text)
            met = met and best <= target
            verdict = "met" if best <= target else "MISSED"
            table.add_row(f"{name}, {when}", f"{median:.2f}", f"{best:.2f}", f"{verdict} (≤ {target})")
    signing = timeit.repeat(lambda: _token(session_key, "at+jwt"), number=500, repeat=7)
    table.add_row("sign a JWT", f"{statistics.median(signing) / 500 * 1e6:.2f}", f"{min(signing) / 500 * 1e6:.2f}", "")
    return table, met


def _time(verifier: Verifier, text: str) -> tuple[float, float]:
    async def repeat(number: int) -> float:
        clock: Callable[[], float] = timeit.default_timer
        before = clock()
        for _ in range(number):
            await verifier.verify_async(text)
        return (clock() - before) / number * 1e6

    async def rounds() -> list[float]:
        await verifier.verify_async(text)
        return [await repeat(2000) for _ in range(9)]

    runs = asyncio.run(rounds())
    return statistics.median(runs), min(runs)


def gated(scratch: Path, *, seconds: float, rounds: int) -> tuple[Table, bool]:
    """A constant answer behind the gate, for each kind of credential, beside the same without; whether the target is met.

    The load comes from the server's own core, and what is compared is the server's processor time: from another core, each
    answer wakes the load up, in a virtual machine at the server's expense, and the more often the slower the server is.
    """
    data = scratch / "gated"
    credentials = asyncio.run(make_credentials(data))
    figures: dict[str, list[Figure]] = {}
    with ExitStack() as stack:
        servers = {
            gate: stack.enter_context(running(GATED, data, plain=False, environ={"GATE": gate}, scheme="http"))
            for gate in ("on", "off")
        }
        for _ in range(rounds):
            for name, credential in credentials.items():
                for gate, server in servers.items():
                    figure = load(server, PATH, seconds=seconds, core=SERVER_CORE, LOAD="get", CREDENTIAL=credential)
                    if figure.refused:
                        sys.exit(f"{figure.refused} requests were refused: nothing was measured")
                    figures.setdefault(f"{gate} {name}", []).append(figure)
    return _report(credentials, figures)


def _report(credentials: Mapping[str, str], figures: Mapping[str, list[Figure]]) -> tuple[Table, bool]:
    table = Table(title="a constant answer behind the gate, requests per CPU second", title_justify="left", box=None)
    for column in ("credential", "with the gate", "without", "ratio", "added µs", "target"):
        table.add_column(column, justify="left" if column == "credential" else "right")
    met = True
    for name in credentials:
        pairs = list(zip(figures[f"on {name}"], figures[f"off {name}"], strict=True))
        ratio = statistics.median(without.cpu_us / with_.cpu_us for with_, without in pairs)
        added = statistics.median(with_.cpu_us - without.cpu_us for with_, without in pairs)
        met = met and ratio >= GATED_RATIO
        table.add_row(
            name,
            f"{statistics.median(1e6 / with_.cpu_us for with_, _ in pairs):,.0f}",
            f"{statistics.median(1e6 / without.cpu_us for _, without in pairs):,.0f}",
            f"{ratio:.2f}",
            f"{added:.1f}",
            f"{'met' if ratio >= GATED_RATIO else 'MISSED'} (≥ {GATED_RATIO})",
        )
    return table, met
