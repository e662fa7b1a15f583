"""The commands of the contract: tables for people, ``--json`` in the wire's field names for programs.

Each command is a coroutine over a ``Lodge``; ``command`` gives it the options that all of them take, opens the lodge and turns
a refusal into one line on standard error. Exit code 0: done; 1: refused; 2: used wrongly.
"""

import asyncio
import inspect
import json
import os
import shlex
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gatelodge.errors import Rejected, Unavailable
from gatelodge_server.app import Lodge, StartFault, assemble, load_master_keys, prepare, slug_of
from gatelodge_server.core.model import SECOND, Company, Credential, Instant, Partner
from gatelodge_server.core.partners import DEFAULT_TIER, NewPartner
from gatelodge_server.core.refusals import Refusal
from gatelodge_server.doctor import examine
from gatelodge_server.http.fields import Email, Line, Name
from gatelodge_server.http.sessions import rfc3339
from gatelodge_server.log import configure_log
from gatelodge_server.serve import Started, serve
from gatelodge_server.settings import OPTIONS, Settings, SettingsFault, load_settings, parse_duration
from gatelodge_server.store.migrate import HEAD
from gatelodge_server.vault import MasterKeyFault, Vault, system_entropy

_BY: Final = "command line"
_PAGE: Final = 200
_WIDE: Final = 240
"""Columns of a table that goes into a pipe or a file: nothing is cut off there."""

Record = Mapping[str, object]
Work = Callable[..., Awaitable[Record | Sequence[Record]]]

app = typer.Typer(
    name="gatelodge", help="The lodge at the gate of a partner API.", no_args_is_help=True, pretty_exceptions_enable=False
)
_groups: Final = {
    name: typer.Typer(help=text, no_args_is_help=True)
    for name, text in (
        ("partner", "Organisations that call the API."),
        ("key", "API keys of partners and of their companies."),
        ("company", "Customers that a partner manages."),
        ("signing-key", "Keys that sign session JWTs."),
        ("database", "Where everything is kept."),
    )
}
for _name, _group in _groups.items():
    app.add_typer(_group, name=_name)


def _option(name: str) -> Any:  # noqa: ANN401 - what typer wants in a signature
    return typer.Option(help=OPTIONS[name].meaning, show_default=False)


DataFlag = Annotated[str | None, _option("data")]
DatabaseFlag = Annotated[str | None, _option("database")]
EnvironmentFlag = Annotated[str | None, _option("environment")]
JsonFlag = Annotated[bool, typer.Option("--json", help="answer in JSON")]
_COMMON: Final[Mapping[str, Any]] = {
    "data": DataFlag,
    "database": DatabaseFlag,
    "environment": EnvironmentFlag,
    "json_output": JsonFlag,
}


def command(group: typer.Typer, name: str, *, context: Mapping[str, Any] | None = None) -> Callable[[Work], Work]:
    """Make a command of a coroutine ``work(lodge, …)`` that returns a record, or several. ``context``: settings of click's."""

    def decorate(work: Work) -> Work:
        def run(**given: Any) -> None:  # noqa: ANN401 - typer calls it by the signature below
            json_output = given.pop("json_output")
            settings = settings_or_exit({flag: given.pop(flag) for flag in _COMMON if flag in given})
            show(_in_lodge(settings, lambda lodge: work(lodge, **given)), json_output=json_output)

        own = list(inspect.signature(work).parameters.values())[1:]
        common = [
            inspect.Parameter(
                flag, inspect.Parameter.KEYWORD_ONLY, default=False if flag == "json_output" else None, annotation=annotation
            )
            for flag, annotation in _COMMON.items()
        ]
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own] + common
        )
        group.command(name, help=inspect.getdoc(work), context_settings=dict(context or {}))(run)
        return work

    return decorate


def settings_or_exit(flags: Mapping[str, str | None]) -> Settings:
    """The settings; one line on standard error for each fault, and exit code 2."""
    try:
        return load_settings(flags, os.environ)
    except SettingsFault as fault:
        for line in fault.faults:
            print(line, file=sys.stderr)  # noqa: T201 - this is a command line
        raise typer.Exit(2) from None


