"""The judge of a run: from what the clients saw, and nothing else, whether a promise was broken.

A history is one ``Operation`` for each request: what was presented, what came back, when it was sent and when it was known to
be over. It holds digests of tokens, never a token. ``check`` is pure, and finds what breaks one of seven rules:

1. ``spent-once``: a token has one successor, and its presentations can be put in an order that a single-use token explains.
2. ``path``: the tokens of a session form a path: none has two ancestors, none is its own.
3. ``revoked``: nothing that was acknowledged as ended is accepted by a request that was sent afterwards.
4. ``reuse``: once a reuse was answered, no token of that session is accepted.
5. ``durable``: what was given out and not yet presented is accepted after the recovery.
6. ``honest``: who repeats a request only with its Idempotency-Key, and before using the answer, is never refused.
7. ``audit``: the audit trail holds each acknowledged event exactly once.

Each token is a history of its own (linearizability is compositional), and a short one, so rule 1 tries every order. An
operation without an answer, or with a 503, may or may not have happened: every rule allows for both.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Final, Literal, TypeAlias

Status: TypeAlias = int | Literal["unknown"]

UNKNOWN: Final = "unknown"
GAVE_OUT: Final = frozenset({"login", "refresh"})
"""Operations whose answer holds a refresh token."""
ENDS: Final = frozenset({"logout", "revoke", "rotate"})
"""Operations that end what is presented, and everything that descends from it."""
ISSUES: Final = frozenset({"issue", "create", "rotate"})
"""Operations whose answer holds an API key."""
REUSED: Final = "refresh_token_reused"
ONCE: Final = frozenset({"company.created", "session.logout", "session.reuse"})
"""Events that can be in the audit trail once only, however often they were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One request and its answer. A login presents an API key; a revocation or rotation names one."""

    id: int
    op: str
    t0: float
    t1: float
    status: Status
    node: str = ""
    token_in: str | None = None
    token_out: str | None = None
    retry: str | None = None
    """Digest of the Idempotency-Key."""
    code: str | None = None
    """The problem's code, of a refusal."""
    event: str | None = None
    """The audit event that an acknowledgement stands for."""
    subject: str | None = None
    """Whom the event is about."""

    @property
    def accepted(self) -> bool:
        """Whether it was acknowledged."""
        return isinstance(self.status, int) and 200 <= self.status < 300

    @property
    def uncertain(self) -> bool:
        """Whether it may or may not have happened."""
        return self.status in {UNKNOWN, 503}

    @property
    def reuse_verdict(self) -> bool:
        """Whether it was told that its token had been spent."""
        return self.code == REUSED


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that was broken, by which operations, on which token."""

    rule: str
    token: str
    operations: tuple[int, ...]
    says: str

    def __str__(self) -> str:
        return f"{self.rule}: token {self.token[:12]}, operations {list(self.operations)}: {self.says}"


def dump(operations: Iterable[Operation]) -> str:
    """A history as JSON lines."""
    return "".join(json.dumps({k: v for k, v in asdict(op).items() if v is not None}) + "\n" for op in operations)


def load(lines: str) -> list[Operation]:
    """A history from JSON lines."""
    return [Operation(**json.loads(line)) for line in lines.splitlines()]


def check(
    operations: Sequence[Operation],
    *,
    recovered_at: float | None = None,
    audit: Sequence[tuple[str, str]] | None = None,
    bound: float = 0.0,
) -> list[Finding]:
    """Everything that breaks a rule.

    ``recovered_at``: from then on, each token that nobody had presented yet was presented once (rule 5); ``audit``: the
    actions and subjects of the audit trail (rule 7); ``bound``: seconds in which an end has to be heeded (rules 3 and 4).
    """
    history = _History(operations)
    findings = [*_spent_once(history), *_path(history), *_revoked(history, bound), *_reuse(history, bound), *_honest(history)]
    if recovered_at is not None:
        findings += _durable(history, recovered_at)
    if audit is not None:
        findings += _audit(history, audit)
    return findings


class _History:
    """A history with the indexes that the rules share."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        self.operations = operations
        self._firsts: dict[str, str] = {}
        self._shakers: dict[str, set[int]] = {}
        self.presented: Mapping[str, list[Operation]] = defaultdict(list)
        for op in operations:
            if op.token_in is not None:
                self.presented[op.token_in].append(op)

    def of(self, token: str, *kinds: str) -> list[Operation]:
        """The operations of these kinds that presented a token."""
        return [op for op in self.presented.get(token, ()) if op.op in kinds]

    @cached_property
    def origin(self) -> Mapping[str, str]:
        """Token → the token that it succeeds, as the first answer says."""
        found: dict[str, str] = {}
        for op in self.operations:
            if op.op == "refresh" and op.accepted and op.token_in and op.token_out and op.token_out != op.token_in:
                found.setdefault(op.token_out, op.token_in)
        return found

    @cached_property
    def key_of(self) -> Mapping[str, str]:
        """The first token of a session → the API key that it was got with."""
        return {op.token_out: op.token_in for op in self.operations if op.op == "login" and op.token_out and op.token_in}

    @cached_property
    def sessions(self) -> Mapping[str, list[str]]:
        """First token → every token of that session."""
        found: dict[str, list[str]] = defaultdict(list)
        for token in self.tokens:
            found[self.first_of(token)].append(token)
        return found

    @cached_property
    def tokens(self) -> Collection[str]:
        """Every refresh token that was given out or presented."""
        given = [op.token_out for op in self.operations if op.op in GAVE_OUT and op.token_out]
        shown = [op.token_in for op in self.operations if op.op in {"refresh", "logout"} and op.token_in]
        return dict.fromkeys(given + shown)

    def first_of(self, token: str) -> str:
        """The token that a session began with."""
        walked: list[str] = []
        while token not in self._firsts:
            walked.append(token)
            self._firsts[token] = token  # until it is known better; ends a walk in a circle
            if token not in self.origin:
                break
            token = self.origin[token]
        for passed in walked:
            self._firsts[passed] = self._firsts[token]
        return self._firsts[token]

    def shakers_of(self, first: str) -> set[int]:
        """The operations that may have ended a session: asked for, or a reuse, or without an answer."""
        if first not in self._shakers:
            shown = [op for token in self.sessions.get(first, ()) for op in self.of(token, "refresh")]
            found = {op.id for op in shown if op.reuse_verdict or op.uncertain}
            self._shakers[first] = found | {op.id for op in self.ends_of(first)}
        return self._shakers[first]

    def ends_of(self, first: str) -> Iterator[Operation]:
        """What was asked for that ends a session: of one of its tokens, or of the key that it was got with."""
        for token in self.sessions.get(first, ()):
            yield from self.of(token, "logout")
        if first in self.key_of:
            yield from self.ends_of_key(self.key_of[first])

    def ends_of_key(self, key: str) -> list[Operation]:
        """What was asked for that ends an API key."""
        return self.of(key, "revoke", "rotate")

    def verdicts_of(self, first: str) -> list[Operation]:
        """The reuse verdicts on a session."""
        return [op for token in self.sessions.get(first, ()) for op in self.of(token, "refresh") if op.reuse_verdict]


