"""The commands: what they say, to people and to programs, and with which exit code."""

import base64
import json
import re
import sqlite3
import subprocess
import sys
from datetime import datetime, timedelta
from importlib.metadata import version

import pytest
from harness import run_command
from outside import (
    REGISTER,
    RFC3339,
    add_partner,
    ask,
    bearer,
    code_for,
    command,
    create_company,
    fresh,
    id_of,
    log_in,
    outcome,
    whoami,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A deployment whose server does not run."""
    directory = tmp_path_factory.mktemp("commands") / "data"
    ask("partner", "list", data=directory)
    return directory


def refused(*args, data, **options):
    """The one line on standard error of a command that is refused."""
    done = command(*args, data=data, **options)
    assert (done.exit_code, done.stdout) == (1, ""), (done.stdout, done.exception)
    assert done.stderr.endswith("\n")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.strip()


def misused(*args, **options):
    """What is on standard error after a command was used wrongly."""
    done = command(*args, **options)
    assert (done.exit_code, done.stdout) == (2, ""), (done.stdout, done.stderr, done.exception)
    assert done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_partner_is_added_shown_listed_suspended_resumed_and_deactivated(data):
    added = ask("partner", "add", "Acme Motors", "--email", "dev@acme.example", data=data)
    assert set(added) == {"partnerId", "apiKey", "tier"}
    assert (added["partnerId"], added["tier"]) == ("acme-motors", "starter")
    assert added["apiKey"].startswith("gatelodge_uat_pk_")

    shown = ask("partner", "show", "acme-motors", data=data)
    assert RFC3339.fullmatch(shown.pop("createdAt"))
    expected = {"partnerId": "acme-motors", "name": "Acme Motors", "contactEmail": "dev@acme.example", "tier": "starter"}
    limits = ask("tier", "list", data=data)[0]
    assert limits.pop("tier") == "starter"
    nothing = dict.fromkeys(("organizationName", "websiteUrl", "intendedUse", "agreedAt"))
    assert shown == {**expected, "status": "active", "origin": "managed", **limits, **nothing}
    assert "acme-motors" in [partner["partnerId"] for partner in ask("partner", "list", data=data)]

    sequences = []
    for verb, status in (("suspend", "suspended"), ("resume", "active"), ("deactivate", "deactivated")):
        answer = ask("partner", verb, "acme-motors", data=data)
        assert (set(answer), answer["partnerId"], answer["status"]) == (
            {"partnerId", "status", "sequence", "verifiers", "acknowledged"},
            "acme-motors",
            status,
        )
        sequences.append(answer["sequence"])
        assert ask("partner", "show", "acme-motors", data=data)["status"] == status
    assert sequences == sorted(set(sequences))
    for verb in ("suspend", "resume"):
        assert refused("partner", verb, "acme-motors", data=data).startswith("The partner is deactivated, which is final.")


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("Zoë & Söhne GmbH", "zoe-sohne-gmbh"),
        ("Ромашка", "romashka"),
        ("株式会社", "zhu-shi-hui-she"),
        ("  Spaces   within  ", "spaces-within"),
        ("UPPER/lower\\case", "upper-lower-case"),
        ("../../etc/passwd", "etc-passwd"),
        ("🚗", "partner"),
        ("x" * 60, "x" * 48),
    ],
)
def test_a_partners_id_is_made_of_its_name(data, name, slug):
    assert ask("partner", "add", name, "--email", "a@b.example", data=data)["partnerId"] == slug
    assert ask("partner", "show", slug, data=data)["name"] == name.strip()


def test_names_that_come_out_alike_are_numbered(data):
    added = [ask("partner", "add", name, "--email", "a@b.example", data=data) for name in ("Twin", "twin!", "Twín")]
    assert [answer["partnerId"] for answer in added] == ["twin", "twin-2", "twin-3"]


def test_an_id_that_is_given_is_taken_as_it_is_or_not_at_all(data):
    add = ("partner", "add", "Chosen", "--email", "a@b.example", "--id")
    assert ask(*add, "my-own-id", data=data)["partnerId"] == "my-own-id"
    assert refused(*add, "my-own-id", data=data).startswith("A partner has or had this id")
    for wrong in ("Upper", "two words", "-x", "x--y", "x" * 49, "ü", ""):
        assert "lower-case" in misused(*add, wrong, data=data)


def test_keys_are_listed_rotated_and_revoked(data):
    partner = add_partner(data)
    (listed,) = ask("key", "list", partner.id, data=data)
    assert set(listed) == {"keyId", "masked", "companyId", "status", "createdAt", "endsAt", "lastUsedAt"}
    assert listed["lastUsedAt"] is None
    assert (listed["keyId"], listed["companyId"], listed["status"], listed["endsAt"]) == (partner.key_id, None, "active", None)
    assert listed["masked"] == f"gatelodge_uat_pk_{partner.key_id}_…"

    issued = ask("key", "rotate", partner.key_id, "--overlap", "1h", data=data)
    assert set(issued) == {"keyId", "apiKey", "sequence", "verifiers", "acknowledged"}
    assert id_of(issued["apiKey"]) == issued["keyId"]
    keys = {key["keyId"]: key for key in ask("key", "list", partner.id, data=data)}
    assert keys[partner.key_id]["status"] == keys[issued["keyId"]]["status"] == "active"
    left = datetime.fromisoformat(keys[partner.key_id]["endsAt"]) - datetime.now().astimezone()
    assert timedelta(minutes=55) < left <= timedelta(hours=1)
    assert refused("key", "rotate", partner.key_id, data=data).startswith("The API key has ended already")

    revoked = ask("key", "revoke", issued["keyId"], data=data)
    assert (revoked["keyId"], revoked["status"]) == (issued["keyId"], "revoked")
    assert set(revoked) == {"keyId", "status", "sequence", "verifiers", "acknowledged"}
    keys = {key["keyId"]: key["status"] for key in ask("key", "list", partner.id, data=data)}
    assert keys[issued["keyId"]] == "revoked"


@pytest.mark.parametrize("overlap", ["", "1", "1y", "-1h", "1.5h", "1h30m", "h", "\u0661h"])
def test_an_overlap_is_a_duration(data, overlap):
    partner = add_partner(data)
    assert "duration" in misused("key", "rotate", partner.key_id, "--overlap", overlap, data=data)
    assert len(ask("key", "list", partner.id, data=data)) == 1


def test_an_overlap_beyond_all_measure_is_refused_in_a_sentence(data):
    partner = add_partner(data)
    assert "longer" in misused("key", "rotate", partner.key_id, "--overlap", "999999999d", data=data)
    assert len(ask("key", "list", partner.id, data=data)) == 1


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("partner", "show", "nobody"), "There is no partner with this id."),
        (("partner", "suspend", "nobody"), "There is no partner with this id."),
        (("partner", "resume", "nobody"), "There is no partner with this id."),
        (("partner", "deactivate", "nobody"), "There is no partner with this id."),
        (("key", "list", "nobody"), "There is no partner with this id."),
        (("company", "list", "nobody"), "There is no partner with this id."),
        (("key", "rotate", "nokey"), "There is no API key with this id."),
        (("key", "revoke", "nokey"), "There is no API key with this id."),
        (("token", "issue", "nobody"), "There is no partner with this id."),
        (("token", "list", "nobody"), "There is no partner with this id."),
        (("token", "show", "notoken"), "There is no access token with this id."),
        (("token", "rotate", "notoken"), "There is no access token with this id."),
        (("token", "revoke", "notoken"), "There is no access token with this id."),
        (("signing-key", "retire", "nokey"), "There is no signing key with this id."),
        (("partner", "add", "X", "--email", "a@b.example", "--tier", "platinum"), "There is no tier with this name."),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(data, args, reason):
    assert refused(*args, data=data) == reason
    assert refused(*args, "--json", data=data) == reason


@pytest.mark.parametrize(
    "args",
    [
        ("partner",),
        ("nonsense",),
        ("partner", "add"),
        ("partner", "add", "X"),
        ("partner", "add", "X", "--email", "nobody"),
        ("partner", "add", "", "--email", "a@b.example"),
        ("partner", "add", "two\nlines", "--email", "a@b.example"),
        ("partner", "add", "bell\a", "--email", "a@b.example"),
        ("partner", "show"),
        ("partner", "show", "a", "b"),
        ("partner", "list", "--nonsense"),
        ("key", "rotate"),
        ("token", "issue"),
        ("token", "rotate"),
        ("signing-key", "rotate", "--purpose", "both"),
        ("audit", "--since", "yesterday"),
        ("audit", "--since", "0001-01-01"),
        ("serve", "--workers"),
    ],
)
def test_a_command_used_wrongly_says_how_and_exits_with_2(data, args):
    done = command(*args, environ={"GATELODGE_DATA": str(data)})
    assert done.exit_code == 2, (done.stdout, done.exception)
    assert "Traceback" not in done.output


def test_a_table_is_for_people_and_cuts_nothing_off(data):
    added = command("partner", "add", "Table & Sons [bold]", "--email", "a@b.example", data=data)
    assert added.exit_code == 0
    rows = dict(line.split(maxsplit=1) for line in added.stdout.splitlines())
    assert rows["partnerId"].strip() == "table-sons-bold"
    assert len(rows["apiKey"].strip()) == len(f"gatelodge_uat_pk_{'x' * 12}_{'x' * 36}")
    listed = command("partner", "list", data=data).stdout
    assert listed.splitlines()[0].split() == ["partnerId", "name", "contactEmail", "tier", "status", "origin", "createdAt"]
    assert "Table & Sons [bold]" in listed
    assert "Table & Sons [bold]" in command("partner", "show", "table-sons-bold", data=data).stdout
    assert command("company", "list", "table-sons-bold", data=data).stdout == "none\n"
    assert ask("company", "list", "table-sons-bold", data=data) == []


def test_the_trail_is_shown_by_partner_and_by_time(data):
    partner, other = add_partner(data), add_partner(data)
    until_here = ask("audit", data=data)
    ask("partner", "suspend", partner.id, data=data)
    ask("partner", "suspend", other.id, data=data)
    everything = ask("audit", data=data)
    assert [event["sequence"] for event in everything] == sorted(event["sequence"] for event in everything)
    assert all(set(event) == {"sequence", "at", "action", "actor", "partnerId", "subject", "detail"} for event in everything)

    own = ask("audit", "--partner", partner.id, data=data)
    assert [event["action"] for event in own] == ["partner.added", "partner.suspended"]
    assert {event["actor"] for event in own} == {"command line"}
    assert partner.key not in json.dumps(own)

    instant = own[-1]["at"]
    since = ask("audit", "--since", instant, data=data)
    assert since == [event for event in everything if event["at"] >= instant]
    assert len(since) < len(everything)
    # The same instant, told in another zone.
    elsewhere = datetime.fromisoformat(instant).astimezone().isoformat(timespec="milliseconds")
    assert ask("audit", "--since", elsewhere, data=data) == since
    assert ask("audit", "--since", instant, "--partner", partner.id, data=data) == own[-1:]
    assert ask("audit", "--since", "9999-01-01", data=data) == []
    assert refused("audit", "--partner", "nobody", data=data) == "There is no partner with this id."
    assert until_here == everything[: len(until_here)]


def test_the_program_says_its_version():
    done = command("--version")
    assert (done.exit_code, done.stdout) == (0, f"gatelodge {version('gatelodge-server')}\n")


def test_the_database_is_brought_to_this_version(data):
    answer = ask("database", "upgrade", data=data)
    assert set(answer) == {"database", "version"}
    assert answer["database"] == str(data / "gatelodge.db")


def test_signing_keys_are_listed_with_their_life(tmp_path):
    data = tmp_path / "data"
    keys = ask("signing-key", "list", data=data)
    fields = {"kid", "purpose", "state", "publishedAt", "signsFrom", "signsUntil", "goneAt", "liveTokens"}
    assert all(set(key) == fields for key in keys)
    rings = [(key["purpose"], key["state"], key["liveTokens"]) for key in keys]
    assert rings[:2] in ([("session", *states) for states in pair] for pair in both_orders(None))
    assert rings[2:] in ([("access", *states) for states in pair] for pair in both_orders(0))
    add_partner(data, "Acme")
    ask("token", "issue", "acme", data=data)
    live = {(key["purpose"], key["state"]): key["liveTokens"] for key in ask("signing-key", "list", data=data)}
    assert live["access", "current"] == 1


def both_orders(live_tokens):
    pair = [("current", live_tokens), ("next", live_tokens)]
    return pair, pair[::-1]


def test_signing_keys_are_rotated_both_rings_at_once_or_one(tmp_path):
    data = tmp_path / "data"
    next_keys = {key["purpose"]: key for key in ask("signing-key", "list", data=data) if key["state"] == "next"}

    def check(purpose, kid, signs_from):
        assert kid == next_keys[purpose]["kid"]
        published = datetime.fromisoformat(next_keys[purpose]["publishedAt"])
        assert datetime.fromisoformat(signs_from) - published == timedelta(minutes=5)

    alone = ask("signing-key", "rotate", "--purpose", "access", data=data)
    assert set(alone) == {"kid", "signsFrom"}
    check("access", alone["kid"], alone["signsFrom"])
    pending = [key["kid"] for key in ask("signing-key", "list", data=data) if key["state"] == "next" and key["signsFrom"]]
    assert pending == [alone["kid"]]

    both = ask("signing-key", "rotate", data=data)
    assert set(both) == {"kid", "signsFrom", "accessKid", "accessSignsFrom"}
    check("session", both["kid"], both["signsFrom"])
    assert (both["accessKid"], both["accessSignsFrom"]) == (alone["kid"], alone["signsFrom"])
    again = ask("signing-key", "rotate", "--purpose", "session", data=data)
    assert again == {"kid": both["kid"], "signsFrom": both["signsFrom"]}


def test_an_access_token_is_issued_listed_rotated_shown_and_revoked(data):
    partner = add_partner(data)
    issued = ask("token", "issue", partner.id, "--label", "Plans, production", data=data)
    assert set(issued) == {"tokenId", "token"}
    assert re.fullmatch(r"[0-9A-Za-z]{22}", issued["tokenId"])
    header, claims = claims_of(issued["token"])
    current = {key["purpose"]: key["kid"] for key in ask("signing-key", "list", data=data) if key["state"] == "current"}
    assert header == {"alg": "ES256", "kid": current["access"], "typ": "JWT"}
    assert (claims["sub"], claims["partner"], claims["jti"]) == (partner.id, partner.id, issued["tokenId"])
    assert "exp" not in claims

    (listed,) = ask("token", "list", partner.id, data=data)
    assert RFC3339.fullmatch(listed.pop("createdAt"))
    nothing_yet = dict.fromkeys(("rotatedAt", "endsAt", "lastUsedAt", "lastUsedFrom"))
    known = {"tokenId": issued["tokenId"], "version": 1, "label": "Plans, production", "kid": current["access"]}
    assert listed == {**known, "status": "active", **nothing_yet}

    newer = ask("token", "rotate", issued["tokenId"], "--overlap", "1h", data=data)
    assert set(newer) == {"tokenId", "token", "sequence", "verifiers", "acknowledged"}
    for id_ in (issued["tokenId"], newer["tokenId"]):
        new, old = ask("token", "show", id_, data=data)
        assert (new["tokenId"], new["version"], new["label"]) == (newer["tokenId"], 2, "Plans, production")
        assert (old["tokenId"], old["version"]) == (issued["tokenId"], 1)
        assert (new["status"], old["status"], new["endsAt"], new["rotatedAt"]) == ("active", "active", None, None)
        assert datetime.fromisoformat(old["endsAt"]) - datetime.fromisoformat(old["rotatedAt"]) == timedelta(hours=1)
    assert refused("token", "rotate", issued["tokenId"], data=data).startswith("The access token has ended already")

    newest = ask("token", "rotate", newer["tokenId"], data=data)
    revoked = ask("token", "revoke", issued["tokenId"], data=data)
    assert set(revoked) == {"tokenId", "status", "sequence", "verifiers", "acknowledged"}
    assert (revoked["tokenId"], revoked["status"]) == (issued["tokenId"], "revoked")
    shown = {version["tokenId"]: version["status"] for version in ask("token", "show", newer["tokenId"], data=data)}
    assert shown == {newest["tokenId"]: "active", newer["tokenId"]: "rotated", issued["tokenId"]: "revoked"}
    assert ask("token", "list", partner.id, data=data) == ask("token", "show", newer["tokenId"], data=data)

    trail = ask("audit", "--partner", partner.id, data=data)
    assert [event["action"] for event in trail if event["action"].startswith("token.")] == [
        "token.issued",
        "token.rotated",
        "token.rotated",
        "token.revoked",
    ]
    for text in (issued["token"], newer["token"], newest["token"]):
        assert text.split(".")[2] not in json.dumps(trail)


def claims_of(token):
    header, claims, _ = token.split(".")
    return [json.loads(base64.urlsafe_b64decode(part + "==")) for part in (header, claims)]


@pytest.mark.parametrize("label", ["", "two\nlines", "bell\a", "x" * 201])
def test_a_tokens_label_is_one_line(data, label):
    partner = add_partner(data)
    misused("token", "issue", partner.id, "--label", label, data=data)
    assert ask("token", "list", partner.id, data=data) == []


def test_a_token_needs_no_label_and_a_table_shows_it_whole(data):
    partner = add_partner(data)
    done = command("token", "issue", partner.id, data=data)
    rows = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert claims_of(rows["token"].strip())[1]["jti"] == rows["tokenId"].strip()
    (listed,) = ask("token", "list", partner.id, data=data)
    assert listed["label"] == ""


def test_the_key_of_a_live_token_is_not_retired(tmp_path):
    data = tmp_path / "data"
    partner = add_partner(data)
    ask("token", "issue", partner.id, data=data)
    ask("signing-key", "rotate", data=data)
    for key in ask("signing-key", "list", data=data):
        if key["state"] == "current" and key["purpose"] == "access":
            assert "live access tokens need it" in refused("signing-key", "retire", key["kid"], data=data)
            ask("partner", "deactivate", partner.id, data=data)
            gone = ask("signing-key", "retire", key["kid"], data=data)
            assert (gone["kid"], gone["state"], gone["verifiers"]) == (key["kid"], "gone", 0)


def test_companies_are_listed_over_all_pages(server, client, partner):
    made = [create_company(client, partner.key)["companyId"] for _ in range(205)]
    listed = ask("company", "list", partner.id, data=server.data)
    assert [company["companyId"] for company in listed] == made[::-1]
    assert all(set(company) == {"companyId", "companyName", "country", "taxNumber", "createdAt"} for company in listed)


def test_credentials_of_holders_that_may_not_come_in_are_not_called_active(server, client):
    partner = add_partner(server.data)
    kept, deleted = (create_company(client, partner.key) for _ in range(2))
    assert client.delete(f"/companies/{deleted['companyId']}", headers=bearer(partner.key)).status_code == 204
    ended, live = (ask("token", "issue", partner.id, data=server.data)["tokenId"] for _ in range(2))
    ask("token", "revoke", ended, data=server.data)

    def check(expected):
        keys = {key["keyId"]: key["status"] for key in ask("key", "list", partner.id, data=server.data)}
        own, theirs = partner.key_id, (id_of(kept["apiKey"]), id_of(deleted["apiKey"]))
        assert keys == {own: expected, theirs[0]: expected, theirs[1]: "company-deleted"}
        listed = {token["tokenId"]: token["status"] for token in ask("token", "list", partner.id, data=server.data)}
        assert listed == {ended: "revoked", live: expected}
        assert [token["status"] for token in ask("token", "show", live, data=server.data)] == [expected]

    check("active")
    for verb, expected in (("suspend", "partner-suspended"), ("resume", "active"), ("deactivate", "partner-deactivated")):
        ask("partner", verb, partner.id, data=server.data)
        check(expected)


def test_a_list_of_tokens_leaves_the_kid_to_programs_and_to_show(data):
    partner = add_partner(data)
    issued = ask("token", "issue", partner.id, data=data)["tokenId"]
    kid = ask("token", "list", partner.id, data=data)[0]["kid"]
    assert kid not in command("token", "list", partner.id, data=data).stdout
    assert kid in command("token", "show", issued, data=data).stdout


def test_a_registrant_is_shown_with_what_it_said(server, client):
    said = {"organizationName": fresh("Org "), "websiteUrl": "https://acme.example/", "intendedUse": "Plans [bold]"}
    to = f"{fresh('dev')}@acme.example"
    code = code_for(server, client, to, **said)
    answer = client.post(f"{REGISTER}/Verify", json={"contactEmail": to, "verificationCode": code}).json()
    shown = ask("partner", "show", answer["partnerId"], data=server.data)
    assert {name: shown[name] for name in said} == said
    assert {name: shown[name] for name in answer["rateLimits"]} == answer["rateLimits"]
    assert (shown["origin"], shown["contactEmail"]) == ("self-service", to)
    assert RFC3339.fullmatch(shown["agreedAt"])
    assert shown["agreedAt"] <= shown["createdAt"]
    for text in said.values():
        assert text in command("partner", "show", answer["partnerId"], data=server.data).stdout


def test_a_running_server_heeds_a_command_at_once(server, client):
    partner = add_partner(server.data)
    session = log_in(client, partner.key)
    for command_line, verdict in (
        (("partner", "suspend", partner.id), (403, "partner_suspended")),
        (("partner", "resume", partner.id), (200, None)),
        (("key", "revoke", partner.key_id), (401, "credential_revoked")),
    ):
        ask(*command_line, data=server.data)
        assert whoami(client, partner.key) == verdict
        assert outcome(client.post("/auth/login", json={"apiKey": partner.key})) == verdict
    assert whoami(client, session["jwt"]) == (401, "credential_revoked")


def test_the_program_itself_says_the_same_in_a_process_of_its_own(data):
    done = run_command("partner", "show", "nobody", data=data)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "There is no partner with this id.\n")


@pytest.mark.parametrize(
    ("imported", "needless"),
    [
        ("cli", {"sqlalchemy", "structlog", "starlette", "uvicorn", "jinja2", "aiosmtplib", "limits", "rich"}),
        ("app", {"structlog", "starlette", "uvicorn", "jinja2", "aiosmtplib", "limits", "pycountry", "email_validator"}),
    ],
)
def test_the_help_and_the_commands_do_not_wait_for_what_only_a_server_needs(imported, needless):
    code = f"import gatelodge_server.{imported}, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert set(done.stdout.split()) & needless == set()


# --- what a deployment must have ------------------------------------------------------------------------------------------


def test_a_database_that_has_lost_its_master_key_is_refused(tmp_path):
    data = tmp_path / "data"
    add_partner(data)
    (data / "master.key").rename(tmp_path / "away")
    assert "its master key is not" in refused("partner", "list", data=data)
    assert not (data / "master.key").exists()
    key = (tmp_path / "away").read_text()
    assert command("partner", "list", data=data, environ={"GATELODGE_MASTER_KEY": key}).exit_code == 0


def test_a_master_key_that_others_can_read_is_refused(tmp_path):
    data = tmp_path / "data"
    add_partner(data)
    (data / "master.key").chmod(0o640)
    assert "can be read by others (mode 0640)" in refused("partner", "list", data=data)


@pytest.mark.parametrize(
    ("content", "reason"), [("", "holds no key"), ("short\n", "not 32 bytes"), ("A" * 43 + "\n", "does not look random")]
)
def test_a_master_key_that_is_none_is_refused_without_being_shown(tmp_path, content, reason):
    data = tmp_path / "data"
    add_partner(data)
    (data / "master.key").write_text(content)
    assert reason in refused("partner", "list", data=data)


def test_r71_no_two_deployments_have_the_same_keys(tmp_path):
    for name in ("one", "two"):
        add_partner(tmp_path / name)
        assert (tmp_path / name / "master.key").stat().st_mode & 0o777 == 0o600
        assert (tmp_path / name).stat().st_mode & 0o077 == 0
    assert (tmp_path / "one" / "master.key").read_text() != (tmp_path / "two" / "master.key").read_text()
    kids = [{key["kid"] for key in ask("signing-key", "list", data=tmp_path / name)} for name in ("one", "two")]
    assert kids[0].isdisjoint(kids[1])


def test_a_database_of_a_newer_version_is_refused(tmp_path):
    data = tmp_path / "data"
    add_partner(data)
    set_version(data, "9999")
    assert "use a newer one" in refused("partner", "list", data=data)


def test_a_file_that_is_no_database_is_refused_in_one_line(tmp_path):
    data = tmp_path / "data"
    add_partner(data)
    for leftover in data.glob("gatelodge.db*"):
        leftover.unlink()
    (data / "gatelodge.db").write_text("no database at all, just words " * 200)
    assert "gatelodge.db" in refused("partner", "list", data=data)


def test_a_directory_that_cannot_be_made_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(
        "partner", "list", "--database", f"sqlite:///{tmp_path}/file/x.db", data=tmp_path / "data"
    )


def set_version(data, version):
    database = sqlite3.connect(data / "gatelodge.db")
    with database:
        database.execute("UPDATE alembic_version SET version_num = ?", (version,))
    database.close()
