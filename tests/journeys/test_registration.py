"""The self-service way, by HTTP and mail alone: a code, a key, the published call, and all that becomes of the key."""

import re
from typing import Any

import pytest
from harness import Server
from nodes import on_database, two_processes
from outside import (
    REGISTER,
    ask,
    bearer,
    create_company,
    fresh,
    log_in,
    lose_answer,
    outcome,
    register,
    run_sql,
    until,
)
from plans import GOOD, SEED, Curl, every_worker, judged, used, within_an_hour
from smtp import STALL, MailHost, free_port

pytestmark = pytest.mark.each_database
CODE = re.compile(r"^Your code is (\d{6})$", re.MULTILINE)
INVALID_CODE = (401, "invalid_verification_code")
REVOKED = (401, "credential_revoked")
ROTATED = (401, "credential_rotated")
SUSPENDED = (403, "partner_suspended")
SPENT = (409, "idempotency_key_spent")
GENEROUS = {
    "GATELODGE_REGISTRATION_LIMIT": "1000000/hour",
    "GATELODGE_VERIFICATION_FAILURE_LIMIT": "1000000/minute",
    "GATELODGE_MAILS_PER_ADDRESS": "100",
    "GATELODGE_MAILS_OVERALL": "100000",
}


def mailing(port: int) -> dict[str, str]:
    return {**GENEROUS, "GATELODGE_SMTP": f"smtp://127.0.0.1:{port}"}


@pytest.fixture(scope="module")
def post():
    """A mail server that takes everything."""
    with MailHost() as host:
        yield host


@pytest.fixture(scope="module")
def desk(tmp_path_factory, database, post):
    """The sample API behind its gate, served by two workers or two nodes, which send their mails."""
    data = tmp_path_factory.mktemp("desk") / "data"
    with two_processes(database, data, "--sample-api", environ=mailing(post.port)) as running:
        yield running


@pytest.fixture
def visitor(desk):
    with desk.client() as client:
        yield client


@pytest.fixture
def workers(desk):
    with every_worker(desk) as clients:
        yield clients


def address() -> str:
    """One that nobody has used before."""
    return f"{fresh('dev')}@partner.example"


def letters(post, to):
    """The mails that have arrived for an address."""
    return [letter for letter in post.received if letter.recipients == [to]]


def subjects(post, to):
    return [letter.message["Subject"].partition(" for ")[0] for letter in letters(post, to)]


def next_letter(post, to, count):
    return until(lambda: letters(post, to)[count:], f"letter {count + 1} to {to}")[0]


def code_by_mail(post, client, to, **changes) -> str:
    """Register, and read the code in the mail that comes."""
    count = len(letters(post, to))
    answer = register(client, to, **changes)
    assert answer.status_code == 202, answer.text
    (code,) = CODE.findall(next_letter(post, to, count).text.replace("\r\n", "\n"))
    return code


def verify(client, to, code):
    return client.post(f"{REGISTER}/Verify", json={"contactEmail": to, "verificationCode": code})


def registered(post, client, to, **changes) -> dict[str, Any]:
    """The answer to a Verify."""
    answer = verify(client, to, code_by_mail(post, client, to, **changes))
    assert answer.status_code == 200, answer.text
    return answer.json()


def rotate(client, key, asked=None, **headers):
    body = {"json": asked} if asked is not None else {}
    return client.post(f"{REGISTER}/Rotate", headers={**bearer(key), **headers}, **body)


def keys_of(server, partner_id):
    return ask("key", "list", partner_id, data=server.data)


def other_than(code):
    return f"{(int(code) + 1) % 10**6:06}"


def lapse_claims(server):
    """As if a minute and a half had gone by, which whoever has begun with a mail is given for it; how many mails wait."""
    return len(run_sql(server.data, "UPDATE outbox SET due_at = created_at WHERE ended_at IS NULL RETURNING id"))


# --- the whole way --------------------------------------------------------------------------------------------------------