# --- rule 1 ---------------------------------------------------------------------------------------------------------------


def _spent_once(history: _History) -> Iterator[Finding]:
    for token in history.tokens:
        presented = history.of(token, "refresh")
        answered = [op for op in presented if op.accepted]
        successors = {op.token_out for op in answered}
        if len(successors) > 1:
            yield Finding("spent-once", token, _ids(answered), f"has {len(successors)} successors")
        elif len(answered) > 1 and not _explainable(presented, may_end=_may_end(history, token, presented)):
            yield Finding("spent-once", token, _ids(answered), "no order of the presentations explains the answers")


def _may_end(history: _History, token: str, presented: Sequence[Operation]) -> bool:
    """Whether something else than the presentations of this token may have ended its session."""
    return bool(history.shakers_of(history.first_of(token)) - set(_ids(presented)))


@dataclass(frozen=True, slots=True)
class _Spent:
    """What a single-use token remembers."""

    by: str | None = None
    spent: bool = False
    ended: bool = False


def _explainable(presented: Sequence[Operation], *, may_end: bool) -> bool:
    """Whether there is an order of the presentations in which each answer is what a single-use token gives.

    It respects who was over before whom began. What was not answered is put anywhere after it was sent, or left out.
    """
    dead_ends: set[tuple[frozenset[int], _Spent]] = set()

    def search(left: tuple[Operation, ...], state: _Spent) -> bool:
        if not any(not op.uncertain for op in left):
            return True
        mark = (frozenset(op.id for op in left), state)
        if mark in dead_ends:
            return False
        horizon = min(op.t1 for op in left if not op.uncertain)
        for op in left:
            if op.t0 > horizon:
                continue  # another was over before this one was sent
            rest = tuple(other for other in left if other.id != op.id)
            if any(search(rest, after) for after in _steps(op, state, may_end=may_end)):
                return True
        dead_ends.add(mark)
        return False

    return search(tuple(presented), _Spent())


