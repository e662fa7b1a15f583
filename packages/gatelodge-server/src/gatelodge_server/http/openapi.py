"""`/openapi.json` (OpenAPI 3.1) and `/docs`, both made from the table of operations."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import msgspec
from jinja2 import Environment, FileSystemLoader, select_autoescape

from gatelodge.errors import AmbiguousCredentials, BodyTooLarge, MalformedJson, MalformedRequest, UnsupportedMediaType
from gatelodge_server.http.fields import schema_of
from gatelodge_server.http.operation import Operation, Receive, Scope, Send, send_bytes
from gatelodge_server.http.problems import STATUSES, InvalidFields, Problem

_SCHEMA: Final = "#/components/schemas/{name}"
_BODY_FAULTS: Final = (MalformedRequest, MalformedJson, BodyTooLarge, UnsupportedMediaType, InvalidFields)
_TEMPLATES: Final = Path(__file__).with_name("templates")


def describe(operations: Sequence[Operation], *, environment: str, public_url: str) -> dict[str, Any]:
    """The OpenAPI document."""
    types: set[type[msgspec.Struct]] = {Problem}
    for operation in operations:
        types |= {t for t in (operation.body, *operation.answers.values()) if t is not None}
    ordered = sorted(types, key=lambda t: t.__name__)
    _, schemas = msgspec.json.schema_components(ordered, schema_hook=schema_of, ref_template=_SCHEMA)
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"Gatelodge ({environment})",
            "version": version("gatelodge-server"),
            "description": (
                "Partners register themselves for an API key, or are given one, or an access token. Each of them, and the "
                "session JWT that a key is exchanged for, is let in at the gate before the API; what is used of the quota is "
                "counted there. Partners have companies with API keys of their own."
            ),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": public_url}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key, a session JWT or, at the gate before the API, an access token.",
                },
                "rAuth": {"type": "apiKey", "in": "header", "name": "R-Auth", "description": "The same, in `R-Auth`."},
            },
        },
    }


def _operation(operation: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": f"{operation.method.lower()}{operation.path.title()}".translate(str.maketrans("", "", "/{}.-_")),
        "tags": [operation.tag],
        "summary": operation.summary,
        "description": _description(operation),
        "parameters": _parameters(operation),
        "responses": {
            **{str(status): _answer(status, body) for status, body in operation.answers.items()},
            **_refusals(operation),
        },
    }
    if operation.body is not None:
        schema = {"$ref": _SCHEMA.format(name=operation.body.__name__)}
        content = {"application/json": {"schema": schema}}
        described["requestBody"] = {"required": not operation.body_optional, "content": content}
    if operation.credential is not None:
        described["security"] = [{"bearer": []}, {"rAuth": []}]
        if operation.credential_optional:
            described["security"].append({})
    return described


def _description(operation: Operation) -> str:
    """What an operation does, and which of the credentials it takes: that a scheme cannot say."""
    description = operation.description or f"{operation.summary}."
    return description if operation.credential is None else f"{description} Needs: {operation.credential}."


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    names = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    found: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
    ]
    found += [
        {"name": name, "in": "query", "description": meaning, "schema": {"type": "string"}}
        for name, meaning in operation.parameters.items()
    ]
    if operation.idempotent_by_key:
        schema = {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"}
        meaning = "Lets a request whose answer got lost be sent again."
        found.append({"name": "Idempotency-Key", "in": "header", "description": meaning, "schema": schema})
    return found


def _answer(status: int, body: type[msgspec.Struct] | None) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": HTTPStatus(status).phrase}
    if body is not None:
        answer["content"] = {"application/json": {"schema": {"$ref": _SCHEMA.format(name=body.__name__)}}}
    return answer


def _refusals(operation: Operation) -> dict[str, Any]:
    refusals = [*operation.refusals, *(_BODY_FAULTS if operation.body is not None else ())]
    if operation.credential is not None:
        refusals.append(AmbiguousCredentials)
    if operation.parameters and operation.body is None:
        refusals.append(InvalidFields)
    by_status: dict[int, list[str]] = {}
    for refusal in refusals:
        code: str = getattr(refusal, "code")  # noqa: B009 - each has one, no common base says so
        by_status.setdefault(STATUSES[code], []).append(code)
    content = {"application/problem+json": {"schema": {"$ref": _SCHEMA.format(name=Problem.__name__)}}}
    return {
        str(status): {"description": ", ".join(f"`{code}`" for code in sorted(codes)), "content": content}
        for status, codes in sorted(by_status.items())
    }


_CACHED: Final = ((b"cache-control", b"public, max-age=300"),)
_POLICY: Final = b"default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


@dataclass(frozen=True, slots=True)
class Page:
    """Something that is the same for everybody, made once. An ASGI application."""

    path: str
    content: bytes
    headers: Sequence[tuple[bytes, bytes]]

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Serve it."""
        await send_bytes(send, HTTPStatus.OK, self.content, [*self.headers, *_CACHED])


def pages(operations: Sequence[Operation], *, details: Mapping[str, str], environment: str, public_url: str) -> Sequence[Page]:
    """`/openapi.json`, and `/docs`, which shows it to people: one page, no script, nothing from elsewhere.

    ``details`` says of each problem code what to do.
    """
    document = describe(operations, environment=environment, public_url=public_url)
    templates = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=select_autoescape(), trim_blocks=True, lstrip_blocks=True
    )
    problems = [(code, STATUSES[code], detail) for code, detail in sorted(details.items())]
    html = templates.get_template("docs.html").render(document=document, problems=problems, public_url=public_url)
    return [
        Page("/openapi.json", json.dumps(document, ensure_ascii=False).encode(), [(b"content-type", b"application/json")]),
        Page(
            "/docs",
            html.encode(),
            [(b"content-type", b"text/html; charset=utf-8"), (b"content-security-policy", _POLICY)],
        ),
    ]
