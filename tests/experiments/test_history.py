"""The judge of the experiments: each of its rules finds what breaks it, and nothing in what does not."""

import dataclasses
import itertools

import pytest
from experiments.history import REUSED, UNKNOWN, Operation, check, dump, load

_numbers = itertools.count(1)


def op(kind, t0, t1, status=200, token_in=None, token_out=None, **more):
    return Operation(id=next(_numbers), op=kind, t0=t0, t1=t1, status=status, token_in=token_in, token_out=token_out, **more)


def login(t0, t1, token, key="key", **more):
    return op("login", t0, t1, token_in=key, token_out=token, **more)


def refresh(t0, t1, old, new=None, status=200, **more):
    return op("refresh", t0, t1, status, old, new, **more)


def reused(t0, t1, token, **more):
    return refresh(t0, t1, token, status=401, code=REUSED, **more)


A_LIFE = [
    login(0, 1, "a"),
    refresh(2, 3, "a", "b"),
    refresh(4, 6, "b", "c", retry="k"),
    refresh(5, 7, "b", "c", retry="k"),
    refresh(8, 9, "c", status=UNKNOWN, retry="l"),
    refresh(10, 11, "c", "d", retry="l"),
    op("logout", 12, 13, 204, "d", event="session.logout", subject="s"),
    refresh(14, 15, "d", status=401, code="credential_revoked"),
]


def rules(operations, **options):
    return {finding.rule for finding in check(operations, **options)}


def test_a_life_without_fault_breaks_no_rule():
    assert check(A_LIFE, recovered_at=20, audit=[("session.logout", "s")]) == []


def test_a_thief_is_found_out_and_no_rule_is_broken():
    stolen = [login(0, 1, "a"), refresh(2, 5, "a", "b"), reused(3, 6, "a"), refresh(7, 8, "b", status=401, code=REUSED)]
    assert check(stolen) == []


def test_a_history_survives_being_written_down():
    assert load(dump(A_LIFE)) == A_LIFE


@pytest.mark.parametrize(
    ("rule", "operations"),
    [
        ("spent-once", [login(0, 1, "a"), refresh(2, 5, "a", "b"), refresh(3, 6, "a", "c")]),
        ("spent-once", [login(0, 1, "a"), refresh(2, 5, "a", "b"), refresh(3, 6, "a", "b")]),
        ("spent-once", [login(0, 1, "a"), refresh(2, 5, "a", "b", retry="k"), refresh(3, 6, "a", "b", retry="l")]),
        (
            "spent-once",
            [login(0, 1, "a"), refresh(2, 3, "a", "b", retry="k"), reused(4, 5, "a"), refresh(6, 7, "a", "b", retry="k")],
        ),
        ("path", [login(0, 1, "a"), login(0, 1, "b"), refresh(2, 3, "a", "c"), refresh(2, 3, "b", "c")]),
        ("path", [login(0, 1, "a"), refresh(2, 3, "a", "b"), refresh(4, 5, "b", "a")]),
        ("path", [login(0, 1, "a"), login(2, 3, "a")]),
        ("revoked", [login(0, 1, "a"), op("logout", 2, 3, 204, "a"), refresh(4, 5, "a", "b")]),
        ("revoked", [login(0, 1, "a"), refresh(2, 3, "a", "b"), op("logout", 4, 5, 204, "a"), refresh(6, 7, "b", "c")]),
        ("revoked", [login(0, 1, "a"), op("revoke", 2, 3, token_in="key"), refresh(4, 5, "a", "b")]),
        ("revoked", [login(0, 1, "a"), op("rotate", 2, 3, token_in="key", token_out="new"), login(4, 5, "b")]),
        ("reuse", [login(0, 1, "a"), refresh(2, 3, "a", "b"), reused(4, 5, "a"), refresh(6, 7, "b", "c")]),
        ("honest", [login(0, 1, "a"), refresh(2, 3, "a", "b"), refresh(4, 5, "b", status=401, code="credential_revoked")]),
        ("honest", [login(0, 1, "a"), refresh(2, 3, "a", status=UNKNOWN, retry="k"), reused(4, 5, "a", retry="k")]),
    ],
)
def test_each_rule_is_found_to_be_broken(rule, operations):
    assert rule in rules(operations)


