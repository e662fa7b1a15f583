"""The set of revocations and the rule of what may be believed, without any I/O."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatelodge.errors import (
    CredentialExpired,
    CredentialRevoked,
    CredentialRotated,
    InvalidCredential,
    PartnerSuspended,
    RevocationsUnavailable,
)
from gatelodge.keyset import JWKS_MAX_BYTES
from gatelodge.revocations import FeedPage, Following, JwtMarks, Revocation, RevocationSet, Source

NOW = 1_780_000_000.0
FOREVER, AT_ONCE = float("inf"), float("-inf")
AROUND = (-1, 0, 1)
SOURCE = Source("https://issuer.example", "uat")
JWT = JwtMarks(SOURCE, kid="key-1", session="5e55", credential_id="k3yk3yk3yk3y", company="c0", partner="acme-motors", epoch=3)


def entry(kind="session", subject="5e55", **changes):
    known = {"sequence": 7, "at": "2026-06-03T00:00:00.000+00:00", "code": "credential_revoked"}
    return {**known, "kind": kind, "subject": subject, "endsAt": None, "epoch": None, "until": None, **changes}


def answer(*entries, **changes):
    known = {"sequence": 7, "position": "7.a", "reset": False, "more": False, "maxStaleness": 10}
    return json.dumps({**SOURCE._asdict(), **known, "revocations": entries, **changes}).encode()


def page(*revocations, sequence=7, is_reset=False, has_more=False, max_staleness=10.0, source=SOURCE):
    return FeedPage(source, sequence, f"{sequence}.a", is_reset, has_more, max_staleness, revocations)


def revocation(kind="session", subject="5e55", **changes):
    known = Revocation(7, kind, subject, CredentialRevoked, AT_ONCE, 0, FOREVER)
    return known._replace(**changes)


def knowing(*revocations):
    known = RevocationSet()
    known.apply(page(*revocations), NOW)
    return known


# --- reading ---


def test_an_answer_is_read_whole():
    ends = "2026-06-03T00:00:00.250+00:00"
    read = FeedPage.parse(answer(entry(), entry("partner", "acme", code=None, epoch=4, endsAt=ends, until=ends)))
    assert read.source == SOURCE
    assert read.position == "7.a"
    assert read.revocations[0] == revocation()
    assert read.revocations[1] == Revocation(7, "partner", "acme", None, 1_780_444_800.25, 4, 1_780_444_800.25)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("credential_revoked", CredentialRevoked),
        ("credential_rotated", CredentialRotated),
        ("credential_expired", CredentialExpired),
        ("partner_suspended", PartnerSuspended),
        ("invalid_credential", InvalidCredential),
        ("something_of_a_later_version", CredentialRevoked),
        (None, None),
    ],
)
def test_a_reason_that_is_not_known_refuses_all_the_same(code, reason):
    assert FeedPage.parse(answer(entry(code=code))).revocations[0].reason is reason


def test_a_kind_of_subject_that_is_not_known_is_passed_over():
    assert FeedPage.parse(answer(entry("planet", "mars"), entry())).revocations == [revocation()]


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b"{}",
        answer(1),
        answer(entry(), revocations={}),
        *(answer(entry(**{name: value})) for name, value in (
            ("kind", None), ("subject", ""), ("subject", "x" * 257), ("code", 1), ("sequence", -1), ("sequence", True),
            ("epoch", "1"), ("endsAt", "soon"), ("endsAt", 1), ("until", "2026-06-03T00:00:00"),
        )),
        *(answer(**{name: value}) for name, value in (
            ("position", ""), ("position", None), ("position", "x" * 257), ("sequence", 1.5), ("reset", 0), ("more", None),
            ("issuer", None), ("issuer", ""), ("issuer", "x" * 1025), ("environment", None), ("environment", "U\n"),
            ("maxStaleness", 0), ("maxStaleness", "10"), ("maxStaleness", True), ("maxStaleness", None),
        )),
    ],
)  # fmt: skip
def test_what_is_not_whole_is_not_read_at_all(document):
    with pytest.raises(ValueError):
        FeedPage.parse(document)


def test_the_longest_page_that_an_issuer_sends_fits_into_what_is_fetched():
    at = "2026-06-03T00:00:00.000+00:00"
    longest = entry("credential", "x" * 64, sequence=10**12, code="credential_revoked", at=at, endsAt=at, until=at, epoch=10**6)
    names = {"position": "x" * 120, "issuer": "x" * 1024, "environment": "x" * 32}
    document = json.dumps({"revocations": [longest] * 201, **names}, separators=(",", ":"))
    assert len(document) + 200 < JWKS_MAX_BYTES


# --- judging ---


@pytest.mark.parametrize(
    ("kind", "subject"),
    [
        ("session", "5e55"),
        ("credential", "k3yk3yk3yk3y"),
        ("company", "c0"),
        ("partner", "acme-motors"),
        ("signing-key", "key-1"),
    ],
)
def test_a_jwt_is_refused_for_what_its_subject_has_come_to_and_for_no_other(kind, subject):
    assert knowing(revocation(kind, subject, reason=CredentialRotated)).judge(JWT, NOW) is CredentialRotated
    assert knowing(revocation(kind, subject + "x")).judge(JWT, NOW) is None
    assert knowing(revocation(kind, subject, reason=None)).judge(JWT, NOW) is None
    for other in {"session", "credential", "company", "partner", "signing-key"} - {kind}:
        assert knowing(revocation(other, subject)).judge(JWT, NOW) is None


@pytest.mark.parametrize("offset", AROUND)
def test_an_overlap_ends_at_its_instant(offset):
    known = knowing(revocation("credential", "k3yk3yk3yk3y", ends_at=NOW))
    assert known.judge(JWT, NOW + offset) is (None if offset < 0 else CredentialRevoked)


@pytest.mark.parametrize("offset", AROUND)
def test_a_jwt_of_an_epoch_that_is_over_stays_dead_when_its_partner_is_resumed(offset):
    known = knowing(revocation("partner", "acme-motors", reason=None, epoch=3 + offset))
    assert known.judge(JWT, NOW) is (CredentialRevoked if offset > 0 else None)


def test_the_reason_is_the_one_that_the_issuer_would_give():
    suspended = revocation("partner", "acme-motors", reason=PartnerSuspended, epoch=4)
    rotated = revocation("credential", "k3yk3yk3yk3y", reason=CredentialRotated)
    ended = revocation()
    assert knowing(suspended).judge(JWT, NOW) is PartnerSuspended
    assert knowing(suspended, rotated).judge(JWT, NOW) is CredentialRotated
    assert knowing(suspended, rotated, ended).judge(JWT, NOW) is CredentialRevoked


@pytest.mark.parametrize("offset", AROUND)
def test_what_concerns_no_jwt_any_more_is_let_go(offset):
    """Not at once, but before it has become more than what is still of use."""
    known = RevocationSet()
    old = [revocation(subject=f"{number}", until=NOW) for number in range(1023)]
    known.apply(page(*old), NOW - 2)
    known.apply(page(revocation(subject="new")), NOW + offset)
    assert len(known) == (1024 if offset < 0 else 1)


def test_marks_without_an_epoch_are_of_the_first_one_and_a_strange_one_is_no_good():
    claims = {"iss": SOURCE.issuer, "env": SOURCE.environment, "sid": "s", "client_id": "c", "partner": "p"}
    assert JwtMarks.of(claims, "k") == JwtMarks(SOURCE, "k", "s", "c", None, "p", 0)
    for epoch in ("1", 1.0, True, None):
        with pytest.raises(InvalidCredential):
            JwtMarks.of({**claims, "epoch": epoch}, "k")


def test_an_older_word_does_not_take_the_place_of_a_newer_one():
    known = knowing(revocation("partner", "acme-motors", sequence=9, reason=PartnerSuspended))
    known.apply(page(revocation("partner", "acme-motors", sequence=8, reason=None)), NOW)
    assert known.judge(JWT, NOW) is PartnerSuspended
    known.apply(page(revocation("partner", "acme-motors", sequence=9, reason=None)), NOW)
    assert known.judge(JWT, NOW) is None


# --- whatever happens on the way, the end is the same ---


class Issuer:
    """A history of changes, and the feed that tells of them as the real one does: each subject as it stands when it is read."""

    def __init__(self):
        self.steps = []
        self.states = {}

    def change(self, subject, reason):
        if subject.startswith("session"):
            reason = CredentialRevoked  # which never comes back
        self.steps.append(subject)
        self.states[subject] = reason

    def told(self, subject, sequence):
        return revocation(subject.split("-")[0], subject, sequence=sequence, reason=self.states[subject])

    def page(self, after, limit, *, is_reset=False):
        steps = list(enumerate(self.steps, 1))[after : after + limit]
        latest = {subject: number for number, subject in steps}
        told = [self.told(subject, number) for subject, number in latest.items()]
        sequence = steps[-1][0] if steps else after
        return page(*told, sequence=sequence, is_reset=is_reset, has_more=sequence < len(self.steps))


SUBJECTS = ("session-1", "session-2", "credential-1", "partner-1")
REASONS = (None, CredentialRevoked, PartnerSuspended, CredentialRotated)
EVENTS = st.one_of(
    st.tuples(st.just("change"), st.sampled_from(SUBJECTS), st.sampled_from(REASONS)),
    st.tuples(st.just("poll"), st.integers(1, 3)),
    st.tuples(st.just("begin"), st.integers(1, 3)),
    st.tuples(st.just("again"), st.integers(0, 30), st.integers(1, 3)),
    st.tuples(st.just("late"), st.integers(0, 30)),
)


@given(st.lists(EVENTS, max_size=40))
@settings(deadline=None, max_examples=300)
def test_any_mixture_of_beginnings_tails_repetitions_and_late_answers_ends_in_the_same_set(events):
    issuer, known, position, answers = Issuer(), RevocationSet(), 0, []

    def take(answered):
        nonlocal position
        known.apply(answered, NOW)
        position = answered.sequence
        answers.append(answered)

    for event in events:
        match event:
            case ("change", subject, reason):
                issuer.change(subject, reason)
            case ("poll", limit):
                take(issuer.page(position, limit))
            case ("begin", limit):
                take(issuer.page(0, limit, is_reset=True))
            case ("again", after, limit):
                take(issuer.page(min(after, position), limit))
            case ("late", number) if answers:
                take(answers[number % len(answers)])
    while True:
        answered = issuer.page(position, 3)
        take(answered)
        if not answered.has_more:
            break
    assert {subject: verdict(known, subject) for subject in SUBJECTS} == {
        subject: issuer.states.get(subject) for subject in SUBJECTS
    }


def verdict(known, subject):
    """What a JWT is refused with that has nothing to do with anybody but this subject."""
    name = {"session": "session", "credential": "credential_id", "partner": "partner"}[subject.split("-")[0]]
    return known.judge(JWT._replace(session="x", credential_id="x", partner="x")._replace(**{name: subject}), NOW)


# --- what may be believed ---


def following(max_staleness=10.0):
    return Following(max_staleness=max_staleness)


def believes(known, now):
    try:
        known.judge(JWT, monotonic=now, now=NOW)
    except RevocationsUnavailable:
        return False
    return True


def test_nothing_is_believed_before_everything_was_told_once():
    known = following()
    assert not believes(known, 0.0)
    assert known.position is None
    known.land(page(is_reset=True, has_more=True, sequence=3), sent_at=0.0, now=NOW)
    assert not believes(known, 0.0)
    assert (known.position, known.sequence) == ("3.a", 3)
    known.land(page(sequence=5), sent_at=1.0, now=NOW)
    assert believes(known, 1.0)


@pytest.mark.parametrize("offset", AROUND)
def test_belief_ends_at_the_maximum_staleness_reckoned_from_the_sending_of_the_request(offset):
    known = following()
    known.land(page(is_reset=True), sent_at=100.0, now=NOW)
    assert believes(known, 110.0 + offset) is (offset < 0)


def test_another_deployments_feed_is_not_believed_about_a_jwt():
    known = following()
    for foreign in (SOURCE._replace(issuer="https://other.example"), SOURCE._replace(environment="production")):
        known.land(page(is_reset=True, source=foreign), sent_at=100.0, now=NOW)
        assert known.is_fresh(100.0)
        assert not believes(known, 100.0)
    known.land(page(is_reset=True), sent_at=100.0, now=NOW)
    assert believes(known, 100.0)


def test_a_feed_that_goes_on_as_another_deployments_is_read_anew():
    known = following()
    known.land(page(is_reset=True), sent_at=100.0, now=NOW)
    with pytest.raises(ValueError, match="anew"):
        known.land(page(source=SOURCE._replace(issuer="https://other.example")), sent_at=101.0, now=NOW)
    assert known.position is None
    assert not believes(known, 101.0)


def test_an_answer_that_lay_about_while_the_process_was_frozen_is_as_old_as_its_request():
    known = following()
    known.land(page(is_reset=True), sent_at=100.0, now=NOW)
    known.land(page(), sent_at=102.0, now=NOW)  # it arrives at 162
    assert not believes(known, 162.0)
    known.land(page(), sent_at=162.0, now=NOW)
    assert believes(known, 162.0)


def test_a_beginning_anew_is_not_believed_before_it_is_whole():
    known = following()
    known.land(page(is_reset=True), sent_at=0.0, now=NOW)
    known.land(page(is_reset=True, has_more=True), sent_at=1.0, now=NOW)
    assert not believes(known, 1.0)
    known.land(page(), sent_at=1.0, now=NOW)
    assert believes(known, 1.0)


def test_part_of_a_long_tail_makes_nothing_fresher():
    known = following()
    known.land(page(is_reset=True), sent_at=0.0, now=NOW)
    known.land(page(has_more=True), sent_at=9.0, now=NOW)
    assert believes(known, 9.0)
    assert not believes(known, 10.0)


@pytest.mark.parametrize(("own", "issuers", "expected"), [(10.0, 10.0, 10.0), (10.0, 4.0, 4.0), (4.0, 10.0, 4.0)])
def test_the_shorter_of_two_patiences_counts(own, issuers, expected):
    known = following(own)
    known.land(page(is_reset=True, max_staleness=issuers), sent_at=0.0, now=NOW)
    assert believes(known, expected - 0.001)
    assert not believes(known, expected)


def test_a_reset_forgets_what_was_told_before():
    known = following()
    known.land(page(revocation(), is_reset=True), sent_at=0.0, now=NOW)
    assert known.judge(JWT, monotonic=0.0, now=NOW) is CredentialRevoked
    known.land(page(is_reset=True, sequence=2), sent_at=1.0, now=NOW)
    assert known.judge(JWT, monotonic=1.0, now=NOW) is None


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_a_patience_is_positive(seconds):
    with pytest.raises(ValueError):
        following(seconds)
