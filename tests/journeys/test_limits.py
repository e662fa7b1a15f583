"""Limits that hold against a crowd: of guesses at a code, and of calls; over workers and nodes, and over a crash in the middle."""

import asyncio
import random
import re
import time
from collections import Counter
from datetime import UTC, datetime
from itertools import cycle

import httpx2
import pytest
from harness import Server
from nodes import on_database, two_processes
from outside import (
    REGISTER,
    add_partner,
    ask,
    bearer,
    code_in,
    create_company,
    fresh,
    log_in,
    next_mail_to,
    outcome,
    problem,
    register,
    run_sql,
    until,
)
from plans import (
    ASKED,
    EXCEEDED,
    GOOD,
    SEARCH,
    every_node,
    every_worker,
    issue_token,
    judged,
    search,
    used,
    within_an_hour,
)
from sqlalchemy import insert

from gatelodge_server.app import assemble
from gatelodge_server.deployment import load_master_keys, prepare
from gatelodge_server.settings import load_settings
from gatelodge_server.store.sqlite import sqlite_engine
from gatelodge_server.store.tables import access_token, partner
from gatelodge_server.vault import Vault, system_entropy

INVALID_CODE = (401, "invalid_verification_code")
BUSY = {(503, "unavailable"), (429, "too_many_failures")}
"""There are so many places for slow digests in all, and so many for one sender: whoever finds none is not judged."""
INVALID = (401, "invalid_credential")
REVOKED = (401, "credential_revoked")
QUOTA_TYPE = "https://iana.org/assignments/http-problem-types#quota-exceeded"
LIMIT = 100
GUESSES = 200
CALLS = 1_000
PARTNERS = 10_000
WHILE = 1.0
"""Seconds; a slice that lies idle is given back after a quarter of one."""


@pytest.fixture(params=["plans_server", "plans_workers"], ids=["one-process", "two-processes"])
def either(request, database):
    """A deployment that one process serves, and one that two do."""
    return request.getfixturevalue(request.param)


def limited_partner(server, limit=LIMIT):
    """A partner of a tier of its own."""
    tier = fresh("tier-")
    ask("tier", "set", tier, "--per-hour", str(limit), "--per-day", "100000", data=server.data)
    added = add_partner(server.data)
    ask("partner", "tier", added.id, tier, data=server.data)
    return added


def at_once(server, requests, connections=64):
    """The answers to many requests, as many of them under way at the same time as there are connections.

    ``requests`` are ``(path, body, headers)``. What is cut off by a server that dies has the answer ``None``.
    """

    async def send(client, request, turns):
        path, body, headers = request
        async with turns:
            try:
                return await client.post(path, json=body, headers=headers)
            except httpx2.TransportError:
                return None

    async def send_all():
        turns = asyncio.Semaphore(connections)
        async with every_node(server) as clients:
            return await asyncio.gather(*(send(*one, turns) for one in zip(cycle(clients), requests, strict=False)))

    return asyncio.run(send_all())


def calls(credential, count):
    return [(SEARCH, ASKED, bearer(credential))] * count


def partners_registered(server, address):
    return run_sql(server.data, "SELECT id FROM partner WHERE registered_address = :address", address=address)


# --- guesses at a code ----------------------------------------------------------------------------------------------------


@pytest.mark.each_database
def test_r59_of_two_hundred_guesses_at_once_no_more_than_five_are_judged(either):
    to = f"{fresh('dev')}@guessed.example"
    with either.client() as client:
        assert register(client, to).status_code == 202
        code = code_in(next_mail_to(either, to, 0))
        guesses = [f"{number:06}" for number in random.sample(range(10**6), GUESSES + 1)]
        wrong = [guess for guess in guesses if guess != code][:GUESSES]
        verify = f"{REGISTER}/Verify"
        answers = at_once(either, [(verify, {"contactEmail": to, "verificationCode": guess}, {}) for guess in wrong])
        assert len(answers) == GUESSES
        assert {outcome(answer) for answer in answers} <= {INVALID_CODE, *BUSY}
        counted = "SELECT attempts, day_failures FROM verification WHERE address = :address"
        assert run_sql(either.data, counted, address=to) == [(5, 5)]
        right = client.post(verify, json={"contactEmail": to, "verificationCode": code})
        assert outcome(right) == INVALID_CODE
        assert not partners_registered(either, to)


