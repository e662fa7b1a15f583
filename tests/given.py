"""What tests of the server's inside are given: clocks that stand still, and the things of the domain, ready made."""

import os
from dataclasses import replace

from gatelodge.wire import BASE62
from gatelodge_server.core.ids import company_id, uuid7
from gatelodge_server.core.model import (
    DAY,
    MINUTE,
    AccessToken,
    Company,
    CompanyDetails,
    Credential,
    MailKind,
    Origin,
    Partner,
    PartnerStatus,
    SigningKey,
)
from gatelodge_server.core.ports import Confirmation, LoginAttempt, Mail, RefreshAttempt, Registration, Replay

START = 1_780_000_000_000
"""When the tests' world begins."""
WEEK = 7 * DAY
AROUND = (-1, 0, 1)
"""A boundary is looked at from both sides and from on top of it."""


class Clock:
    """A wall clock that stands still until it is moved; it counts how often it was read."""

    def __init__(self, now=START):
        self.now = now
        self.reads = 0

    def __call__(self):
        self.reads += 1
        return self.now

    def forward(self, milliseconds):
        self.now += milliseconds


def changed(thing, **changes):
    """A copy of a frozen thing with some fields changed."""
    return thing._replace(**changes) if isinstance(thing, tuple) else replace(thing, **changes)


def base62(length):
    return "".join(BASE62[byte % len(BASE62)] for byte in os.urandom(length))


def a_partner(id="acme-motors", **changes):  # noqa: A002 - the field's name
    partner = Partner(
        id=id,
        name="Acme Motors",
        contact_email="dev@acme.example",
        tier="starter",
        status=PartnerStatus.ACTIVE,
        origin=Origin.MANAGED,
        created_at=START,
    )
    return changed(partner, **changes)


def a_key(partner_id="acme-motors", company_id=None, created_at=START):
    id_ = base62(12)
    kind = "pk" if company_id is None else "ck"
    masked = f"gatelodge_uat_{kind}_{id_}_…"
    return Credential(id_, kind, partner_id, company_id, os.urandom(32), masked, created_at)


def a_token(kid, partner_id="acme-motors", **changes):
    """The first version of an access token that the signing key ``kid`` has signed."""
    id_ = base62(22)
    token = AccessToken(id_, id_, 1, partner_id, "Plans", kid, os.urandom(32), START)
    return changed(token, **changes)


def next_version(token, **changes):
    """What takes the place of ``token`` when it is rotated."""
    replacement = a_token(token.kid, token.partner_id, lineage_id=token.lineage_id, version=token.version + 1)
    return changed(replacement, label=token.label, **changes)


def a_company(partner_id="acme-motors", *, created_at=START, **details):
    filled = {"company_name": "Müller GmbH", "country": "DE", "tax_number": base62(11)} | details
    return Company(company_id(created_at, os.urandom), partner_id, CompanyDetails(**filled), created_at)


def a_login(key, *, now=START, **changes):
    attempt = LoginAttempt(key.id, key.digest, uuid7(now, os.urandom), now, now + WEEK, now + 4 * WEEK)
    return changed(attempt, **changes)


def a_refresh(session, *, now=START, **changes):
    """A refresh with the present token of ``session``; ``generation`` may be another."""
    return changed(RefreshAttempt(session.id, session.generation, None, now, now + WEEK), **changes)


def a_replay(*, readable_until=START + DAY, **changes):
    return changed(Replay(os.urandom(32), os.urandom(32), os.urandom(60), readable_until), **changes)


def a_mail(kind=MailKind.VERIFICATION, *, created_at=START, **changes):
    facts = {"displayName": "Acme Motors", "organizationName": "Acme Motors Inc"}
    id_ = uuid7(created_at, os.urandom)
    return changed(Mail(id_, kind, "dev@acme.example", facts, None, created_at, created_at + 10 * MINUTE), **changes)


def a_signing_key(kid=None, *, published_at=START, **changes):
    return changed(SigningKey(kid or base62(43), '{"kty":"EC"}', os.urandom(60), published_at), **changes)


def a_registration(address="dev@acme.example", *, now=START, **changes):
    registration = Registration(
        address=address,
        contact_email=address,
        display_name="Acme Motors",
        organization_name=None,
        website_url="https://acme.example/",
        intended_use="to sell",
        salt=os.urandom(16),
        digest=os.urandom(32),
        now=now,
        expires_at=now + 10 * MINUTE,
        mail_id=uuid7(now, os.urandom),
        mail_secret=b"sealed code",
    )
    return changed(registration, **changes)


def a_confirmation(challenge, address="dev@acme.example", *, now=START, **changes):
    """That a claimed code was right."""
    confirmation = Confirmation(
        address=address,
        challenge=challenge,
        candidates=("acme-motors", "acme-motors-2", "acme-motors-3"),
        tier="starter",
        key=a_key(""),
        sealed=b"sealed key",
        now=now,
    )
    return changed(confirmation, **changes)
