"""The commands that look after where everything is kept."""

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Final

import typer

from gatelodge_server.commands import (
    GROUPS,
    DatabaseFlag,
    DataFlag,
    EnvironmentFlag,
    JsonFlag,
    Record,
    command,
    refuse,
    settings_or_exit,
    show,
)
from gatelodge_server.store.address import Address, SqliteAddress, parse_address

if TYPE_CHECKING:
    from gatelodge_server.app import Lodge
    from gatelodge_server.relocating import Copied, Step, Tell
    from gatelodge_server.settings import Settings

_PAUSE: Final = 0.005
"""Seconds between two batches, in which a server on the same machine has the processor and the disk."""
_SAID: Final = {
    "copying": "copying; the old database is in use",
    "settling": "closed to writes; putting right what has changed",
    "comparing": "closed to writes; comparing every row",
}


@command(GROUPS["database"], "upgrade")
async def database_upgrade(lodge: "Lodge") -> Record:
    """Bring the database to this version's schema. The embedded one is brought there by every command."""
    from gatelodge_server.store.migrate import HEAD  # noqa: PLC0415

    return {"database": str(lodge.settings.database), "version": HEAD}


def _address(text: str) -> Address:
    try:
        return parse_address(text)
    except ValueError as fault:
        raise typer.BadParameter(str(fault)) from None


@GROUPS["database"].command("copy")
def database_copy(
    *,
    to: Annotated[
        str | None,
        typer.Option(metavar="URL", help="the empty database to move into: postgresql://USER@HOST:PORT/NAME or sqlite:///PATH"),
    ] = None,
    abandon: Annotated[bool, typer.Option("--abandon", help="take back a move that is not complete: stay here")] = False,
    data: DataFlag = None,
    database: DatabaseFlag = None,
    environment: EnvironmentFlag = None,
    json_output: JsonFlag = False,
) -> None:
    """Move everything into another database, while the servers run. Writes are refused for the last part of it.

    Whatever ends it before, the same command goes on where it was. Afterwards this database is not used any more.
    """
    settings = settings_or_exit({"data": data, "database": database, "environment": environment})
    target = _address(to) if to is not None else None
    if target is None and not abandon:
        raise typer.BadParameter("say where to: --to URL")
    from gatelodge_server.relocating import CopyRefused, standing_told  # noqa: PLC0415

    try:
        with standing_told(settings.database):
            if abandon:
                _abandon(settings, target, json_output=json_output)
            elif target is not None:
                _copy(settings, target, json_output=json_output)
    except CopyRefused as refused:
        refuse(str(refused))


def _abandon(settings: "Settings", target: Address | None, *, json_output: bool) -> None:
    from gatelodge_server.deployment import system_clock  # noqa: PLC0415
    from gatelodge_server.relocating import abandon  # noqa: PLC0415

    abandon(settings.database, target, clock=system_clock)
    show({"database": settings.database.url, "status": "in use"}, json_output=json_output)


def _copy(settings: "Settings", target: Address, *, json_output: bool) -> None:
    from gatelodge_server.deployment import system_clock  # noqa: PLC0415
    from gatelodge_server.relocating import Copier  # noqa: PLC0415
    from gatelodge_server.vault import system_entropy  # noqa: PLC0415

    begun = time.monotonic()
    with _bar(wanted=not json_output) as tell:
        copied = Copier(
            settings.database,
            target,
            clock=system_clock,
            entropy=system_entropy,
            pause=lambda: time.sleep(_PAUSE),
            tell=tell,
        ).run()
    seconds = round(time.monotonic() - begun, 3)
    show(_record(settings, target, copied, seconds), json_output=json_output)
    if not json_output:
        print(_next_steps(settings, target))  # noqa: T201 - this is a command line


def _record(settings: "Settings", target: Address, copied: "Copied", seconds: float) -> Record:
    return {
        "from": settings.database.url,
        "to": target.url,
        "tables": copied.tables,
        "rows": copied.rows,
        "changedMeanwhile": copied.changed,
        "seconds": seconds,
    }


def _next_steps(settings: "Settings", target: Address) -> str:
    from gatelodge_server.deployment import master_key_path  # noqa: PLC0415

    old, new = settings.database, target.url
    if isinstance(old, SqliteAddress):
        rest = f"The old file, {old}, is closed: keep it as a backup until you have one of the new database, then delete it."
    else:
        rest = "The old database is closed: keep it until you have a backup of the new one, then drop it."
    return (
        f"\nEvery row is there and was compared. What is left to do:\n"
        f"  1. Stop the servers that run on the old database: they refuse everything.\n"
        f"  2. Start them with the same --data {shlex.quote(str(settings.data))} and --database {shlex.quote(new)}\n"
        f'     (or `database = "{new}"` in {settings.data / "gatelodge.toml"}: then commands know it too).\n'
        f"     The master key did not move: it is where it was, {master_key_path(settings)} unless you keep it in a variable,\n"
        f"     and every machine that serves needs it.\n"
        f"  3. {rest}"
    )


@contextmanager
def _bar(*, wanted: bool) -> Iterator["Tell"]:
    """Show on a terminal how far it is, and nothing of that elsewhere."""
    from rich.console import Console  # noqa: PLC0415

    console = Console(stderr=True)
    if not (wanted and console.is_terminal):
        yield lambda _: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def tell(step: "Step") -> None:
            if step.name not in _SAID:
                return
            if step.name not in tasks:
                tasks[step.name] = progress.add_task(_SAID[step.name], total=step.total)
            progress.update(tasks[step.name], completed=step.done, total=step.total)

        yield tell