@pytest.mark.each_database
def test_r59_a_right_guess_in_the_crowd_is_worth_one_key_or_none(either):
    """Each of many is right: all that are judged hear of the same key, and nobody hears of another."""
    to = f"{fresh('dev')}@guessed.example"
    with either.client() as client:
        register(client, to)
        code = code_in(next_mail_to(either, to, 0))
    asked = (f"{REGISTER}/Verify", {"contactEmail": to, "verificationCode": code}, {})
    answers = at_once(either, [asked] * 50)
    assert {outcome(answer) for answer in answers} <= {GOOD, INVALID_CODE, *BUSY}
    keys = {answer.json()["apiKey"] for answer in answers if answer.status_code == 200}
    assert len(keys) == 1
    assert len(partners_registered(either, to)) == 1


# --- calls ----------------------------------------------------------------------------------------------------------------

POLICY = re.compile(r'"hour";q=(\d+);w=3600, "day";q=(\d+);w=86400')
RATE = re.compile(r'"hour";r=(\d+);t=(\d+), "day";r=(\d+);t=(\d+)')


def read_rates(answer, limit=LIMIT):
    """What is left of the hour, by the rate headers; all of them must agree with each other and with the clock."""
    policy, rate = POLICY.fullmatch(answer.headers["ratelimit-policy"]), RATE.fullmatch(answer.headers["ratelimit"])
    assert policy, answer.headers["ratelimit-policy"]
    assert rate, answer.headers["ratelimit"]
    assert (int(policy[1]), int(policy[2])) == (limit, 100_000)
    remaining, left = int(rate[1]), int(rate[2])
    assert 0 <= remaining <= limit
    assert 0 <= left <= 3600
    assert int(answer.headers["x-ratelimit-limit"]) == limit
    assert int(answer.headers["x-ratelimit-remaining"]) == remaining
    reset = int(answer.headers["x-ratelimit-reset"])
    assert reset % 3600 == 0
    assert 0 <= reset - datetime.now(UTC).timestamp() <= 3600
    return remaining


def assert_exceeded(answer):
    said = problem(answer)
    assert (answer.status_code, said["status"], said["code"], said["type"]) == (429, 429, "quota_exceeded", QUOTA_TYPE)
    assert said["violated-policies"] == ["hour"]
    assert answer.headers["content-type"] == "application/problem+json"
    assert 1 <= int(answer.headers["retry-after"]) <= 3600
    assert read_rates(answer) == 0


def test_p5_of_a_thousand_calls_at_once_exactly_a_hundred_are_let_in(plans_server):
    def measure():
        caller = limited_partner(plans_server)
        token = issue_token(plans_server.data, caller.id)
        answers = at_once(plans_server, calls(token.text, CALLS))
        with plans_server.client() as client:
            assert used(client, caller.key) == (LIMIT, LIMIT)
        let_in = [answer for answer in answers if answer.status_code == 200]
        assert all(answer.json()["plans"] for answer in let_in)
        # Each of them was told of another number that is left.
        assert sorted(read_rates(answer) for answer in let_in) == list(range(LIMIT))
        for answer in answers:
            if answer.status_code != 200:
                assert_exceeded(answer)
        return Counter(answer.status_code for answer in answers)

    assert within_an_hour(measure) == {200: LIMIT, 429: CALLS - LIMIT}


