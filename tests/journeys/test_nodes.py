"""Two nodes on one PostgreSQL, with nothing in front: what is begun at one goes on at the other."""

import pytest
from conftest import GENEROUS
from nodes import TwoNodes, settle
from outside import REGISTER, add_partner, ask, bearer, code_for, create_company, fresh, log_in, outcome, refresh, until, whoami
from plans import EXCEEDED, GOOD, issue_token, judged, used, within_an_hour

LIMIT = 10
REVOKED = (401, "credential_revoked")
ROTATED = (401, "credential_rotated")
REUSED = (401, "refresh_token_reused")


@pytest.fixture(scope="module")
def database():
    return "postgresql"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory, database):
    data = settle(tmp_path_factory.mktemp("nodes") / "data", database)
    with TwoNodes(data, "--sample-api", environ=GENEROUS) as running:
        yield running.nodes


@pytest.fixture
def one(nodes, clients):
    """A client of the first node."""
    return clients(nodes[0])


@pytest.fixture
def other(nodes, clients):
    """A client of the second node."""
    return clients(nodes[1])


@pytest.fixture
def acme(nodes):
    """A partner whom no other test knows."""
    return add_partner(nodes[0].data)


def verify(client, to, code):
    return client.post(f"{REGISTER}/Verify", json={"contactEmail": to, "verificationCode": code})


def test_from_a_registration_to_its_end_it_does_not_matter_which_node_answers(nodes, one, other, heeded):
    to = f"{fresh('dev')}@partner.example"
    code = code_for(nodes[0], one, to)
    verified = verify(other, to, code)
    assert outcome(verified) == GOOD
    assert verify(one, to, code).json() == verified.json(), "the answer may have been lost"
    key = verified.json()["apiKey"]

    session = log_in(one, key)
    assert outcome(verify(other, to, code)) == (401, "invalid_verification_code"), "the key is in use"
    retry = {"Idempotency-Key": fresh("refresh-")}
    answers = [refresh(client, session["refreshToken"], **retry) for client in (other, one, other)]
    assert [outcome(answer) for answer in answers] == [GOOD] * 3
    (successor,) = {answer.json()["refreshToken"] for answer in answers}
    jwts = [session["jwt"], *(answer.json()["jwt"] for answer in answers)]
    assert [whoami(client, jwt) for jwt in jwts for client in (one, other)] == [GOOD] * 8

    # Rotated at the other node, refused at the first one, which has just let it in.
    rotated = other.post(f"{REGISTER}/Rotate", headers=bearer(key)).json()["apiKey"]
    assert whoami(one, rotated) == GOOD
    heeded(lambda: [whoami(one, credential) for credential in (key, *jwts)], [ROTATED] * 5)
    assert outcome(refresh(one, successor)) == ROTATED

    assert whoami(other, rotated) == GOOD
    assert outcome(one.delete(REGISTER, headers=bearer(rotated))) == (204, None)
    heeded(lambda: whoami(other, rotated), REVOKED)
    assert outcome(other.post("/auth/login", json={"apiKey": rotated})) == REVOKED


def test_r25_a_refresh_token_is_spent_at_every_node_and_its_reuse_at_one_ends_the_session_at_the_other(
    one, other, acme, heeded
):
    first = log_in(one, acme.key)
    second = refresh(other, first["refreshToken"]).json()
    assert [whoami(client, second["jwt"]) for client in (one, other)] == [GOOD] * 2
    assert outcome(refresh(one, first["refreshToken"])) == REUSED
    heeded(lambda: whoami(other, second["jwt"]), REVOKED)
    assert outcome(refresh(other, second["refreshToken"])) == REUSED


@pytest.mark.parametrize("by", ["refresh-token", "jwt"])
def test_a_logout_at_one_node_is_heeded_at_the_other(one, other, acme, heeded, by):
    session, bystander = log_in(other, acme.key), log_in(other, acme.key)
    assert whoami(other, session["jwt"]) == whoami(other, bystander["jwt"]) == GOOD
    way = {"json": {"refreshToken": session["refreshToken"]}} if by == "refresh-token" else {"headers": bearer(session["jwt"])}
    assert outcome(one.post("/auth/logout", **way)) == (204, None)
    heeded(lambda: whoami(other, session["jwt"]), REVOKED)
    assert outcome(refresh(other, session["refreshToken"])) == REVOKED
    assert whoami(other, bystander["jwt"]) == GOOD


def test_p3_what_a_command_revokes_beside_one_node_is_refused_at_both(nodes, one, other, acme, heeded):
    session, made = log_in(one, acme.key), create_company(one, acme.key)
    token = issue_token(nodes[0].data, acme.id)
    held = [acme.key, session["jwt"], made["apiKey"], token.text]
    assert [judged(client, credential) for client in (one, other) for credential in held] == [GOOD] * 8

    ask("token", "revoke", token.id, data=nodes[1].data)
    heeded(lambda: [judged(client, token.text) for client in (one, other)], [REVOKED] * 2)
    ask("key", "revoke", acme.key_id, data=nodes[1].data)
    heeded(lambda: [judged(client, credential) for client in (one, other) for credential in held[:2]], [REVOKED] * 4)
    assert [judged(client, made["apiKey"]) for client in (one, other)] == [GOOD] * 2
    assert outcome(refresh(one, session["refreshToken"])) == REVOKED


def test_p5_a_quota_is_one_over_both_nodes(nodes, one, other):
    def measure():
        caller, tier = add_partner(nodes[0].data), fresh("tier-")
        ask("tier", "set", tier, "--per-hour", str(LIMIT), "--per-day", "100000", data=nodes[0].data)
        ask("partner", "tier", caller.id, tier, data=nodes[0].data)
        let_in = {one: 0, other: 0}

        def is_spent():
            for client in let_in:
                verdict = judged(client, caller.key)
                assert verdict in {GOOD, EXCEEDED}
                let_in[client] += verdict == GOOD
            return sum(let_in.values()) >= LIMIT

        # What one node holds and does not use the other lets in.
        until(is_spent, "all of the quota is used")
        assert [judged(client, caller.key) for client in (one, other) * 3] == [EXCEEDED] * 6
        assert used(one, caller.key) == used(other, caller.key) == (LIMIT, LIMIT)
        return min(let_in.values()) > 0, sum(let_in.values())

    assert within_an_hour(measure) == (True, LIMIT)


def test_what_one_node_signs_both_publish(one, other):
    sets = [client.get("/.well-known/jwks.json").json()["keys"] for client in (one, other)]
    assert sets[0] == sets[1]
