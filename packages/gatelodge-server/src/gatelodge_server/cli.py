"""The command line: the commands for partners, keys and companies, and those that look after the whole.

``commands.py`` says how a command is made; ``commands_tokens.py`` has those for access tokens and
signing keys, ``commands_tiers.py`` those for tiers, ``commands_database.py`` those for the database.
"""

import functools
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from gatelodge_server import commands_database, commands_tiers, commands_tokens  # noqa: F401 - so their commands are there
from gatelodge_server.commands import (
    BY,
    GROUPS,
    DatabaseFlag,
    DataFlag,
    EnvironmentFlag,
    JsonFlag,
    KeyId,
    PartnerId,
    Record,
    WaitFlag,
    app,
    command,
    duration_of,
    instant_of,
    line_of,
    option,
    reach_of,
    refuse,
    seconds_of,
    settings_or_exit,
    show,
    slug,
    when,
)
from gatelodge_server.core.credentials import credential_status
from gatelodge_server.core.model import Company, Credential, Instant, Partner
from gatelodge_server.core.partners import DEFAULT_TIER, NewPartner
from gatelodge_server.log import configure_log, log
from gatelodge_server.settings import OPTIONS

if TYPE_CHECKING:
    from gatelodge_server.app import Lodge
    from gatelodge_server.serve import Started

_PAGE: Final = 200


# --- partners -------------------------------------------------------------------------------------------------------------


def _partner_record(partner: Partner) -> Record:
    return {
        "partnerId": partner.id,
        "name": partner.name,
        "contactEmail": partner.contact_email,
        "tier": partner.tier,
        "status": partner.status.value,
        "origin": partner.origin.value,
        "createdAt": when(partner.created_at),
    }


@command(GROUPS["partner"], "add")
async def partner_add(
    lodge: "Lodge",
    name: Annotated[str, typer.Argument(metavar="NAME", help="the organisation's name", parser=line_of("Name"))],
    email: Annotated[str, typer.Option(help="whom to write to", parser=line_of("Email"))],
    id: Annotated[str | None, typer.Option(help="its id; made from the name unless given", parser=slug)] = None,  # noqa: A002
    tier: Annotated[str, typer.Option(help="its tier")] = DEFAULT_TIER,
) -> Record:
    """Add a partner. Prints its id and its API key, which is shown this once."""
    partner, key = await lodge.partners.add(NewPartner(str(name), str(email), tier, id), by=BY)
    return {"partnerId": partner.id, "apiKey": key.text.reveal(), "tier": partner.tier}


@command(GROUPS["partner"], "list")
async def partner_list(lodge: "Lodge") -> Sequence[Record]:
    """All partners."""
    return [_partner_record(partner) for partner in await lodge.partners.list_all()]


@command(GROUPS["partner"], "show")
async def partner_show(lodge: "Lodge", partner: PartnerId) -> Record:
    """One partner: with what it may use, and with what it said when it registered itself."""
    found = await lodge.partners.get(partner)
    (tier,) = [tier for tier in await lodge.tiers.list_all() if tier.name == found.tier]
    return {
        **_partner_record(found),
        "requestsPerHour": tier.requests_per_hour,
        "requestsPerDay": tier.requests_per_day,
        "organizationName": found.organization_name,
        "websiteUrl": found.website_url,
        "intendedUse": found.intended_use,
        "agreedAt": when(found.agreed_at),
    }


@command(GROUPS["partner"], "suspend")
async def partner_suspend(lodge: "Lodge", partner: PartnerId, wait: WaitFlag = "0s") -> Record:
    """Refuse a partner and its companies until it is resumed. Its sessions end for good."""
    seconds = seconds_of(wait)
    sequence = await lodge.partners.suspend(partner, by=BY)
    return {"partnerId": partner, "status": "suspended", **await reach_of(lodge, sequence, seconds)}


@command(GROUPS["partner"], "resume")
async def partner_resume(lodge: "Lodge", partner: PartnerId, wait: WaitFlag = "0s") -> Record:
    """Let a suspended partner in again."""
    seconds = seconds_of(wait)
    sequence = await lodge.partners.resume(partner, by=BY)
    return {"partnerId": partner, "status": "active", **await reach_of(lodge, sequence, seconds)}


@command(GROUPS["partner"], "deactivate")
async def partner_deactivate(lodge: "Lodge", partner: PartnerId, wait: WaitFlag = "0s") -> Record:
    """End a partner, its companies, keys and sessions, for good."""
    seconds = seconds_of(wait)
    sequence = await lodge.partners.deactivate(partner, by=BY)
    return {"partnerId": partner, "status": "deactivated", **await reach_of(lodge, sequence, seconds)}