def _steps(op: Operation, state: _Spent, *, may_end: bool) -> Iterator[_Spent]:
    """What a token may be like after ``op``, if it can have given that answer at all."""
    repeat = state.spent and op.retry is not None and op.retry == state.by
    if op.uncertain:
        if state.ended or repeat:
            yield state
        elif state.spent:
            yield _Spent(state.by, spent=True, ended=True)
        else:
            yield _Spent(op.retry, spent=True)
    elif op.accepted:
        if not state.ended and repeat:
            yield state
        elif not state.ended and not state.spent:
            yield _Spent(op.retry, spent=True)
    elif state.ended or may_end:
        yield _Spent(state.by, spent=state.spent, ended=True)
    elif op.reuse_verdict and state.spent and not repeat:
        yield _Spent(state.by, spent=True, ended=True)


# --- rules 2 to 7 ---------------------------------------------------------------------------------------------------------


def _path(history: _History) -> Iterator[Finding]:
    ancestors: dict[str, dict[str, int]] = defaultdict(dict)
    born: Counter[str] = Counter()
    for op in history.operations:
        if op.op == "refresh" and op.accepted and op.token_out and op.token_in:
            ancestors[op.token_out][op.token_in] = op.id
        elif op.op == "login" and op.accepted and op.token_out:
            born[op.token_out] += 1
    circles = _circles(history.origin)
    for token, parents in ancestors.items():
        if len(parents) > 1:
            yield Finding("path", token, tuple(parents.values()), f"succeeds {len(parents)} tokens")
        if born[token]:
            yield Finding("path", token, tuple(parents.values()), "succeeds a token and was also given out by a login")
        if token in circles:
            yield Finding("path", token, tuple(parents.values()), "is its own ancestor")
    for token, count in born.items():
        if count > 1:
            logins = [op for op in history.operations if op.op == "login" and op.token_out == token]
            yield Finding("path", token, _ids(logins), f"was given out by {count} logins")


def _circles(origin: Mapping[str, str]) -> set[str]:
    """The tokens that are their own ancestors."""
    found: set[str] = set()
    seen: set[str] = set()
    for token in origin:
        walked: dict[str, None] = {}
        at: str | None = token
        while at is not None and at not in seen and at not in walked:
            walked[at] = None
            at = origin.get(at)
        if at in walked:
            circle = list(walked)
            found |= set(circle[circle.index(at) :])
        seen |= set(walked)
    return found


def _revoked(history: _History, bound: float) -> Iterator[Finding]:
    for first, tokens in history.sessions.items():
        ended = [op for op in history.ends_of(first) if op.accepted]
        yield from _accepted_after("revoked", history, tokens, ended, bound, "was accepted after the end was acknowledged")
    for key in {op.token_in for op in history.operations if op.op in {"revoke", "rotate"} and op.token_in}:
        ended = [op for op in history.ends_of_key(key) if op.accepted]
        for end in ended[:1]:
            late = [op for op in history.of(key, "login") if op.accepted and op.t0 > end.t1 + bound]
            if late:
                yield Finding("revoked", key, _ids([end, *late]), "a login with it was accepted after its end was acknowledged")


