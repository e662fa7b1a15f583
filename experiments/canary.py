"""P6: no secret that was given out stands anywhere on the disk.

Every key, session JWT and refresh token that an experiment was given is kept in memory. Now every file that their servers have
left is read: databases, write-ahead logs, shared memory, logs, traces. No window of them is a piece of a secret's secret part:
as it is, decoded, in base64 (at each alignment), in hexadecimal, percent-encoded or in UTF-16. The control plants one secret in
each of these forms, and each must be found.
"""

import asyncio
import base64
import binascii
from collections.abc import Iterable, Iterator
from pathlib import Path

from experiments.ground import Experiment, Ground, Verdict, bounded

_WINDOW = 16
"""Bytes of a piece: of UTF-16 that is 48 random bits, of the other forms more."""
_SECRET_PART = 30
"""So many characters at the end of each kind of secret are random: key's secret and checksum, MAC, signature."""


def forms(secret: str) -> Iterator[tuple[str, bytes]]:
    """The names of the forms in which a secret could be written, and what to look for."""
    tail = secret[-_SECRET_PART:]
    raw = tail.encode("ascii")
    yield "as it is", raw
    yield "UTF-16", raw.decode("ascii").encode("utf-16-le")
    yield "UTF-16, big end first", raw.decode("ascii").encode("utf-16-be")
    yield "hexadecimal", raw.hex().encode("ascii")
    yield "HEXADECIMAL", raw.hex().upper().encode("ascii")
    yield "percent-encoded", b"".join(b"%%%02X" % byte for byte in raw)
    for skipped in range(3):
        # Base64 of something longer in which the secret begins at any place: two bytes at the seams are not certain.
        yield f"base64 at {skipped}", base64.b64encode(raw[skipped:])[: -4 or None]
        yield f"base64url at {skipped}", base64.urlsafe_b64encode(raw[skipped:])[: -4 or None]
    try:
        whole = secret.rpartition(".")[2]
        decoded = base64.urlsafe_b64decode(whole[len(whole) % 4 :])
    except (binascii.Error, ValueError):
        return
    yield "decoded", decoded[-_WINDOW - 2 :]


class Needles:
    """Pieces of secrets, found in one pass over a file however many there are."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._names = {form[:_WINDOW]: name for secret in secrets for name, form in forms(secret)}

    def __len__(self) -> int:
        return len(self._names)

    def find(self, data: bytes) -> set[str]:
        """The forms of which a piece stands in ``data``."""
        names = self._names
        found = {data[at : at + _WINDOW] for at in range(len(data) - _WINDOW + 1) if data[at : at + _WINDOW] in names}
        return {names[piece] for piece in found}


def _files(root: Path) -> Iterator[Path]:
    return (path for path in sorted(root.rglob("*")) if path.is_file())


def _search(root: Path, needles: Needles) -> tuple[int, int, list[str]]:
    count = size = 0
    faults = []
    for path in _files(root):
        data = path.read_bytes()
        count, size = count + 1, size + len(data)
        faults += [f"found: {form} in {path.relative_to(root)}" for form in sorted(needles.find(data))]
    return count, size, faults


async def _some_traffic(ground: Ground) -> None:
    """So that there is something to look through even if no other experiment was asked for."""
    site = ground.site("canary")
    await site.start()
    key = await asyncio.to_thread(site.partner)
    caller = site.caller()
    for number in range(50):
        answer = await caller.log_in(key)
        assert answer is not None
        await caller.refresh(answer.body["refreshToken"], f"retry-{number}")
        await caller.create_company(key, f"DE{number:09}", f"create-{number}")
        await caller.log_in(f"{key[:-1]}x")
    caller.close()
    await site.kill()


def _secrets(ground: Ground) -> set[str]:
    books = [*(site.book for site in ground.sites), *ground.books]
    return {secret for book in books for secret in book.secrets}


def run(ground: Ground) -> Verdict:
    """Look through everything."""

    async def look() -> Verdict:
        await _some_traffic(ground)
        secrets = _secrets(ground)
        needles = Needles(secrets)
        count, size, faults = await asyncio.to_thread(_search, ground.root, needles)
        return Verdict(f"{len(secrets)} secrets in {len(needles)} forms, {count} files, {size / 1e6:.0f} MB", faults)

    return bounded(look(), seconds=600)


def control(ground: Ground) -> Verdict:
    """Plant a secret in every form."""

    async def plant() -> Verdict:
        planted = ground.root / "planted"
        planted.mkdir()
        await _some_traffic(ground)
        secrets = sorted(_secrets(ground))[-50:]
        wanted = 0
        for secret in secrets:
            for name, form in forms(secret):
                wanted += 1
                (planted / f"{wanted} {name}").write_bytes(b"\0noise" + form + b"noise\0")
        _, _, faults = await asyncio.to_thread(_search, planted, Needles(secrets))
        files = {fault.partition(" in ")[2] for fault in faults}
        # All of them, or the control counts as one that has found nothing.
        return Verdict(f"{len(files)} of {wanted} planted pieces found", faults if len(files) == wanted else [])

    return bounded(plant(), seconds=60)


EXPERIMENT = Experiment(
    name="canary",
    promise="P6: no secret stands on the disk, in any form",
    run=run,
    control=control,
    control_says="secrets planted in every form",
    finds="found: ",
)
