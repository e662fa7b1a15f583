"""How a command is made: a coroutine over a ``Lodge`` becomes one with the options that all of them take.

``command`` opens the lodge for it, shows what it answers (a table for people, ``--json`` in the wire's field names for
programs) and turns a refusal into one line on standard error. Exit code 0: done; 1: refused; 2: used wrongly.

What only some commands need is imported by them when they run: ``--help``, and a mistyped option, need no database.
"""

import asyncio
import inspect
import json
import os
import sys
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer

from gatelodge_server.core.model import SECOND, Instant
from gatelodge_server.settings import OPTIONS, Settings, SettingsFault, load_settings, parse_duration

if TYPE_CHECKING:
    from rich.text import Text

    from gatelodge_server.app import Lodge

BY: Final = "command line"
_WIDE: Final = 240
"""Columns of a table that goes into a pipe or a file: nothing is cut off there."""

Record = Mapping[str, object]
Work = Callable[..., Awaitable[Record | Sequence[Record]]]

app = typer.Typer(
    name="gatelodge",
    help="The lodge at the gate of a partner API.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help, and faults that can be searched for; with rich it would take twice as long
)
GROUPS: Final = {
    name: typer.Typer(help=text, no_args_is_help=True)
    for name, text in (
        ("partner", "Organisations that call the API."),
        ("tier", "How many requests partners may make."),
        ("token", "Access tokens of partners: they work until they are rotated or revoked."),
        ("key", "API keys of partners and of their companies."),
        ("company", "Customers that a partner manages."),
        ("signing-key", "Keys that sign session JWTs and access tokens."),
        ("database", "Where everything is kept."),
    )
}
for _name, _group in GROUPS.items():
    app.add_typer(_group, name=_name)


def option(name: str) -> Any:  # noqa: ANN401 - what typer wants in a signature
    """A flag that is a setting too: its meaning stands in one table."""
    return typer.Option(help=OPTIONS[name].meaning, show_default=False)


DataFlag = Annotated[str | None, option("data")]
DatabaseFlag = Annotated[str | None, option("database")]
EnvironmentFlag = Annotated[str | None, option("environment")]
JsonFlag = Annotated[bool, typer.Option("--json", help="answer in JSON")]
_COMMON: Final[Mapping[str, Any]] = {
    "data": DataFlag,
    "database": DatabaseFlag,
    "environment": EnvironmentFlag,
    "json_output": JsonFlag,
}


def command(
    group: typer.Typer, name: str, *, context: Mapping[str, Any] | None = None, only_in_json: Collection[str] = ()
) -> Callable[[Work], Work]:
    """Make a command of a coroutine ``work(lodge, …)`` that returns a record, or several.

    ``context``: settings of click's. ``only_in_json``: columns that would make a table too wide for a terminal.
    """

    def decorate(work: Work) -> Work:
        def run(**given: Any) -> None:  # noqa: ANN401 - typer calls it by the signature below
            json_output = given.pop("json_output")
            settings = settings_or_exit({flag: given.pop(flag) for flag in _COMMON if flag in given})
            show(_in_lodge(settings, lambda lodge: work(lodge, **given)), json_output=json_output, only_in_json=only_in_json)

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


def _in_lodge(settings: Settings, work: Callable[["Lodge"], Awaitable[Record | Sequence[Record]]]) -> Record | Sequence[Record]:
    from gatelodge.errors import Rejected, Unavailable  # noqa: PLC0415
    from gatelodge_server.app import assemble  # noqa: PLC0415
    from gatelodge_server.core.refusals import Refusal  # noqa: PLC0415
    from gatelodge_server.deployment import StartFault, load_master_keys, prepare  # noqa: PLC0415
    from gatelodge_server.vault import MasterKeyFault, Vault, system_entropy  # noqa: PLC0415

    async def run() -> Record | Sequence[Record]:
        known = prepare(settings, os.environ)
        lodge = assemble(known, Vault(load_master_keys(known, os.environ), system_entropy))
        try:
            await lodge.clock.look()
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


def show(answer: Record | Sequence[Record], *, json_output: bool, only_in_json: Collection[str] = ()) -> None:
    """Print an answer: as JSON, or as a table that a person can read. Keys are shown whole: they are shown this once."""
    if json_output:
        print(json.dumps(answer, ensure_ascii=False))  # noqa: T201
        return
    # A program that asks for JSON need not wait for what a person is shown a table with.
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else _WIDE)
    if isinstance(answer, Mapping):
        # Not a table: a token is longer than any terminal is wide, and must come out of it without a line break.
        widest = max(map(len, answer))
        for name, value in answer.items():
            console.print(Text(name.ljust(widest), style="bold") + Text("  ") + _text(value))
        return
    if not answer:
        console.print("none")
        return
    columns = list(dict.fromkeys(name for record in answer for name in record if name not in only_in_json))
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for record in answer:
        table.add_row(*(_text(record.get(name)) for name in columns))
    console.print(table)


def _text(value: object) -> "Text":
    from rich.text import Text  # noqa: PLC0415

    return Text("-" if value is None else str(value))  # and not a string, which would be read as markup


def when(instant: Instant | None) -> str | None:
    """An instant as the wire tells it."""
    from gatelodge_server.http.sessions import rfc3339  # noqa: PLC0415

    return None if instant is None else rfc3339(instant)


def instant_of(text: str) -> Instant:
    """The instant that a person has typed."""
    try:
        moment = datetime.fromisoformat(text)
        return int((moment if moment.tzinfo else moment.astimezone()).timestamp() * SECOND)
    except (ValueError, OverflowError):  # the latter where a time zone leads out of the calendar
        raise typer.BadParameter("must be a time such as 2026-06-26T07:56:42+00:00") from None


def duration_of(text: str) -> int:
    """The length of time that a person has typed."""
    try:
        return parse_duration(text)
    except ValueError as fault:
        raise typer.BadParameter(str(fault)) from None


def line_of(kind: str) -> Callable[[str], str]:
    """What checks an argument, from the type of ``http.fields`` with this name, which checks the same in a request."""

    def parse(text: str) -> str:
        from gatelodge_server.http import fields  # noqa: PLC0415

        line: type[fields.Line] = getattr(fields, kind)
        try:
            return line.parse(text)
        except ValueError as fault:
            raise typer.BadParameter(str(fault)) from None

    return parse


def slug(text: str) -> str:
    """A partner's id that a person has typed."""
    from gatelodge_server.app import slug_of  # noqa: PLC0415

    if not text or slug_of(text) != text:
        raise typer.BadParameter("must be lower-case letters, digits and single hyphens, 48 at most")
    return text


def seconds_of(text: str) -> float:
    """The length of time that a person has typed, in seconds; a bare number is seconds too."""
    return duration_of(f"{text}s" if text.isdigit() else text) / SECOND


async def reach_of(lodge: "Lodge", sequence: int | None, wait: float) -> Record:
    """How far the revocation that was step ``sequence`` has got with those who verify offline, after ``wait`` seconds."""
    reach = await lodge.revocations.reach(sequence, wait=wait)
    return {"sequence": reach.sequence, "verifiers": reach.verifiers, "acknowledged": reach.acknowledged}


WaitFlag = Annotated[str, typer.Option(help="for how long to wait until all offline verifiers have heard of it, such as 10s")]
PartnerId = Annotated[str, typer.Argument(metavar="PARTNER", help="the partner's id")]
KeyId = Annotated[str, typer.Argument(metavar="KEY_ID", help="the key's id, as `key list` shows it")]