def let_in_after_all(server, credential, already):
    """Go on asking until nobody has been let in for a while; how many were let in altogether. Idle slices come back by then."""
    total, since = already, time.monotonic()
    with every_worker(server) as clients:

        def is_over():
            nonlocal total, since
            answers = [outcome(search(client, credential)) for client in clients]
            assert set(answers) <= {GOOD, EXCEEDED}
            if GOOD in answers:
                total, since = total + answers.count(GOOD), time.monotonic()
            assert total <= LIMIT
            return time.monotonic() - since > WHILE

        until(is_over, "nothing more is let in")
    return total


@pytest.mark.each_database
def test_p5_two_processes_together_let_exactly_a_hundred_in(plans_workers):
    def measure():
        caller = limited_partner(plans_workers)
        token = issue_token(plans_workers.data, caller.id)
        answers = at_once(plans_workers, calls(token.text, CALLS))
        statuses = Counter(answer.status_code for answer in answers)
        assert set(statuses) == {200, 429}
        assert statuses[200] <= LIMIT
        for answer in answers:
            assert read_rates(answer) < LIMIT
            if answer.status_code == 429:
                assert_exceeded(answer)
        total = let_in_after_all(plans_workers, token.text, statuses[200])
        with plans_workers.client() as client:
            return total, used(client, caller.key)

    assert within_an_hour(measure) == (LIMIT, (LIMIT, LIMIT))


@pytest.mark.each_database
def test_p5_what_one_process_holds_and_does_not_use_the_other_lets_in(plans_workers):
    def measure():
        caller = limited_partner(plans_workers)
        token = issue_token(plans_workers.data, caller.id).text
        with every_worker(plans_workers) as (one, other):

            def call_and_look():
                assert judged(one, token) == GOOD
                taken_of = "SELECT hour_taken FROM quota WHERE partner_id = :partner"
                ((taken,),) = run_sql(plans_workers.data, taken_of, partner=caller.id)
                made.append(taken)
                return taken > len(made)

            made = []
            until(call_and_look, "it holds more than it has used")

            def fill_up():
                verdict = judged(other, token)
                assert verdict in {GOOD, EXCEEDED}
                made.extend([GOOD] * (verdict == GOOD))
                return len(made) == LIMIT

            until(fill_up, "the other lets the rest in")
            assert [judged(client, token) for client in (one, other)] == [EXCEEDED] * 2
        return True

    assert within_an_hour(measure)