def _in_lodge(settings: Settings, work: Callable[[Lodge], Awaitable[Record | Sequence[Record]]]) -> Record | Sequence[Record]:
    async def run() -> Record | Sequence[Record]:
        prepare(settings, os.environ)
        lodge = assemble(settings, Vault(load_master_keys(settings, os.environ), system_entropy))
        try:
            await lodge.signing_keys.establish()
            await lodge.access_keys.establish()
            return await work(lodge)
        finally:
            await lodge.close()

    try:
        return asyncio.run(run())
    except (Rejected, Refusal, Unavailable, StartFault, MasterKeyFault) as refused:
        refuse(str(refused))


def refuse(reason: str) -> NoReturn:
    """One line on standard error, and exit code 1."""
    print(reason, file=sys.stderr)  # noqa: T201
    raise typer.Exit(1)


def show(answer: Record | Sequence[Record], *, json_output: bool) -> None:
    """Print an answer: as JSON, or as a table that a person can read. Keys are shown whole: they are shown this once."""
    if json_output:
        print(json.dumps(answer, ensure_ascii=False))  # noqa: T201
        return
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else _WIDE)
    if isinstance(answer, Mapping):
        table = Table.grid(padding=(0, 2))
        for name, value in answer.items():
            table.add_row(Text(name, style="bold"), _text(value))
    else:
        columns = list(dict.fromkeys(name for record in answer for name in record))
        table = Table(*columns, box=None, header_style="bold", pad_edge=False)
        for record in answer:
            table.add_row(*(_text(record.get(name)) for name in columns))
        if not answer:
            console.print("none")
            return
    console.print(table)


def _text(value: object) -> Text:
    return Text("-" if value is None else str(value))  # and not a string, which would be read as markup


def _when(instant: Instant | None) -> str | None:
    return None if instant is None else rfc3339(instant)


def _instant(text: str) -> Instant:
    try:
        moment = datetime.fromisoformat(text)
        return int((moment if moment.tzinfo else moment.astimezone()).timestamp() * SECOND)
    except (ValueError, OverflowError):  # the latter where a time zone leads out of the calendar
        raise typer.BadParameter("must be a time such as 2026-06-26T07:56:42+00:00") from None


def _duration(text: str) -> int:
    try:
        return parse_duration(text)
    except ValueError as fault:
        raise typer.BadParameter(str(fault)) from None


