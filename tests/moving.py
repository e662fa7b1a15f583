"""What tests of `database copy` share: a deployment with rows in every table, and a run that stops where it is told to."""

import os
import sys
from collections.abc import Mapping

from gatelodge_server.relocating import Copier
from gatelodge_server.store.address import parse_address
from gatelodge_server.store.relocation import COPIED
from gatelodge_server.store.tables import metadata

AT = 1_780_000_000_000
ODD = (
    "Zoë 🚗 & Söhne",
    "a'b\"c\\d",
    "line\nbreak\ttab\r",
    "\u202eright to left\u202c",
    "%s $1 :name {x} NULL",
    "e\u0301 is not \u00e9",
    "\x01\x1f\x7f\ufffd\U0010ffff",
    "",
)
IDS = ("Zed", "a-b", "aB", "a_b", "ab", "b", "é", "\U0001f697")
"""In the order of their bytes, and in no language's."""
STEPS = ("begun", "copying", "copied", "closed", "settling", "settled", "comparing", "compared", "gone", "complete")
"""All that a run tells of, in order."""


def rows_of_everything() -> Mapping[str, list[dict[str, object]]]:
    """Rows for every table, with whatever a column may hold."""
    texts = list(zip(IDS, ODD, strict=True))
    sessions = [number.to_bytes(16) for number in (0, 1, 127, 128, 255, 256, 2**127, 2**128 - 1)]
    return {
        "deployment": [{"id": 1, "environment": "uat", "brand": "gatelodge", "audience": "partner-api-uat"}],
        "key_check": [{"key_id": id_.encode().rjust(4, b"\0"), "sealed": os.urandom(32)} for id_ in IDS],
        "issuer": [{"url": f"https://{id_}.example", "used_at": AT} for id_ in IDS],
        "tier": [{"name": "starter", "requests_per_hour": 7, "requests_per_day": 2**31 - 1}],
        "partner": [
            {
                "id": id_,
                "name": odd,
                "contact_email": "dev@acme.example",
                "tier": "starter",
                "status": "active",
                "origin": "managed",
                "session_epoch": number,
                "created_at": AT,
                "registered_address": f"{id_}@acme.example" if number % 2 else None,
                "intended_use": odd if number % 2 else None,
            }
            for number, (id_, odd) in enumerate(texts)
        ],
        "company": [
            {
                "id": session,
                "partner_id": id_,
                "company_name": odd,
                "country": "DE",
                "tax_number": id_,
                "canonical_tax_number": id_,
                "created_at": AT,
                "deleted_at": AT if id_ == "b" else None,
            }
            for session, (id_, odd) in zip(sessions, texts, strict=True)
        ],
        "signing_key": [
            {"kid": id_, "jwk": odd, "wrapped": bytes(range(256)), "published_at": AT, "purpose": "access"}
            for id_, odd in texts
        ],
        "credential": [
            {
                "id": f"key-{id_}",
                "kind": "ck",
                "partner_id": id_,
                "company_id": session,
                "digest": os.urandom(32),
                "masked": odd,
                "created_at": AT,
                "ends_at": AT + 1 if id_ == "ab" else None,
                "end_cause": "rotated" if id_ == "ab" else None,
            }
            for session, (id_, odd) in zip(sessions, texts, strict=True)
        ],
        "access_token": [
            {
                "id": id_,
                "lineage_id": id_,
                "version": 1,
                "partner_id": id_,
                "label": odd,
                "kid": id_,
                "digest": os.urandom(32),
                "created_at": AT,
            }
            for id_, odd in texts
        ],
        "session": [
            {
                "id": session,
                "credential_id": f"key-{id_}",
                "epoch": 0,
                "generation": 2**63 - 1 - number,
                "started_at": AT,
                "rotated_at": AT,
                "expires_at": AT,
                "retires_at": AT,
                "retry_digest": os.urandom(32) if number % 2 else None,
            }
            for number, (session, id_) in enumerate(zip(sessions, IDS, strict=True))
        ],
        "replay": [
            {"id": os.urandom(32), "fingerprint": bytes(32), "credential_id": f"key-{id_}", "sealed": b"", "readable_until": -1}
            for id_ in IDS
        ],
        "verification": [
            {
                "address": f"{id_}@acme.example",
                "contact_email": "x",
                "display_name": odd,
                "salt": bytes(16),
                "digest": os.urandom(32),
                "created_at": AT,
                "expires_at": AT,
                "attempts": 5,
                "day_starts_at": AT,
                "day_failures": 0,
                "partner_id": id_,
                "credential_id": f"key-{id_}",
            }
            for id_, odd in texts
        ],
        "outbox": [
            {
                "id": os.urandom(16),
                "kind": "verification",
                "recipient": odd,
                "facts": f'{{"name": "\\u0000{number}"}}',
                "sealed": os.urandom(60),
                "created_at": AT,
                "due_at": AT,
                "expires_at": AT,
            }
            for number, odd in enumerate(ODD)
        ],
        "quota": [
            {"partner_id": id_, "hour_starts_at": AT, "hour_taken": 1, "day_starts_at": AT, "day_taken": 2**31 - 1}
            for id_ in IDS
        ],
        "usage": [
            {"partner_id": id_, "hour_starts_at": hour, "accepted": 1, "refused": 2}
            for id_ in IDS
            for hour in (-(2**63), 0, 2**63 - 1)
        ],
        "change": [{"kind": "partner", "subject": id_, "at": AT} for id_ in IDS],
        "verifier": [{"id": id_, "sequence": 3, "seen_at": AT} for id_ in IDS],
        "audit": [
            {"at": AT, "action": "x", "actor": odd, "partner_id": None, "subject": id_, "detail": odd * 100}
            for id_, odd in texts
        ],
    }


def fill(backend):
    """Put rows into every table."""
    rows = rows_of_everything()
    assert set(rows) == {table.name for table in COPIED}

    def write(connection):
        connection.execute(metadata.tables["tier"].delete())
        for table in COPIED:
            connection.execute(table.insert(), rows[table.name])

    backend.run(write)


def everything_in(backend):
    """All rows of all tables that are moved."""
    return {table.name: sorted(backend.rows(table.name, *table.columns.keys()), key=repr) for table in COPIED}


class Stopped(Exception):
    """A run was to stop here."""


def run_of(source, target, *, tell=lambda _: None, pause=lambda: None, batch=3):
    """A run of the command, in batches of three rows."""
    addresses = (parse_address(source.address), parse_address(target.address))
    return Copier(*addresses, clock=lambda: AT, entropy=os.urandom, pause=pause, tell=tell, batch=batch)


def at(name, act):
    """What does something when a step is told of for the first time."""
    waiting = [name]

    def tell(step):
        if step.name in waiting:
            waiting.remove(step.name)
            act()

    return tell


def stop():
    """Let a run end here."""
    raise Stopped


def _main(source: str, target: str, name: str) -> None:
    def wait():
        print(name, flush=True)
        sys.stdin.readline()

    addresses = (parse_address(source), parse_address(target))
    Copier(*addresses, clock=lambda: AT, entropy=os.urandom, pause=lambda: None, tell=at(name, wait), batch=3).run()


if __name__ == "__main__":
    _main(*sys.argv[1:])
