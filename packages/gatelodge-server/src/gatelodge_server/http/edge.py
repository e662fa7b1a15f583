"""The edge: what is true of every request, before and after the operation that it is for.

It gives the request an id, finds out who sent it and over what, refuses plain HTTP, and sees that whatever goes wrong inside
still ends as a problem document.
"""

import ipaddress
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from http import HTTPStatus
from typing import Final, TypeAlias

from starlette.exceptions import HTTPException
from starlette.routing import Route, Router

from gatelodge.errors import HttpsRequired
from gatelodge.gate import App
from gatelodge_server.http.draining import Draining
from gatelodge_server.http.operation import Call, Message, Operation, Receive, Scope, Send, send_problem
from gatelodge_server.http.problems import InternalError, MethodNotAllowed, NotFound
from gatelodge_server.log import log

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

_Hop: TypeAlias = tuple[str | None, str | None]
"""What a proxy says of the one before it: its address and the scheme, each ``None`` if it was not said or cannot be read."""

_REMEMBERED: Final = 4096
"""How many addresses are remembered: reading one takes longer than all else that happens here."""
_ADDRESS_MAX: Final = 64
"""Characters; `[` and an IPv6 address with IPv4 notation, a zone and a port are no longer."""

_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
_NO_SNIFFING: Final = (b"x-content-type-options", b"nosniff")
_HTTPS_FROM_NOW_ON: Final = (b"strict-transport-security", b"max-age=31536000")
_LAST_ANSWER: Final = (b"connection", b"close")
_OURS: Final = frozenset({b"x-request-id", _NO_SNIFFING[0], _HTTPS_FROM_NOW_ON[0]})


class TrustedProxies:
    """The peers whose word about where a request comes from is taken; nobody else's is."""

    def __init__(self, networks: Sequence[Network]) -> None:
        self._networks = networks
        self.trusts = lru_cache(maxsize=_REMEMBERED)(self._trusts)

    def __bool__(self) -> bool:
        return bool(self._networks)

    def _trusts(self, address: str) -> bool:
        """Whether the address is a trusted proxy's."""
        parsed = parse_address(address)
        return parsed is not None and any(parsed in network for network in self._networks)

    def look_behind(self, headers: Iterable[tuple[bytes, bytes]], peer: str) -> tuple[str, str]:
        """The address and the scheme of the request that a trusted peer forwards.

        They are taken from `Forwarded` (RFC 7239) or from `X-Forwarded-For` and `X-Forwarded-Proto`. A proxy usually writes
        one kind and lets the client's own header of the other kind through; so where both are there they must agree, or
        neither counts: the request is then the proxy's own, over plain HTTP.
        """
        kinds = [hops for hops in _forwarded(headers) if hops]
        origins = {self._origin(hops, peer) for hops in kinds}
        return origins.pop() if len(origins) == 1 else (peer, "http")

    def _origin(self, hops: Sequence[_Hop], peer: str) -> tuple[str, str]:
        # Each proxy appends to what it was sent. Read from the right, it can be believed up to the first address that is
        # not a trusted proxy's: that one is the sender, and what stands left of it is only what the sender says.
        address, scheme = peer, "http"
        for hop_address, hop_scheme in reversed(hops):
            scheme = hop_scheme or scheme
            if hop_address is None:
                break
            address = hop_address
            if not self.trusts(address):
                break
        return address, scheme


def parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An IP address; one that is IPv4 mapped into IPv6, in whatever notation, is the IPv4 address."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _forwarded(headers: Iterable[tuple[bytes, bytes]]) -> tuple[list[_Hop], list[_Hop]]:
    """The hops that `Forwarded` tells of, and those that the `X-Forwarded` headers tell of, the nearest last."""
    values: dict[bytes, list[str]] = {b"forwarded": [], b"x-forwarded-for": [], b"x-forwarded-proto": []}
    for name, value in headers:
        if name in values:
            values[name] += value.decode("latin-1").split(",")
    addresses = [_host(text) for text in values[b"x-forwarded-for"]]
    schemes = [text.strip().lower() for text in values[b"x-forwarded-proto"]]
    hops = [
        (address, scheme) for address, scheme in itertools.zip_longest(reversed(addresses), reversed(schemes), fillvalue=None)
    ][::-1]
    return [_forwarded_element(element) for element in values[b"forwarded"]], hops


def _forwarded_element(element: str) -> tuple[str | None, str | None]:
    pairs = {
        name.strip().lower(): value.strip().strip('"')
        for name, _, value in (pair.partition("=") for pair in element.split(";"))
    }
    return _host(pairs.get("for", "")), pairs.get("proto", "").lower() or None