def test_from_an_address_to_a_key_that_lives_and_dies(desk, post, visitor, workers, heeded, tmp_path):
    curl, to, name = Curl(tmp_path), address(), fresh("Motors ")

    def first_calls():
        key = registered(post, visitor, address())["apiKey"]
        assert used(visitor, key) == (0, 0)
        for made in range(1, 4):
            assert curl(SEED, desk, key).status == 200
            seen = used(visitor, key)
            assert min(seen) >= made, "never less than there were"
        # What another worker has leased and does not use comes back within a moment.
        until(lambda: used(visitor, key) == (3, 3), "the Usage shows exactly the calls made")
        return key

    within_an_hour(first_calls)

    first = registered(post, visitor, to, organizationName=name, displayName="Eva Muster")
    partner_id = name.lower().replace(" ", "-")
    assert (first["partnerId"], first["tier"], first["expiresAt"]) == (partner_id, "starter", None)
    said = curl(SEED, desk, first["apiKey"])
    assert (said.status, said.body["partner"]) == (200, partner_id)
    assert said.body["plans"]
    about = visitor.get(f"{REGISTER}/Usage", headers=bearer(first["apiKey"])).json()
    assert (about["displayName"], about["contactEmail"], about["status"]) == ("Eva Muster", to, "active")

    # Rotate: the old key is refused from the moment of the answer on, and its owner is told.
    assert [judged(client, first["apiKey"]) for client in workers] == [GOOD] * 2
    second = rotate(visitor, first["apiKey"]).json()
    heeded(lambda: [judged(client, first["apiKey"]) for client in workers], [ROTATED] * 2)
    assert [judged(client, second["apiKey"]) for client in workers] == [GOOD] * 2
    assert {**second, "apiKey": ""} == {**first, "apiKey": ""}
    until(lambda: len(letters(post, to)) == 2, "the owner is told")

    # With an overlap both work.
    third = rotate(visitor, second["apiKey"], {"overlapSeconds": 3600}).json()
    assert [judged(client, key["apiKey"]) for client in workers for key in (second, third)] == [GOOD] * 4
    until(lambda: len(letters(post, to)) == 3, "the owner is told")

    # Deactivate: dead for good, with all that came of it.
    session = log_in(visitor, third["apiKey"])
    company = create_company(visitor, third["apiKey"])
    alive = [second["apiKey"], third["apiKey"], session["jwt"], company["apiKey"]]
    assert [judged(client, credential) for client in workers for credential in alive] == [GOOD] * 8
    assert outcome(visitor.delete(REGISTER, headers=bearer(third["apiKey"]))) == (204, None)
    heeded(lambda: [judged(client, credential) for client in workers for credential in alive], [REVOKED] * 8)
    assert outcome(visitor.get(f"{REGISTER}/Usage", headers=bearer(third["apiKey"]))) == REVOKED
    assert outcome(rotate(visitor, third["apiKey"])) == REVOKED
    assert curl(SEED, desk, third["apiKey"]).status == 401
    until(lambda: len(letters(post, to)) == 4, "the owner is told")
    assert subjects(post, to) == [
        "Your verification code",
        "Your API key",
        "Your API key",
        letters(post, to)[3].message["Subject"],
    ]
    assert letters(post, to)[3].message["Subject"].startswith("Your access to ")

    # The address may register anew: a new partner, and nothing of the old one comes back.
    anew = registered(post, visitor, to, organizationName=name)
    assert anew["partnerId"] != partner_id
    assert curl(SEED, desk, anew["apiKey"]).body["partner"] == anew["partnerId"]
    assert judged(visitor, third["apiKey"]) == REVOKED


# --- recovery -------------------------------------------------------------------------------------------------------------


def test_whoever_reads_an_active_partners_mail_gets_a_new_key_in_the_place_of_the_old_one(desk, post, visitor, workers, heeded):
    to = address()
    old = registered(post, visitor, to)
    ask("tier", "set", "business", "--per-hour", "500", "--per-day", "5000", data=desk.data)
    ask("partner", "tier", old["partnerId"], "business", data=desk.data)
    session = log_in(visitor, old["apiKey"])
    code = code_by_mail(post, visitor, to, organizationName="Mallory Inc", displayName="Mallory")
    assert letters(post, to)[-1].message["Subject"].startswith("Your recovery code ")
    assert "Mallory" not in letters(post, to)[-1].text
    # Asking alone changes nothing.
    assert [judged(client, credential) for client in workers for credential in (old["apiKey"], session["jwt"])] == [GOOD] * 4

    new = verify(visitor, to, code).json()
    assert (new["partnerId"], new["tier"]) == (old["partnerId"], "business")
    assert new["apiKey"] != old["apiKey"]
    of_old = (old["apiKey"], session["jwt"])
    heeded(lambda: [judged(client, credential) for client in workers for credential in of_old], [ROTATED] * 4)
    assert [judged(client, new["apiKey"]) for client in workers] == [GOOD] * 2
    notice = next_letter(post, to, 2)
    assert notice.message["Subject"].endswith(" was replaced by a mailed code")
    assert new["apiKey"] not in notice.text
    assert not CODE.search(notice.text)
    about = visitor.get(f"{REGISTER}/Usage", headers=bearer(new["apiKey"])).json()
    assert about["displayName"] == "Acme Motors"