def _line(kind: type[Line]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        try:
            return kind.parse(text)
        except ValueError as fault:
            raise typer.BadParameter(str(fault)) from None

    return parse


def _slug(text: str) -> str:
    if not text or slug_of(text) != text:
        raise typer.BadParameter("must be lower-case letters, digits and single hyphens, 48 at most")
    return text


PartnerId = Annotated[str, typer.Argument(metavar="PARTNER", help="the partner's id")]
KeyId = Annotated[str, typer.Argument(metavar="KEY_ID", help="the key's id, as `key list` shows it")]


# --- partners -------------------------------------------------------------------------------------------------------------


def _partner_record(partner: Partner) -> Record:
    return {
        "partnerId": partner.id,
        "name": partner.name,
        "contactEmail": partner.contact_email,
        "tier": partner.tier,
        "status": partner.status.value,
        "origin": partner.origin.value,
        "createdAt": rfc3339(partner.created_at),
    }


@command(_groups["partner"], "add")
async def partner_add(
    lodge: Lodge,
    name: Annotated[str, typer.Argument(metavar="NAME", help="the organisation's name", parser=_line(Name))],
    email: Annotated[str, typer.Option(help="whom to write to", parser=_line(Email))],
    id: Annotated[str | None, typer.Option(help="its id; made from the name unless given", parser=_slug)] = None,  # noqa: A002
    tier: Annotated[str, typer.Option(help="its tier")] = DEFAULT_TIER,
) -> Record:
    """Add a partner. Prints its id and its API key, which is shown this once."""
    partner, key = await lodge.partners.add(NewPartner(str(name), str(email), tier, id), by=_BY)
    return {"partnerId": partner.id, "apiKey": key.text.reveal(), "tier": partner.tier}


@command(_groups["partner"], "list")
async def partner_list(lodge: Lodge) -> Sequence[Record]:
    """All partners."""
    return [_partner_record(partner) for partner in await lodge.partners.list_all()]


@command(_groups["partner"], "show")
async def partner_show(lodge: Lodge, partner: PartnerId) -> Record:
    """One partner."""
    return _partner_record(await lodge.partners.get(partner))


@command(_groups["partner"], "suspend")
async def partner_suspend(lodge: Lodge, partner: PartnerId) -> Record:
    """Refuse a partner and its companies until it is resumed. Its sessions end for good."""
    return {"partnerId": partner, "status": "suspended", "sequence": await lodge.partners.suspend(partner, by=_BY)}


@command(_groups["partner"], "resume")
async def partner_resume(lodge: Lodge, partner: PartnerId) -> Record:
    """Let a suspended partner in again."""
    return {"partnerId": partner, "status": "active", "sequence": await lodge.partners.resume(partner, by=_BY)}


@command(_groups["partner"], "deactivate")
async def partner_deactivate(lodge: Lodge, partner: PartnerId) -> Record:
    """End a partner, its companies, keys and sessions, for good."""
    sequence = await lodge.partners.deactivate(partner, by=_BY)
    return {"partnerId": partner, "status": "deactivated", "sequence": sequence}


# --- keys -----------------------------------------------------------------------------------------------------------------


def _key_record(key: Credential, now: Instant) -> Record:
    ended = key.ends_at is not None and now >= key.ends_at
    return {
        "keyId": key.id,
        "masked": key.masked,
        "companyId": str(key.company_id) if key.company_id else None,
        "status": (key.end_cause.value if key.end_cause and ended else "active"),
        "createdAt": rfc3339(key.created_at),
        "endsAt": _when(key.ends_at),
    }


@command(_groups["key"], "list")
async def key_list(lodge: Lodge, partner: PartnerId) -> Sequence[Record]:
    """The API keys of a partner and of its companies, newest first."""
    now = lodge.clock()
    return [_key_record(key, now) for key in await lodge.credentials.list_for(partner)]


@command(_groups["key"], "rotate")
async def key_rotate(
    lodge: Lodge,
    key: KeyId,
    overlap: Annotated[str, typer.Option(help="for how long the old key works on, such as 1h")] = "0s",
) -> Record:
    """Replace an API key. Prints the new one, which is shown this once; sessions of the old one end with it."""
    issued = await lodge.credentials.rotate(key, overlap=_duration(overlap), by=_BY)
    return {"keyId": issued.credential.id, "apiKey": issued.text.reveal()}


@command(_groups["key"], "revoke")
async def key_revoke(lodge: Lodge, key: KeyId) -> Record:
    """End an API key and every session that it started."""
    return {"keyId": key, "status": "revoked", "sequence": await lodge.credentials.revoke(key, by=_BY)}


# --- companies ------------------------------------------------------------------------------------------------------------


def _company_record(company: Company) -> Record:
    details = company.details
    return {
        "companyId": str(company.id),
        "companyName": details.company_name,
        "country": details.country,
        "taxNumber": details.tax_number,
        "createdAt": rfc3339(company.created_at),
    }


@command(_groups["company"], "list")
async def company_list(lodge: Lodge, partner: PartnerId) -> Sequence[Record]:
    """The companies of a partner, newest first."""
    await lodge.partners.get(partner)
    found: list[Company] = []
    while True:
        before = found[-1].id if found else None
        page = await lodge.companies.list_page(partner, before=before, limit=_PAGE)
        found += page
        if len(page) < _PAGE:
            return [_company_record(company) for company in found]


# --- signing keys ---------------------------------------------------------------------------------------------------------


@command(_groups["signing-key"], "list")
async def signing_key_list(lodge: Lodge) -> Sequence[Record]:
    """The keys that sign session JWTs, oldest first."""
    now = lodge.clock()
    return [
        {
            "kid": key.kid,
            "state": key.state(now),
            "publishedAt": rfc3339(key.published_at),
            "signsFrom": _when(key.signs_from),
            "signsUntil": _when(key.signs_until),
            "goneAt": _when(key.gone_at),
        }
        for key in await lodge.signing_keys.list_keys()
    ]


@command(_groups["signing-key"], "rotate")
async def signing_key_rotate(lodge: Lodge) -> Record:
    """Let the next key sign, at once or as soon as every cache can know it, and publish a new next one."""
    key = await lodge.signing_keys.rotate(by=_BY)
    return {"kid": key.kid, "signsFrom": _when(key.signs_from)}


# One kid in 64 begins with a hyphen: base64url.
@command(_groups["signing-key"], "retire", context={"ignore_unknown_options": True})
async def signing_key_retire(lodge: Lodge, kid: Annotated[str, typer.Argument(metavar="KID")]) -> Record:
    """Withdraw a key at once, and with it every JWT that it signed. For a key that may have got out: rotate first."""
    await lodge.signing_keys.retire(kid, by=_BY)
    return {"kid": kid, "state": "gone"}


# --- the trail, the database, the whole -----------------------------------------------------------------------------------


@command(app, "audit")
async def audit(
    lodge: Lodge,
    partner: Annotated[str | None, typer.Option(help="only what concerns this partner")] = None,
    since: Annotated[str | None, typer.Option(help="only from this time on, such as 2026-06-26T07:56:42+00:00")] = None,
) -> Sequence[Record]:
    """What was done, when and by whom, oldest first."""
    events = await lodge.store.list_audit(partner_id=partner, since=_instant(since) if since else None)
    return [
        {
            "sequence": event.sequence,
            "at": rfc3339(event.at),
            "action": event.action,
            "actor": event.actor,
            "partnerId": event.partner_id,
            "subject": event.subject,
            "detail": event.detail,
        }
        for event in events
    ]


@command(_groups["database"], "upgrade")
async def database_upgrade(lodge: Lodge) -> Record:
    """Bring the database to this version's schema. The embedded one is brought there by every command."""
    return {"database": str(lodge.settings.database), "version": HEAD}


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
    findings = examine(settings, os.environ)
    show([finding.record() for finding in findings], json_output=json_output)
    if not all(finding.fine for finding in findings):
        raise typer.Exit(1)


@app.command("serve")
def serve_command(
    *,
    host: Annotated[str | None, _option("host")] = None,
    port: Annotated[str | None, _option("port")] = None,
    workers: Annotated[str | None, _option("workers")] = None,
    tls_cert: Annotated[str | None, _option("tls_cert")] = None,
    tls_key: Annotated[str | None, _option("tls_key")] = None,
    behind_proxy: Annotated[list[str] | None, _option("behind_proxy")] = None,
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
            "data": data,
            "database": database,
            "environment": environment,
        }
    )
    try:
        serve(settings, _announce_json if json_output else _announce)
    except (StartFault, MasterKeyFault) as fault:
        refuse(str(fault))


def _announce_json(started: Started) -> None:
    authority = started.certificate.authority if started.certificate is not None else None
    address = {"url": started.settings.public_url, "port": started.settings.port}
    show({**address, "authority": str(authority) if authority else None}, json_output=True)
    sys.stdout.flush()


def _announce(started: Started) -> None:
    settings, certificate = started.settings, started.certificate
    program = shlex.quote(os.path.relpath(sys.argv[0]))
    where = "" if settings.data == Path(OPTIONS["data"].default) else f" --data {shlex.quote(str(settings.data))}"
    if settings.database != settings.data / "gatelodge.db":
        where += f" --database sqlite:///{shlex.quote(str(settings.database))}"
    if settings.environment != OPTIONS["environment"].default:
        where += f" --environment {settings.environment}"
    trust = f"--cacert {shlex.quote(str(certificate.authority))} " if certificate and certificate.authority else ""
    json_field = r"""sed 's/.*"%s": *"\([^"]*\)".*/\1/'"""
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
    sys.stdout.flush()


def main() -> None:
    """Run the command line."""
    os.umask(0o077)  # the database, its log and the keys are nobody else's to read
    configure_log()
    app()