def _host(text: str) -> str | None:
    """The address in `192.0.2.1`, `192.0.2.1:80`, `[2001:db8::1]` or `[2001:db8::1]:80`; ``None`` for anything else."""
    text = text.strip().strip('"')
    return _address(text) if len(text) <= _ADDRESS_MAX else None


@lru_cache(maxsize=_REMEMBERED)
def _address(text: str) -> str | None:
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    address = parse_address(text)
    return str(address) if address is not None else None


class Edge:
    """The outermost ASGI application.

    ``gated`` is an API behind the gate: the paths below the prefix that are not those of an operation are its own.
    """

    def __init__(
        self,
        *,
        operations: Sequence[Operation],
        router: Router,
        proxies: TrustedProxies,
        draining: Draining,
        boot_id: str,
        gated: tuple[str, App] | None = None,
    ) -> None:
        # Most requests are for a path without parameters: a look-up, where a router tries one pattern after the other.
        self._exact: Mapping[tuple[str, str], Operation] = {
            (operation.method, operation.path): operation for operation in operations if "{" not in operation.path
        }
        self._own_paths = frozenset(operation.path for operation in operations)
        self._gated = gated
        self._router = router
        self._proxies = proxies
        self._draining = draining
        self._next_id: Callable[[], int] = itertools.count(1).__next__
        self._boot_id = boot_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or take part in the server's start and stop."""
        if scope["type"] != "http":
            await self._router(scope, receive, send)
            return
        request_id, answers_begun = self._identify(scope), False
        # RFC 6797 7.2: not over plain HTTP, where anybody on the way could have written it.
        marks = [(b"x-request-id", request_id), _NO_SNIFFING]
        if scope["scheme"] == "https":
            marks.append(_HTTPS_FROM_NOW_ON)
        scope["app"] = self  # tells Starlette's router to raise what it refuses, and not to answer it in plain text

        async def send_marked(message: Message) -> None:
            nonlocal answers_begun
            if message["type"] == "http.response.start":
                answers_begun = True
                message = self._marked(message, marks)
            await send(message)

        try:
            if scope["scheme"] != "https":
                await send_problem(HttpsRequired(), Call(scope), send_marked)
                return
            await self._find(scope)(scope, receive, send_marked)
        except HTTPException as refused:  # the router's
            if refused.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
                await send_problem(MethodNotAllowed(), Call(scope), send_marked, [(b"allow", self._allowed(scope["path"]))])
            else:
                await send_problem(NotFound(), Call(scope), send_marked)
        except Exception as mistake:
            # The type and the place, not the message: nobody knows what a message of somebody else's holds.
            log.error(
                "internal_error",
                request_id=request_id.decode(),
                kind=type(mistake).__qualname__,
                at_line=_place(mistake),
            )
            if answers_begun:
                raise
            await send_problem(InternalError(), Call(scope), send_marked)

    def _marked(self, message: Message, marks: list[tuple[bytes, bytes]]) -> Message:
        # A new one, for an API may send its own again; and what we say is said once, by us.
        theirs = [pair for pair in message.get("headers", ()) if pair[0].lower() not in _OURS]
        # RFC 9112 9.6: the sender sends nothing more here, so it cannot send into a connection that we close.
        last = [_LAST_ANSWER] if self._draining.has_begun else []
        return {**message, "headers": theirs + marks + last}

    def _find(self, scope: Scope) -> App:
        path = scope["path"]
        operation = self._exact.get((scope["method"], path))
        if operation is not None:
            return operation
        if self._gated is not None and path.startswith(self._gated[0]) and path not in self._own_paths:
            return self._gated[1]
        return self._router

    def _allowed(self, path: str) -> bytes:
        # Starlette's own answer names the methods of one route; a path may have several.
        routes = [route for route in self._router.routes if isinstance(route, Route) and route.path_regex.match(path)]
        return ", ".join(sorted({method for route in routes for method in route.methods or ()})).encode("ascii")

    def _identify(self, scope: Scope) -> bytes:
        peer = scope["client"][0] if scope.get("client") else ""
        address = peer
        given = None
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                given = value
        if self._proxies:
            trusted = self._proxies.trusts(peer)
            address, scope["scheme"] = self._proxies.look_behind(scope["headers"], peer) if trusted else (peer, "http")
        if given is None or _REQUEST_ID.fullmatch(given) is None:
            given = f"{self._boot_id}-{self._next_id():x}".encode("ascii")
        scope["gatelodge.request_id"] = given.decode("ascii")
        scope["gatelodge.address"] = address
        return given


def _place(mistake: BaseException) -> str:
    trace = mistake.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return ""
    return f"{trace.tb_frame.f_globals.get('__name__')}:{trace.tb_lineno}"