# --- keys -----------------------------------------------------------------------------------------------------------------


def _key_record(key: Credential, now: Instant) -> Record:
    return {
        "keyId": key.id,
        "masked": key.masked,
        "companyId": str(key.company_id) if key.company_id else None,
        "status": credential_status(key, now),
        "createdAt": when(key.created_at),
        "endsAt": when(key.ends_at),
        "lastUsedAt": when(key.last_used_at),
    }


@command(GROUPS["key"], "list")
async def key_list(lodge: "Lodge", partner: PartnerId) -> Sequence[Record]:
    """The API keys of a partner and of its companies, newest first."""
    now = lodge.clock()
    return [_key_record(key, now) for key in await lodge.credentials.list_for(partner)]


@command(GROUPS["key"], "rotate")
async def key_rotate(
    lodge: "Lodge",
    key: KeyId,
    overlap: Annotated[str, typer.Option(help="for how long the old key works on, such as 1h")] = "0s",
    wait: WaitFlag = "0s",
) -> Record:
    """Replace an API key. Prints the new one, which is shown this once; sessions of the old one end with it."""
    seconds = seconds_of(wait)
    issued = await lodge.credentials.rotate(key, overlap=duration_of(overlap), by=BY)
    reach = await reach_of(lodge, issued.sequence, seconds)
    return {"keyId": issued.credential.id, "apiKey": issued.text.reveal(), **reach}


@command(GROUPS["key"], "revoke")
async def key_revoke(lodge: "Lodge", key: KeyId, wait: WaitFlag = "0s") -> Record:
    """End an API key and every session that it started."""
    seconds = seconds_of(wait)
    sequence = await lodge.credentials.revoke(key, by=BY)
    return {"keyId": key, "status": "revoked", **await reach_of(lodge, sequence, seconds)}


# --- companies ------------------------------------------------------------------------------------------------------------


def _company_record(company: Company) -> Record:
    details = company.details
    return {
        "companyId": str(company.id),
        "companyName": details.company_name,
        "country": details.country,
        "taxNumber": details.tax_number,
        "createdAt": when(company.created_at),
    }


@command(GROUPS["company"], "list")
async def company_list(lodge: "Lodge", partner: PartnerId) -> Sequence[Record]:
    """The companies of a partner, newest first."""
    await lodge.partners.get(partner)
    found: list[Company] = []
    while True:
        before = found[-1].id if found else None
        page = await lodge.companies.list_page(partner, before=before, limit=_PAGE)
        found += page
        if len(page) < _PAGE:
            return [_company_record(company) for company in found]


# --- the trail, the whole -------------------------------------------------------------------------------------------------


@command(app, "audit")
async def audit(
    lodge: "Lodge",
    partner: Annotated[str | None, typer.Option(help="only what concerns this partner")] = None,
    since: Annotated[str | None, typer.Option(help="only from this time on, such as 2026-06-26T07:56:42+00:00")] = None,
) -> Sequence[Record]:
    """What was done, when and by whom, oldest first."""
    if partner is not None:
        await lodge.partners.get(partner)
    events = await lodge.store.list_audit(partner_id=partner, since=instant_of(since) if since else None)
    return [
        {
            "sequence": event.sequence,
            "at": when(event.at),
            "action": event.action,
            "actor": event.actor,
            "partnerId": event.partner_id,
            "subject": event.subject,
            "detail": event.detail,
        }
        for event in events
    ]


@app.command("doctor")
def doctor(
    *,
    data: DataFlag = None,
    database: DatabaseFlag = None,
    environment: EnvironmentFlag = None,
    json_output: JsonFlag = False,
) -> None:
    """Look for whatever would keep the service from working, without changing anything."""
    settings = settings_or_exit({"data": data, "database": database, "environment": environment})
    from gatelodge_server.doctor import examine  # noqa: PLC0415

    findings = examine(settings, os.environ)
    show([finding.record() for finding in findings], json_output=json_output)
    if not all(finding.fine for finding in findings):
        raise typer.Exit(1)


