"""R69: after everything that can be done, no secret that was given out stands in a file or a log. R70: what is logged."""

import base64
import hashlib
import json
import re
import urllib.parse
from datetime import datetime
from pathlib import Path

import pytest
from harness import Server, run_command
from outside import (
    REGISTER,
    RFC3339,
    ask,
    bearer,
    code_for,
    command,
    company,
    connect,
    fresh,
    log_in,
    mails_to,
    outcome,
    r_auth,
    refresh,
    register,
    run_sql,
    until,
)
from plans import judged
from plans import search as search_plans

from gatelodge.wire import checksum


def disguises(secret: str) -> dict[str, bytes]:
    """How a secret could stand somewhere without being seen at once."""
    plain = secret.encode()
    found = {
        "raw": plain,
        "reversed": plain[::-1],
        "hex": plain.hex().encode(),
        "hex in capitals": plain.hex().upper().encode(),
        "utf-16-le": secret.encode("utf-16-le"),
        "utf-16-be": secret.encode("utf-16-be"),
        "url-encoded": urllib.parse.quote(secret, safe="").encode(),
        "all url-encoded": "".join(f"%{byte:02X}" for byte in plain).encode(),
    }
    # In the midst of something longer, base64 begins at one of three offsets; what depends on the neighbours is left out.
    for offset in range(3):
        for name, alphabet in (("base64", None), ("base64url", b"-_")):
            text = base64.b64encode(b"\0" * offset + plain, altchars=alphabet)
            found[f"{name} at {offset}"] = text[4 if offset else 0 :][: (len(plain) - 3) // 3 * 4]
    return found


def parts(secret: str) -> list[str]:
    """The secret, and what of it is secret enough to be looked for by itself."""
    if secret.count(".") == 2:  # a JWT: its signature is what makes it one
        signature = secret.rpartition(".")[2]
        return [secret, signature, signature[:32], signature[-32:]]
    if "_pk_" in secret or "_ck_" in secret:  # the id is public, what follows is not
        return [secret, secret.rpartition("_")[2], secret.rpartition("_")[2][:30]]
    if "_rt_" in secret:
        return [secret, secret.rpartition("_rt_")[2], secret[-32:]]
    return [secret]


def search(files: dict[str, bytes], secrets: dict[str, str]) -> list[str]:
    """Where any of the secrets stands, in whatever disguise."""
    return [
        f"{what}, {how}, in {name}"
        for what, secret in secrets.items()
        for part in parts(secret)
        for how, pattern in disguises(part).items()
        for name, content in files.items()
        if pattern in content
    ]


def read_all(*roots: Path) -> dict[str, bytes]:
    files = [path for root in roots for path in ([root] if root.is_file() else root.rglob("*"))]
    return {str(path): path.read_bytes() for path in files if path.is_file()}


@pytest.mark.parametrize("how", disguises("x" * 40))
def test_r69_the_search_finds_a_secret_in_every_disguise(how):
    secret = f"gatelodge_uat_pk_{'k' * 12}_{'S3cret' * 5}ABCDEF"
    planted = b"before " + disguises(secret)[how] + b" after"
    assert search({"file": planted}, {"key": secret})
    assert not search({"file": b"before after"}, {"key": secret})


def test_r69_the_search_finds_a_secret_in_the_midst_of_base64():
    for offset in range(3):
        text = base64.b64encode(b"?" * offset + b"S3cret-S3cret-S3cret" + b"!")
        assert search({"file": text}, {"secret": "S3cret-S3cret-S3cret"})


class Teller:
    """Keeps every secret that it hears of."""

    def __init__(self) -> None:
        self.secrets: dict[str, str] = {}

    def keep(self, what: str, secret: str) -> str:
        self.secrets[f"{what} {len(self.secrets)}"] = secret
        return secret

    def session(self, tokens: dict[str, str]) -> dict[str, str]:
        self.keep("jwt", tokens["jwt"])
        self.keep("refresh token", tokens["refreshToken"])
        return tokens


def test_r69_no_secret_stands_in_a_file_or_a_log(tmp_path):  # noqa: PLR0915 - one long day
    data, heard, said = tmp_path / "data", Teller(), []

    def run(*args):
        done = command(*args, data=data)
        said.append(done.stderr)
        return done.stdout

    with Server(data, environ={"GATELODGE_LOGIN_FAILURE_LIMIT": "5/minute"}) as server, server.client() as client:
        heard.keep("master key", (data / "master.key").read_text().strip())
        added = json.loads(run("partner", "add", "Canary", "--email", "a@b.example", "--json"))
        key = heard.keep("partner key", added["apiKey"])
        session = heard.session(log_in(client, key))
        session = heard.session(refresh(client, session["refreshToken"]).json())
        retried = {"Idempotency-Key": heard.keep("idempotency key", fresh("0123456789-idempotency-"))}
        again = heard.session(refresh(client, session["refreshToken"], **retried).json())
        assert (
            heard.session(refresh(client, session["refreshToken"], **retried).json())["refreshToken"] == again["refreshToken"]
        )

        me = r_auth(again["jwt"])
        sealed = {**me, "Idempotency-Key": heard.keep("idempotency key", fresh("9876543210-idempotency-"))}
        body = company()
        made = client.post("/companies", json=body, headers=sealed).json()
        heard.keep("sealed company key", made["apiKey"])
        assert client.post("/companies", json=body, headers=sealed).json() == made
        other = client.post("/white-label-partner/create-company", json=company(), headers=me).json()
        heard.session(log_in(client, heard.keep("company key", other["apiKey"])))
        rotated = client.post(f"/companies/{other['companyId']}/key", json={"overlapSeconds": 9}, headers=me).json()
        heard.keep("rotated company key", rotated["apiKey"])

        # Each of them, once more, everywhere where it does not belong.
        for secret in list(heard.secrets.values()):
            client.post("/auth/login", json={"apiKey": secret})
            client.post("/auth/login", json={"apiKey": secret[:-1] + "0"})
            client.post("/auth/login", content=f'{{"apiKey": "{secret}"', headers={"Content-Type": "application/json"})
            client.get("/companies", headers={"Authorization": f"Bearer {secret}x", "X-Request-Id": "r" * 65})
            client.get("/companies", params={"apiKey": secret, "cursor": secret, "limit": secret}, headers=r_auth(key))
            client.post("/companies", json={"companyName": secret, "country": secret, "taxNumber": ""}, headers=r_auth(key))
            client.request("TRACE", "/companies", headers={"Referer": secret, "Cookie": secret, "User-Agent": secret})
            with connect(server) as raw:
                raw.sendall(f"GET /healthz HTTP/1.1\r\nR-Auth : {secret}\r\n\r\n".encode())
        run("key", "list", "canary")
        run("partner", "show", "canary")
        run("doctor")
        run("audit", "--json")
        issued = json.loads(run("key", "rotate", added["apiKey"].split("_")[3], "--overlap", "1h", "--json"))
        session = heard.session(log_in(client, heard.keep("rotated partner key", issued["apiKey"])))
        assert outcome(client.post("/auth/logout", json={"refreshToken": session["refreshToken"]})) == (204, None)
        said.append(run_command("partner", "suspend", "canary", data=data).stderr)
        client.post("/auth/login", json={"apiKey": key})
        assert server.process is not None

        while_running = read_all(data, server.log_path)
        names = {Path(name).name for name in while_running}
        assert names >= {
            "gatelodge.db",
            "gatelodge.db-wal",
            "gatelodge.db-shm",
            "master.key",
            "ca.pem",
            "server.pem",
            "data.log",
        }
        server.process.terminate()
        output = server.process.stdout.read()
        server.stop()
    files = while_running | {f"after {name}": content for name, content in read_all(tmp_path).items()}
    files |= {"what commands said": "".join(said).encode(), "what the server said": output.encode()}

    found = search(files, heard.secrets)
    kept = [place for place in found if not (place.startswith("master key 0, ") and place.endswith("master.key"))]
    assert kept == []
    assert len(found) >= 1, "the search does not even find the master key where it belongs"
    assert len(heard.secrets) > 15


# --- the same of tokens, codes and keys of the first seed -----------------------------------------------------------------


def disguises_of_code(code: str, address: str) -> dict[str, re.Pattern[bytes]]:
    """How a code could stand somewhere. Six digits are found by chance, so they count only where they are a word."""
    word = re.compile(rb"(?<![0-9A-Za-z])%b(?![0-9A-Za-z])" % code.encode())
    plain = {
        "hex": code.encode().hex(),
        "base64": base64.b64encode(code.encode()).decode(),
        "with its address": f"{address}\n{code}",
    }
    digests = {
        f"{name} of {what}": getattr(hashlib, name)(text.encode()).digest()
        for name in ("md5", "sha1", "sha256", "sha512")
        for what, text in (
            ("the code", code),
            ("code and address", f"{code}{address}"),
            ("address and code", f"{address}{code}"),
        )
    }
    found = {how: re.compile(re.escape(text.encode())) for how, text in plain.items()}
    found |= {how: re.compile(re.escape(digest)) for how, digest in digests.items()}
    found |= {f"{how} in hex": re.compile(digest.hex().encode(), re.IGNORECASE) for how, digest in digests.items()}
    found["utf-16"] = re.compile(rb"(?<!\d\0)" + re.escape(code.encode("utf-16-le")))
    return {"a word": word, **found}


def search_codes(files: dict[str, bytes], codes: dict[str, str]) -> list[tuple[str, str]]:
    """In which disguise any of the codes (by code: its address) stands, and where."""
    return [
        (how, name)
        for code, address in codes.items()
        for how, pattern in disguises_of_code(code, address).items()
        for name, content in files.items()
        if pattern.search(content)
    ]


def test_r69_the_search_finds_a_code_in_every_disguise():
    for how, planted in {
        "a word": b'"verificationCode":"314159"',
        "hex": b"x'333134313539'",
        "base64": b"?MzE0MTU5?",
        "with its address": b"a@b.example\n314159",
        "sha256 of the code": b"?" + hashlib.sha256(b"314159").digest(),
        "sha1 of address and code in hex": hashlib.sha1(b"a@b.example314159").hexdigest().upper().encode(),
        "utf-16": "code: 314159".encode("utf-16-le"),
    }.items():
        assert how in {found for found, _ in search_codes({"file": planted}, {"314159": "a@b.example"})}
    assert search_codes({"file": b"at 1314159265359, id a314159f"}, {"314159": "a@b.example"}) == []


def test_r69_no_access_token_no_code_and_no_registered_key_stands_in_a_file_or_a_log(tmp_path):  # noqa: PLR0915 - one long day
    data, heard, codes, said = tmp_path / "data", Teller(), {}, []

    def run(*args):
        done = command(*args, data=data)
        said.append(done.stderr)
        return json.loads(done.stdout) if "--json" in args else done.stdout

    def verify(to, code):
        return client.post(f"{REGISTER}/Verify", json={"contactEmail": to, "verificationCode": code})

    with Server(data, "--sample-api", "--workers", "2") as server, server.client() as client:
        # Access tokens: issued, used, rotated, revoked.
        added = run("partner", "add", "Canary", "--email", "a@b.example", "--json")
        key = heard.keep("partner key", added["apiKey"])
        issued = run("token", "issue", added["partnerId"], "--json")
        rotated = run("token", "rotate", issued["tokenId"], "--overlap", "1h", "--json")
        tokens = [heard.keep("access token", each["token"]) for each in (issued, rotated)]
        assert [judged(client, token) for token in tokens] == [(200, None)] * 2
        run("token", "revoke", issued["tokenId"])
        assert judged(client, tokens[0], r_auth) == (401, "credential_revoked")
        run("token", "list", added["partnerId"])
        run("token", "show", issued["tokenId"])

        # Registration: a key for a code, the answer once more, a new key for another code, two rotations.
        to = f"{fresh('dev')}@canary.example"
        code = code_for(server, client, to)
        codes[code] = to
        made = verify(to, code).json()
        assert verify(to, code).json() == made
        codes[again := code_for(server, client, to)] = to
        recovered = verify(to, again).json()
        sealed = {"Idempotency-Key": heard.keep("idempotency key", fresh("0123456789-idempotency-"))}
        answers = [client.post(f"{REGISTER}/Rotate", headers={**bearer(recovered["apiKey"]), **sealed}) for _ in range(2)]
        assert answers[0].json() == answers[1].json()
        last = client.post(f"{REGISTER}/Rotate", json={"overlapSeconds": 60}, headers=bearer(answers[0].json()["apiKey"]))
        for each in (made, recovered, answers[0].json(), last.json()):
            heard.keep("registered key", each["apiKey"])
        assert client.get(f"{REGISTER}/Usage", headers=bearer(last.json()["apiKey"])).status_code == 200
        pending = f"{fresh('dev')}@canary.example"
        codes[code_for(server, client, pending)] = pending
        assert len(codes) == 3

        # Each of them, once more, everywhere where it does not belong.
        for secret in [*heard.secrets.values(), *codes]:
            judged(client, secret)
            search_plans(client, secret + "x", r_auth)
            search_plans(client, tokens[1], partner=secret)
            search_plans(client, tokens[1], searchCriteria={"vin": secret, "mileage": 1, "zip": secret})
            turned = client.post(f"{REGISTER}/Rotate", headers={**bearer(secret), "Idempotency-Key": secret})
            if turned.status_code == 200:  # it belongs there after all
                newest = heard.keep("rotated key", turned.json()["apiKey"])
            client.post(f"{REGISTER}/Rotate", json={"overlapSeconds": secret}, headers=bearer(key))
            client.request("DELETE", REGISTER, params={"apiKey": secret}, headers={"Referer": secret, "User-Agent": secret})
            client.post(f"{REGISTER}/Verify", content=secret, headers={"Content-Type": "application/json"})
            assert outcome(verify(pending, secret + " "))[0] in {401, 429}
            register(client, secret, displayName=secret)
            register(client, pending, agreedToTerms=False, displayName=secret, websiteUrl=secret)
            with connect(server, tls=False) as raw:
                raw.sendall(f"POST {REGISTER}/Verify HTTP/1.1\r\nR-Auth: {secret}\r\n\r\n{secret}".encode())
        run("audit", "--json")
        run("key", "list", made["partnerId"])
        assert outcome(client.delete(REGISTER, headers=bearer(newest))) == (204, None)
        until(lambda: len(mails_to(server, to)) == 7, "two codes, four new keys and the end have been mailed")

        while_running = read_all(data, server.log_path)
        assert {Path(name).name for name in while_running} >= {"gatelodge.db", "gatelodge.db-wal", "data.log"}
        server.process.terminate()
        output = server.process.stdout.read()
        server.stop()
    files = while_running | {f"after {name}": content for name, content in read_all(tmp_path).items()}
    files |= {"what commands said": "".join(said).encode(), "what the server said": output.encode()}

    assert search(files, heard.secrets) == []
    assert len(heard.secrets) == 10
    found = search_codes(files, codes)
    assert {how for how, name in found if name.endswith(".eml")} == {"a word"}, "not even found where they belong"
    assert [place for place in found if not place[1].endswith(".eml")] == []


# --- what is logged -------------------------------------------------------------------------------------------------------


def lines(server):
    return [json.loads(line) for line in server.log_path.read_text().splitlines()]  # as any reader of lines would


def line_of(server, request_id):
    (line,) = [line for line in lines(server) if line.get("request_id") == request_id]
    return line


def test_r70_a_success_is_logged_with_who_what_and_when(server, client, partner):
    first, second = fresh("login-"), fresh("refresh-")
    answer = client.post("/auth/login", json={"apiKey": partner.key}, headers={"X-Request-Id": first})
    refresh(client, answer.json()["refreshToken"], **{"X-Request-Id": second})
    for request_id, event in ((first, "session.opened"), (second, "session.refreshed")):
        line = line_of(server, request_id)
        assert line["event"] == event
        assert (line["partner"], line["credential"], line["address"]) == (partner.id, partner.key_id, "127.0.0.1")
        logged = datetime.fromisoformat(line["at"])
        assert logged.utcoffset() is not None
        assert logged.utcoffset().total_seconds() == 0
        assert abs((datetime.now().astimezone() - logged).total_seconds()) < 300


@pytest.mark.parametrize(
    ("method", "path", "options", "code"),
    [
        ("POST", "/auth/login", {"json": {"apiKey": "nonsense"}}, "invalid_credential"),
        ("POST", "/auth/refresh", {"json": {"refreshToken": "nonsense"}}, "invalid_credential"),
        ("GET", "/companies", {"headers": {"R-Auth": "nonsense"}}, "invalid_credential"),
        ("GET", "/companies", {}, "credential_required"),
    ],
)
def test_r70_a_failure_is_logged_with_what_when_and_where_from(server, client, method, path, options, code):
    request_id = fresh("failure-")
    client.request(method, path, **{**options, "headers": {**options.get("headers", {}), "X-Request-Id": request_id}})
    line = line_of(server, request_id)
    assert (line["event"], line["code"], line["status"]) == ("refused", code, 401)
    assert (line["method"], line["path"], line["address"]) == (method, path, "127.0.0.1")
    assert datetime.fromisoformat(line["at"]).tzinfo is not None


def test_r70_a_refusal_names_the_key_that_was_refused(server, client, partner):
    request_id = fresh("revoked-")
    ask("key", "revoke", partner.key_id, data=server.data)
    client.post("/auth/login", json={"apiKey": partner.key}, headers={"X-Request-Id": request_id})
    line = line_of(server, request_id)
    assert (line["code"], line["subject"]) == ("credential_revoked", partner.key_id)


def test_r69_a_key_in_the_path_is_not_logged(server, client, partner):
    client.get(f"/companies/{partner.key}", headers=r_auth(partner.key))
    client.get(f"/{partner.key}")
    assert partner.key not in server.log_path.read_text()


def test_r70_no_control_character_can_forge_or_paint_a_line(server, client, partner):
    marker = fresh("forged-")
    forged = f'\r\n{{"event":"session.opened","partner":"{marker}"}}\n\x1b[2J\x1b[31m\x00\x07\x7f\u2028\u2029\x85\u202e'
    client.get("/" + urllib.parse.quote(forged))
    client.get("/companies/" + urllib.parse.quote(forged, safe=""), headers=r_auth(partner.key))
    client.post("/auth/login", json={"apiKey": forged})
    client.post("/companies", json=company(companyName=forged), headers=r_auth(partner.key))
    raw = server.log_path.read_bytes()
    assert marker.encode() in raw, "the path is logged, so the case is one"
    assert not [byte for byte in raw if not (0x20 <= byte < 0x7F or byte == 0x0A)]
    assert not [line for line in lines(server) if line.get("partner") == marker]
    assert all(isinstance(line, dict) and "at" in line and "event" in line for line in lines(server))


def test_r70_what_is_done_is_in_the_trail_too(server, client, partner):
    session = log_in(client, partner.key)
    client.post("/auth/logout", headers=r_auth(session["jwt"]))
    made = client.post("/companies", json=company(), headers=r_auth(partner.key)).json()
    client.post(f"/companies/{made['companyId']}/key", headers=r_auth(partner.key))
    client.delete(f"/companies/{made['companyId']}", headers=r_auth(partner.key))
    ask("key", "revoke", partner.key_id, data=server.data)
    trail = ask("audit", "--partner", partner.id, data=server.data)
    actions = [event["action"] for event in trail]
    expected = {"partner.added", "session.logout", "company.created", "key.rotated", "company.deleted", "key.revoked"}
    assert expected <= set(actions)
    assert all(event["partnerId"] == partner.id and event["actor"] and RFC3339.fullmatch(event["at"]) for event in trail)


def test_r67_a_broken_checksum_is_refused_without_a_look_at_the_database(server, client, partner):
    body = partner.key[:-6]
    assert checksum(body) == partner.key[-6:]
    broken = body + checksum(body + "x")
    run_sql(server.data, "ALTER TABLE credential RENAME TO away")
    try:
        assert outcome(client.post("/auth/login", json={"apiKey": broken})) == (401, "invalid_credential")
        assert outcome(client.post("/auth/login", json={"apiKey": partner.key}))[0] in {500, 503}
    finally:
        run_sql(server.data, "ALTER TABLE away RENAME TO credential")
    assert log_in(client, partner.key)