@pytest.mark.parametrize(
    "operations",
    [
        pytest.param([login(0, 1, "a")], id="not presented at all"),
        pytest.param([login(0, 1, "a"), refresh(11, 12, "a", status=401, code="credential_revoked")], id="a session"),
        pytest.param([login(0, 1, "a"), refresh(2, 3, "a", "b"), refresh(11, 12, "b", status=401)], id="a refresh"),
        pytest.param([op("create", 0, 1, token_out="ck"), op("login", 11, 12, 401, "ck")], id="a key"),
    ],
)
def test_what_was_acknowledged_and_is_lost_is_found(operations):
    assert "durable" in rules(operations, recovered_at=10)


@pytest.mark.parametrize(
    "operations",
    [
        pytest.param([login(0, 1, "a"), refresh(11, 12, "a", "b")], id="it is there"),
        pytest.param(
            [login(0, 1, "a"), refresh(2, 3, "a", status=UNKNOWN), reused(11, 12, "a")], id="nobody knows if it was spent"
        ),
        pytest.param([login(0, 1, "a"), refresh(2, 3, "a", status=503), reused(11, 12, "a")], id="it said 503"),
        pytest.param(
            [login(0, 1, "a"), op("logout", 2, 3, UNKNOWN, "a"), refresh(11, 12, "a", status=401)], id="perhaps ended"
        ),
        pytest.param([op("create", 0, 1, token_out="ck"), op("login", 11, 12, token_in="ck", token_out="a")], id="a key"),
    ],
)
def test_what_may_be_is_not_held_against_a_server(operations):
    assert check(operations, recovered_at=10) == []


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_audit_trail_holds_each_acknowledged_event_once(count):
    ended = [login(0, 1, "a"), op("logout", 2, 3, 204, "a", event="session.logout", subject="s")]
    assert rules(ended, audit=[("session.logout", "s")] * count) == (set() if count == 1 else {"audit"})


def test_an_end_may_take_effect_within_its_bound_and_not_later():
    late = [login(0, 1, "a"), op("logout", 2, 3, 204, "a"), refresh(4, 5, "a", "b")]
    assert "revoked" not in rules(late, bound=1.0)
    assert "revoked" in rules(late, bound=0.9)


def test_what_ran_at_the_same_time_may_have_come_first():
    at_once = [login(0, 1, "a"), refresh(2, 6, "a", "b"), op("logout", 3, 5, 204, "a")]
    assert check(at_once) == []


def test_a_client_that_uses_the_successor_before_its_copies_are_back_is_not_honest():
    hasty = [
        login(0, 1, "a"),
        refresh(2, 9, "a", status=401, code=REUSED, retry="k"),
        refresh(2, 3, "a", "b", retry="k"),
        refresh(4, 5, "b", "c"),
    ]
    assert "honest" not in rules(hasty)


def test_a_finding_says_which_token_and_which_operations():
    double = [login(0, 1, "a"), refresh(2, 3, "a", "b"), refresh(4, 5, "a", "c")]
    [finding] = [finding for finding in check(double) if finding.rule == "spent-once"]
    assert finding.token == "a"
    assert finding.operations == (double[1].id, double[2].id)
    assert str(finding.operations[0]) in str(finding)


def test_a_lost_acknowledgement_in_a_life_without_fault_is_found():
    for number, operation in enumerate(A_LIFE):
        if operation.token_out:
            forged = [*A_LIFE[:number], dataclasses.replace(operation, token_out="other"), *A_LIFE[number + 1 :]]
            assert check(forged, recovered_at=20)