def _reuse(history: _History, bound: float) -> Iterator[Finding]:
    for first, tokens in history.sessions.items():
        yield from _accepted_after(
            "reuse",
            history,
            tokens,
            history.verdicts_of(first),
            bound,
            "was accepted after a reuse in its session was answered",
        )


def _accepted_after(
    rule: str, history: _History, tokens: Iterable[str], ends: Sequence[Operation], bound: float, says: str
) -> Iterator[Finding]:
    if not ends:
        return
    end = min(ends, key=lambda op: op.t1)
    for token in tokens:
        late = [op for op in history.of(token, "refresh") if op.accepted and op.t0 > end.t1 + bound]
        if late:
            yield Finding(rule, token, _ids([end, *late]), says)


def _durable(history: _History, recovered_at: float) -> Iterator[Finding]:
    for op in history.operations:
        if not op.accepted or op.token_out is None or op.t0 >= recovered_at:
            continue
        token = op.token_out
        if op.op in GAVE_OUT:
            first = history.first_of(token)
            if any(other.t0 < recovered_at for other in history.of(token, "refresh")):
                continue
            ended = list(history.ends_of(first)) + history.verdicts_of(first) + _unknown_reuse(history, first)
            probe = "refresh"
        elif op.op in ISSUES:
            ended, probe = history.ends_of_key(token), "login"
        else:
            continue
        if any(other.accepted or other.uncertain or other.reuse_verdict for other in ended):
            continue
        probes = [other for other in history.of(token, probe) if other.t0 >= recovered_at]
        if not probes:
            yield Finding("durable", token, (op.id,), "was not presented after the recovery: the experiment is incomplete")
        elif not any(other.accepted for other in probes):
            yield Finding("durable", token, _ids([op, *probes]), f"was given out, and then refused ({probes[0].code})")


def _unknown_reuse(history: _History, first: str) -> list[Operation]:
    """Unanswered presentations that a dishonest client made of a token that had been presented before."""
    return [
        op
        for token in history.sessions.get(first, ())
        for op in history.of(token, "refresh")
        if op.uncertain and not _is_honest(history.of(token, "refresh"))
    ]


def _honest(history: _History) -> Iterator[Finding]:
    for first, tokens in history.sessions.items():
        if any(op.accepted or op.uncertain for op in history.ends_of(first)):
            continue
        if not all(_is_honest(history.of(token, "refresh")) and _kept_order(history, token) for token in tokens):
            continue
        if first not in history.key_of:
            continue  # nobody knows that it was ever given out
        for token in tokens:
            refused = [op for op in history.of(token, "refresh") if not op.accepted and not op.uncertain]
            if refused:
                yield Finding("honest", token, _ids(refused), f"an honest client was refused ({refused[0].code})")


def _is_honest(presented: Sequence[Operation]) -> bool:
    return len(presented) <= 1 or (len({op.retry for op in presented}) == 1 and presented[0].retry is not None)


def _kept_order(history: _History, token: str) -> bool:
    """Whether nobody used the successor while a presentation of the token itself was still under way, or yet to come."""
    presented = history.of(token, "refresh")
    successors = {op.token_out for op in presented if op.token_out}
    used = [op.t0 for successor in successors for op in history.of(successor, "refresh")]
    return not used or max(op.t1 for op in presented) <= min(used)


def _audit(history: _History, audit: Sequence[tuple[str, str]]) -> Iterator[Finding]:
    held = Counter(audit)
    asked: dict[tuple[str, str], list[Operation]] = defaultdict(list)
    for op in history.operations:
        if op.event and op.subject and (op.accepted or op.uncertain or op.reuse_verdict):
            asked[op.event, op.subject].append(op)
    ended = Counter(subject for action, subject in audit if action in {"session.logout", "session.reuse"})
    for (event, subject), operations in asked.items():
        acknowledged = [op for op in operations if not op.uncertain]
        if not acknowledged:
            continue
        count = ended[subject] if event.startswith("session.") else held[event, subject]
        most = 1 if event in ONCE else len(operations)
        if not 1 <= count <= most:
            yield Finding("audit", subject, _ids(operations), f"{event} is in the audit trail {count} times")


def _ids(operations: Iterable[Operation]) -> tuple[int, ...]:
    return tuple(op.id for op in operations)