def test_the_address_of_a_suspended_partner_is_sent_no_code(desk, post, visitor, heeded):
    to = address()
    key = registered(post, visitor, to)
    code = CODE.findall(letters(post, to)[0].text.replace("\r\n", "\n"))[0]
    ask("partner", "suspend", key["partnerId"], data=desk.data)
    assert register(visitor, to).status_code == 202
    notice = next_letter(post, to, 1)
    assert notice.message["Subject"].endswith(" is suspended")
    assert not re.search(r"\b\d{6}\b", notice.text)
    assert outcome(verify(visitor, to, code)) == INVALID_CODE
    heeded(lambda: judged(visitor, key["apiKey"]), SUSPENDED)
    ask("partner", "resume", key["partnerId"], data=desk.data)
    heeded(lambda: judged(visitor, key["apiKey"]), GOOD)


def test_r58_a_new_code_kills_the_older_and_a_code_goes_with_its_address(post, visitor):
    to, another = address(), address()
    older, newer, foreign = (code_by_mail(post, visitor, who) for who in (to, to, another))
    for wrong in {older, foreign} - {newer}:
        assert outcome(verify(visitor, to, wrong)) == INVALID_CODE
    assert outcome(verify(visitor, to, newer)) == GOOD


def test_r59_twenty_five_failures_a_day_are_not_forgiven_for_a_new_code(post, visitor):
    def measure():
        to = address()
        for _ in range(5):
            wrong = other_than(code_by_mail(post, visitor, to))
            assert [outcome(verify(visitor, to, wrong)) for _ in range(5)] == [INVALID_CODE] * 5
        return outcome(verify(visitor, to, code_by_mail(post, visitor, to)))

    assert within_an_hour(measure) == INVALID_CODE


def test_r59_twenty_four_failures_are_not_yet_too_many(post, visitor):
    to = address()
    for count in (5, 5, 5, 5, 4):
        code = code_by_mail(post, visitor, to)
        assert [outcome(verify(visitor, to, other_than(code))) for _ in range(count)] == [INVALID_CODE] * count
    assert outcome(verify(visitor, to, code)) == GOOD


def test_r65_whoever_registers_anothers_address_first_is_left_with_nothing(desk, post, visitor):
    victim = address()
    planted = code_by_mail(post, visitor, victim, displayName="Mallory", organizationName=fresh("Mallory "))
    mine = registered(post, visitor, victim, displayName="Victim", organizationName=fresh("Victim "))
    assert mine["partnerId"].startswith("victim-")
    assert outcome(verify(visitor, victim, planted)) == INVALID_CODE
    about = visitor.get(f"{REGISTER}/Usage", headers=bearer(mine["apiKey"])).json()
    assert about["displayName"] == "Victim"
    assert len(keys_of(desk, mine["partnerId"])) == 1
    # A later Register of somebody else's changes nothing of what the owner has.
    register(visitor, victim, displayName="Mallory")
    assert judged(visitor, mine["apiKey"]) == GOOD


def test_r65_a_pending_registration_is_no_partner_and_ends_with_its_code(desk, post, visitor):
    to = address()
    partners = {partner["partnerId"] for partner in ask("partner", "list", data=desk.data)}
    code = code_by_mail(post, visitor, to)
    assert {partner["partnerId"] for partner in ask("partner", "list", data=desk.data)} == partners
    expire = "UPDATE verification SET expires_at = created_at + 1 WHERE address = :address RETURNING address"
    assert run_sql(desk.data, expire, address=to) == [(to,)]
    assert outcome(verify(visitor, to, code)) == INVALID_CODE


# --- lost answers ---------------------------------------------------------------------------------------------------------


def lose_verify(server, to, code):
    lose_answer(server, "POST", f"{REGISTER}/Verify", {"contactEmail": to, "verificationCode": code}, {})


def test_p11_a_lost_answer_to_a_verification_is_given_again_by_every_worker(desk, post, visitor, workers):
    to = address()
    code = code_by_mail(post, visitor, to)
    lose_verify(desk, to, code)
    answers = [verify(client, to, code) for client in workers * 2]
    assert {outcome(answer) for answer in answers} == {GOOD}
    (key,) = {answer.json()["apiKey"] for answer in answers}
    assert len(keys_of(desk, answers[0].json()["partnerId"])) == 1
    assert judged(workers[0], key) == GOOD
    assert [outcome(verify(client, to, code)) for client in workers] == [INVALID_CODE] * 2
    assert judged(workers[1], key) == GOOD