@pytest.mark.each_database
@pytest.mark.parametrize("make", [on_database, two_processes], ids=["one-process", "two-processes"])
def test_p5_over_a_kill_9_in_the_middle_no_more_than_a_hundred_are_let_in(tmp_path, database, make):
    with make(database, tmp_path / "data", "--sample-api") as server:

        def measure():
            caller = limited_partner(server)
            token = issue_token(server.data, caller.id)

            async def flood_and_kill():
                let_in, enough = [], asyncio.Event()

                async def call(client):
                    while True:
                        try:
                            answer = await client.post(SEARCH, json=ASKED, headers=bearer(token.text))
                        except httpx2.TransportError:
                            return
                        if answer.status_code == 429:
                            return
                        let_in.append(outcome(answer))
                        if len(let_in) >= LIMIT // 3:
                            enough.set()

                async with every_node(server) as clients:
                    flood = [asyncio.create_task(call(client)) for client in clients for _ in range(16 // len(clients))]
                    async with asyncio.timeout(30):
                        await enough.wait()
                    await asyncio.to_thread(server.kill)
                    await asyncio.gather(*flood)
                return let_in

            let_in = asyncio.run(flood_and_kill())
            assert set(let_in) == {GOOD}
            server.start()
            return len(let_in), let_in_after_all(server, token.text, len(let_in))

        before, total = within_an_hour(measure)
    assert LIMIT // 3 <= before < LIMIT, "it was killed in the middle"
    # What a crash takes along is what was under way, and a slice for each process: an eighth of what was left at most.
    assert before < total <= LIMIT


# --- whose calls count ----------------------------------------------------------------------------------------------------


def test_a_companys_calls_count_against_its_partner(plans_server):
    def measure():
        caller = limited_partner(plans_server, 10)
        with plans_server.client() as client:
            made = create_company(client, caller.key)
            other = create_company(client, caller.key)
            session = log_in(client, made["apiKey"])
            token = issue_token(plans_server.data, caller.id)
            credentials = [made["apiKey"], session["jwt"], other["apiKey"], caller.key, token.text] * 2
            answers = [search(client, credential) for credential in credentials]
            assert [outcome(answer) for answer in answers] == [GOOD] * 10
            left = [read_rates(answer, 10) for answer in answers]
            refused = [outcome(search(client, credential)) for credential in credentials[:5]]
            return left, refused, used(client, caller.key)

    left, refused, counted = within_an_hour(measure)
    assert left == list(range(9, -1, -1))
    assert refused == [EXCEEDED] * 5
    assert counted == (10, 10)


def test_r75_whoever_is_refused_is_not_counted_and_hears_of_nobodys_quota(plans_server):
    def measure():
        caller = limited_partner(plans_server, 5)
        token = issue_token(plans_server.data, caller.id)
        gone = issue_token(plans_server.data, caller.id)
        ask("token", "revoke", gone.id, data=plans_server.data)
        with plans_server.client() as client:
            tampered = token.text[:-2] + ("AA" if not token.text.endswith("AA") else "BB")
            for _ in range(4):
                refusals = [search(client, credential) for credential in (tampered, gone.text, caller.key[:-1] + "!", "x")]
                refusals.append(search(client, token.text, partner="another"))
                refusals.append(client.post(SEARCH, content=b"{", headers=bearer(token.text)))
                refusals.append(client.post(SEARCH, json=ASKED))
                assert {answer.status_code for answer in refusals} <= {400, 401, 415}
                for answer in refusals:
                    assert not [name for name in answer.headers if "ratelimit" in name]
            # Calls of the service itself do not count either.
            log_in(client, caller.key)
            client.get("/companies", headers=bearer(caller.key))
            assert used(client, caller.key) == (0, 0)
            let_in = [outcome(search(client, token.text)) for _ in range(7)]
            return let_in, used(client, caller.key)

    let_in, counted = within_an_hour(measure)
    assert let_in == [GOOD] * 5 + [EXCEEDED] * 2
    assert counted == (5, 5)


def test_one_partners_flood_leaves_the_others_quota_alone(plans_server):
    flooded, calm = limited_partner(plans_server), limited_partner(plans_server)
    tokens = [issue_token(plans_server.data, caller.id).text for caller in (flooded, calm)]
    answers = at_once(plans_server, [*calls(tokens[0], 300), *calls(tokens[1], 50)])
    assert {outcome(answer) for answer in answers[300:]} == {GOOD}


def test_r39_a_new_tier_and_a_changed_tier_show_at_once_on_every_worker(plans_workers):
    def measure():
        caller = limited_partner(plans_workers, 6)
        token = issue_token(plans_workers.data, caller.id).text
        small, large = fresh("small-"), fresh("large-")
        for tier, limit in ((small, 7), (large, 5_000)):
            ask("tier", "set", tier, "--per-hour", str(limit), "--per-day", "100000", data=plans_workers.data)
        with every_worker(plans_workers) as clients:

            def limits():
                return [int(search(client, token).headers["x-ratelimit-limit"]) for client in clients]

            seen = [limits()]
            ask("partner", "tier", caller.id, large, data=plans_workers.data)
            seen += [limits(), limits()]
            ask("partner", "tier", caller.id, small, data=plans_workers.data)
            # Six are used, seven are allowed.
            last = [outcome(search(client, token)) for client in clients]
            ask("tier", "set", small, "--per-hour", "9", "--per-day", "100000", data=plans_workers.data)
            seen.append(limits())
            last += [outcome(search(client, token)) for client in clients]
            about = clients[0].get(f"{REGISTER}/Usage", headers=bearer(caller.key)).json()
            return seen, last, (about["tier"], about["rateLimits"]["requestsPerHour"]), small

    seen, last, about, small = within_an_hour(measure)
    assert seen == [[6] * 2, [5_000] * 2, [5_000] * 2, [9] * 2]
    assert sorted(last[:2]) == [GOOD, EXCEEDED]
    assert last[2:] == [EXCEEDED] * 2
    assert about == (small, 9)


# --- many partners --------------------------------------------------------------------------------------------------------


def test_of_ten_thousand_partners_a_rotation_of_keys_and_a_revocation_touch_only_the_one_revoked(tmp_path):
    with Server(tmp_path / "data", "--sample-api", "--workers", "2") as server:
        texts = asyncio.run(fill(server))
        ids = [f"partner-{number}" for number in range(PARTNERS)]
        # One who is asked about often, so that a signing key or a revocation has to hit what is remembered as good.
        sample = random.sample(range(PARTNERS), 201)
        gone, others = sample[0], sample[1:]
        ((token_id,),) = run_sql(server.data, "SELECT id FROM access_token WHERE partner_id = :partner", partner=ids[gone])

        async def go_on():
            heard, done = Counter(), asyncio.Event()
            async with server.async_client() as client:

                async def call(numbers):
                    rounds = 0
                    while rounds < 2 or not done.is_set():
                        for number in numbers:
                            answer = await client.post(SEARCH, json=ASKED, headers=bearer(texts[number]))
                            heard[outcome(answer)] += 1
                            assert answer.json()["partner"] == ids[number]
                        rounds += 1

                callers = [asyncio.create_task(call(others[at::8])) for at in range(8)]
                try:
                    await asyncio.to_thread(until, lambda: heard[GOOD] > len(others), "all are let in")
                    await asyncio.to_thread(rotate_and_revoke)
                finally:
                    done.set()
                await asyncio.gather(*callers)
            return heard

        def rotate_and_revoke():
            with every_worker(server) as clients:
                assert [judged(client, texts[gone]) for client in clients] == [GOOD] * 2
                run_sql(server.data, "UPDATE signing_key SET published_at = published_at - 600000")
                ask("signing-key", "rotate", data=server.data)
                assert [judged(client, texts[gone]) for client in clients] == [GOOD] * 2
                ask("token", "revoke", token_id, data=server.data)
                assert [judged(client, texts[gone]) for client in clients] == [REVOKED] * 2

        heard = asyncio.run(go_on())
        assert set(heard) == {GOOD}
        assert sum(heard.values()) >= 2 * len(others)
        with server.client() as client:
            assert judged(client, texts[gone]) == REVOKED
            states = [key["state"] for key in ask("signing-key", "list", data=server.data) if key["purpose"] == "access"]
            assert sorted(states) == ["current", "next", "retiring"]
            assert {judged(client, texts[number]) for number in others[:20]} == {GOOD}


async def fill(server):
    """Partners with a token each, in bulk; the tokens' texts."""
    environ = {"GATELODGE_DATA": str(server.data)}
    settings = prepare(load_settings({}, environ), environ)
    lodge = assemble(settings, Vault(load_master_keys(settings, environ), system_entropy))
    try:
        now = lodge.clock()
        issued = [await lodge.access_tokens._make(f"partner-{number}", "Plans", now) for number in range(PARTNERS)]
    finally:
        await lodge.close()
    who = {"contact_email": "dev@partner.example", "tier": "starter", "status": "active", "origin": "managed"}
    names = ("id", "lineage_id", "version", "partner_id", "label", "kid", "digest", "created_at")
    engine = sqlite_engine(settings.database.path, lock_timeout=30)
    with engine.begin() as connection:
        connection.execute(
            insert(partner),
            [{"id": f"partner-{number}", "name": "Partner", "created_at": now, **who} for number in range(PARTNERS)],
        )
        connection.execute(insert(access_token), [{name: getattr(each.token, name) for name in names} for each in issued])
    engine.dispose()
    return [each.text.reveal() for each in issued]
