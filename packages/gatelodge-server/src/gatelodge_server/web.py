"""The web application: what is served of a deployment, put together. The command line does without it."""

import importlib
import os
from collections.abc import Sequence
from typing import Final

from starlette.routing import Route, Router

from gatelodge.gate import App, Gate
from gatelodge_server.app import Lodge, at_work
from gatelodge_server.core.refusals import TooManyRequests
from gatelodge_server.deployment import StartFault
from gatelodge_server.http import problems
from gatelodge_server.http.attempts import Attempts
from gatelodge_server.http.companies import CompanyRoutes
from gatelodge_server.http.edge import Edge, TrustedProxies
from gatelodge_server.http.guard import Guard
from gatelodge_server.http.metadata import MetadataRoutes
from gatelodge_server.http.openapi import pages
from gatelodge_server.http.operation import Operation
from gatelodge_server.http.reach import ReachReport
from gatelodge_server.http.registration import RegistrationRoutes
from gatelodge_server.http.revocations import RevocationRoutes
from gatelodge_server.http.sessions import SessionRoutes
from gatelodge_server.http.turnstile import log_refusal

_API_PREFIX: Final = "/api/v2/Partners/"
"""Whatever is below it and is no call of the service itself belongs to the API behind the gate."""


def operations_of(lodge: Lodge) -> Sequence[Operation]:
    """Everything that is served, in the order of the documentation."""
    guard = Guard(lodge.verifier)
    settings = lodge.settings
    attempts = Attempts(settings.login_failure_limit)
    reach = ReachReport(revocations=lodge.revocations, draining=lodge.draining)
    registration = RegistrationRoutes(
        reach=reach,
        registrations=lodge.registrations,
        quotas=lodge.quotas,
        guard=guard,
        requests=Attempts(settings.registration_limit, refusal=TooManyRequests),
        failures=Attempts(settings.verification_failure_limit),
    )
    return [
        *registration.operations(registration=settings.registration == "on"),
        *SessionRoutes(sessions=lodge.sessions, guard=guard, attempts=attempts, reach=reach).operations(),
        *CompanyRoutes(companies=lodge.companies, guard=guard, reach=reach).operations(),
        *RevocationRoutes(
            revocations=lodge.revocations,
            draining=lodge.draining,
            issuer=settings.public_url,
            environment=settings.environment,
        ).operations(),
        *MetadataRoutes(
            store=lodge.store,
            signing_keys=lodge.signing_keys,
            access_keys=lodge.access_keys,
            follower=lodge.follower,
            draining=lodge.draining,
        ).operations(),
    ]


def gate_before(app: App, lodge: Lodge) -> Gate:
    """The gate of this deployment in front of an API."""
    return Gate(app, verifier=lodge.verifier, count=lodge.turnstile, on_refused=log_refusal)


def web_app(lodge: Lodge) -> Edge:
    """The ASGI application of the service, and of the sample API behind its gate if that was asked for."""
    operations = operations_of(lodge)
    described = pages(
        operations,
        details=problems.details(),
        environment=lodge.settings.environment,
        public_url=lodge.settings.public_url,
    )

    routes = [Route(operation.path, operation, methods=[operation.method]) for operation in operations]
    routes += [Route(page.path, page, methods=["GET"]) for page in described]
    return Edge(
        operations=operations,
        router=Router(routes, redirect_slashes=False, lifespan=lambda _: at_work(lodge)),
        proxies=TrustedProxies(lodge.settings.behind_proxy),
        draining=lodge.draining,
        gated=(_API_PREFIX, gate_before(_sample_api(), lodge)) if lodge.settings.sample_api == "on" else None,
        boot_id=os.urandom(6).hex(),
    )


def _sample_api() -> App:
    # An example and no part of this distribution: only whoever asks for it needs it.
    try:
        module = importlib.import_module("plans_api.app")
    except ImportError as fault:
        raise StartFault("--sample-api needs the sample API: install examples/plans_api") from fault
    app: App = module.app
    return app