def test_p11_lost_answers_outlive_kill_9(tmp_path, database, post):
    to = address()
    with on_database(database, tmp_path / "data", "--sample-api", environ=mailing(post.port)) as server:
        with server.client() as client:
            code = code_by_mail(post, client, to)
            lose_verify(server, to, code)
        server.kill()
        server.start()
        with server.client() as client:
            first = verify(client, to, code).json()
            assert outcome(verify(client, to, other_than(code))) == INVALID_CODE
            assert judged(client, first["apiKey"]) == GOOD
            assert outcome(verify(client, to, code)) == INVALID_CODE
        server.kill()
        server.start()
        with server.client() as client:
            assert outcome(verify(client, to, code)) == INVALID_CODE, "the key has been used: that is remembered too"
            again = {**bearer(first["apiKey"]), "Idempotency-Key": fresh("rotate-")}
            lose_answer(server, "POST", f"{REGISTER}/Rotate", {"overlapSeconds": 0}, again)
        server.kill()
        server.start()
        with server.client() as client:
            assert judged(client, first["apiKey"]) == ROTATED
            answers = [client.post(f"{REGISTER}/Rotate", json={"overlapSeconds": 0}, headers=again) for _ in range(2)]
            assert {outcome(answer) for answer in answers} == {GOOD}
            (key,) = {answer.json()["apiKey"] for answer in answers}
            assert judged(client, key) == GOOD
            spent = client.post(f"{REGISTER}/Rotate", json={"overlapSeconds": 0}, headers=again)
            assert outcome(spent) == SPENT
            assert len(keys_of(server, first["partnerId"])) == 2
        lapse_claims(server)
        until(lambda: len(letters(post, to)) >= 2, "the owner is told")
        # Of a crash between sending and writing it down comes a second copy, which says that it is one.
        assert len({letter.message["Message-ID"] for letter in letters(post, to)}) == 2


def test_p11_a_lost_answer_to_a_rotation_is_given_again_by_every_worker_and_there_is_one_key_and_one_mail(
    desk, post, visitor, workers, heeded
):
    to = address()
    old = registered(post, visitor, to)
    again = {"Idempotency-Key": fresh("rotate-")}
    lose_answer(desk, "POST", f"{REGISTER}/Rotate", {"overlapSeconds": 0}, {**bearer(old["apiKey"]), **again})
    heeded(lambda: [judged(client, old["apiKey"]) for client in workers], [ROTATED] * 2)
    answers = [rotate(client, old["apiKey"], {"overlapSeconds": 0}, **again) for client in workers * 2]
    assert {outcome(answer) for answer in answers} == {GOOD}
    (key,) = {answer.json()["apiKey"] for answer in answers}
    assert len(keys_of(desk, old["partnerId"])) == 2
    assert outcome(rotate(visitor, old["apiKey"])) == ROTATED
    assert judged(workers[0], key) == GOOD
    assert [outcome(rotate(client, old["apiKey"], {"overlapSeconds": 0}, **again)) for client in workers] == [SPENT] * 2

    # What is mailed for one rotation has arrived when the mail of a later one has.
    rotate(visitor, key)
    until(lambda: len(letters(post, to)) >= 3, "both rotations have been told of")
    assert len(letters(post, to)) == 3
    queued = "SELECT count(*) FROM outbox WHERE recipient = :to AND kind = 'key_rotated'"
    assert run_sql(desk.data, queued, to=to) == [(2,)]


# --- mails that have it hard ----------------------------------------------------------------------------------------------


def test_r62_a_mail_server_that_never_answers_keeps_nobody_waiting_for_register(tmp_path):
    with MailHost() as post:
        post.rcpt = [STALL] * 8
        environ = mailing(post.port)
        with Server(tmp_path / "data", environ=environ) as server, server.client() as client:
            answers = [register(client, address()) for _ in range(8)]
            assert {answer.status_code for answer in answers} == {202}
            until(lambda: post.attempts, "the mail server has been asked")
            assert {register(client, address()).status_code for _ in range(4)} == {202}
            assert post.received == []


def test_a_mail_arrives_although_the_mail_server_was_down(tmp_path):
    port, to = free_port(), address()
    with Server(tmp_path / "data", environ=mailing(port)) as server, server.client() as client:
        assert register(client, to).status_code == 202
        until(lambda: '"mail_deferred"' in server.log_path.read_text(), "the mail has been tried in vain")
        with MailHost(port=port) as post:
            (code,) = CODE.findall(next_letter(post, to, 0).text.replace("\r\n", "\n"))
            assert verify(client, to, code).status_code == 200
            assert len(letters(post, to)) == 1


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_mail_arrives_although_the_server_was_killed_while_it_sent_it(tmp_path, workers):
    to = address()
    with MailHost() as post:
        post.rcpt = [STALL]
        with Server(tmp_path / "data", "--workers", workers, environ=mailing(post.port)) as server:
            with server.client() as client:
                assert register(client, to).status_code == 202
            until(lambda: post.attempts, "the mail is on its way")
            server.kill()
            assert post.received == []
            assert lapse_claims(server) == 1
            server.start()
            (code,) = CODE.findall(next_letter(post, to, 0).text.replace("\r\n", "\n"))
            with server.client() as client:
                assert verify(client, to, code).status_code == 200
            assert len(letters(post, to)) == 1