@app.command("serve")
def serve_command(
    *,
    host: Annotated[str | None, option("host")] = None,
    port: Annotated[str | None, option("port")] = None,
    workers: Annotated[str | None, option("workers")] = None,
    tls_cert: Annotated[str | None, option("tls_cert")] = None,
    tls_key: Annotated[str | None, option("tls_key")] = None,
    behind_proxy: Annotated[list[str] | None, option("behind_proxy")] = None,
    sample_api: Annotated[bool, typer.Option("--sample-api", help="serve the sample partner API behind the gate")] = False,
    data: DataFlag = None,
    database: DatabaseFlag = None,
    environment: EnvironmentFlag = None,
    json_output: JsonFlag = False,
) -> None:
    """Serve, over HTTPS, until told to stop."""
    settings = settings_or_exit(
        {
            "host": host,
            "port": port,
            "workers": workers,
            "tls_cert": tls_cert,
            "tls_key": tls_key,
            "behind_proxy": ",".join(behind_proxy) if behind_proxy else None,
            "sample_api": "on" if sample_api else None,
            "data": data,
            "database": database,
            "environment": environment,
        }
    )
    from gatelodge_server.deployment import StartFault  # noqa: PLC0415
    from gatelodge_server.serve import WebApp, serve  # noqa: PLC0415
    from gatelodge_server.vault import MasterKeyFault  # noqa: PLC0415

    try:
        if json_output:
            serve(settings, _announce_json)
        else:
            serve(settings, _announce, web_app_of=functools.partial(WebApp, show_mail=_show_mail))
    except (StartFault, MasterKeyFault) as fault:
        refuse(str(fault))


def _announce_json(started: "Started") -> None:
    authority = started.certificate.authority if started.certificate is not None else None
    address = {"url": started.settings.public_url, "port": started.settings.port}
    show({**address, "authority": str(authority) if authority else None}, json_output=True)
    sys.stdout.flush()


def _show_mail(text: str) -> None:
    sys.stdout.write(f"\n--- a mail, kept in the outbox ---\n{text}\n---\n")
    sys.stdout.flush()


def _announce(started: "Started") -> None:
    settings, certificate = started.settings, started.certificate
    program = shlex.quote(os.path.relpath(sys.argv[0]))
    where = "" if settings.data == Path(OPTIONS["data"].default) else f" --data {shlex.quote(str(settings.data))}"
    if str(settings.database) != str(settings.data / "gatelodge.db"):
        where += f" --database {shlex.quote(settings.database.url)}"
    trust = f"--cacert {shlex.quote(str(certificate.authority))} " if certificate and certificate.authority else ""
    json_field = r"""sed 's/.*"%s": *"\([^"]*\)".*/\1/'"""
    from rich.console import Console  # noqa: PLC0415

    say = Console(soft_wrap=True, highlight=False, markup=False, emoji=False).print
    say(f"Gatelodge ({settings.environment}) is up: {settings.public_url}  (documentation: {settings.public_url}/docs)")
    if certificate is None:
        say(f"It takes plain HTTP on {settings.host} port {settings.port}, from its trusted proxies only.")
    say("\nFrom here to the first good call, in another terminal:\n")
    say(f'  KEY=$({program} partner add "Acme Motors" --email dev@acme.example --json{where} | {json_field % "apiKey"})')
    say(
        f"  JWT=$(curl -s {trust}{settings.public_url}/auth/login -H 'Content-Type: application/json' "
        f"-d '{{\"apiKey\":\"'$KEY'\"}}' | {json_field % 'jwt'})"
    )
    say(f'  curl {trust}{settings.public_url}/companies -H "R-Auth: $JWT"\n')
    if settings.sample_api == "on":
        say("And to the sample API behind the gate:\n")
        say(f"  TOKEN=$({program} token issue acme-motors --json{where} | {json_field % 'token'})")
        say(
            f"  curl {trust}-X POST {settings.public_url}/api/v2/Partners/PlansSearchAsync/VIN "
            '-H "Authorization: Bearer $TOKEN" -H "Content-Type: application/json" '
            """-d '{"searchCriteria":{"vin":"1HGBH41JXMN109186","mileage":55555,"stateShortName":"TX"}}'\n"""
        )
    sys.stdout.flush()


def _show_version(wanted: bool) -> None:  # noqa: FBT001 - as typer calls it
    if wanted:
        print(f"gatelodge {version('gatelodge-server')}")  # noqa: T201
        raise typer.Exit


@app.callback()
def everywhere(
    *,
    _version: Annotated[
        bool, typer.Option("--version", help="say which version this is", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """The lodge at the gate of a partner API."""


def main() -> None:
    """Run the command line."""
    os.umask(0o077)  # the database, its log and the keys are nobody else's to read
    log.before_first_line = configure_log
    app()
