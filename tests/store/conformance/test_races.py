"""Races, all of them real: many callers of one store, two stores on one database, two processes."""

import asyncio
import itertools
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
from given import START, a_company, a_key, a_login, a_partner, a_refresh

from gatelodge_server.core.model import PartnerStatus, SessionEnd
from gatelodge_server.core.ports import Advanced, Condemned, Opened, Refused, Repeated
from gatelodge_server.core.refusals import RefreshTokenReused
from gatelodge_server.core.sessions import judge_session

FIFTY = 50
CONTENDER = Path(__file__).with_name("contender.py")


async def opened(store, key):
    return (await store.open_session(a_login(key))).session


# --- Many callers, one token ---


@pytest.fixture(params=["one node", "two nodes"])
def nodes(request, store, other_node):
    """Whom the callers go to, in turn."""
    return itertools.cycle([store] if request.param == "one node" else [store, other_node])


async def test_r25_of_fifty_refreshes_at_once_one_wins_and_the_session_is_condemned(store, key, nodes):
    session = await opened(store, key)
    outcomes = await asyncio.gather(*(next(nodes).advance_session(a_refresh(session)) for _ in range(FIFTY)))
    assert Counter(map(type, outcomes)) == {Advanced: 1, Condemned: 1, Refused: FIFTY - 2}
    assert {outcome for outcome in outcomes if isinstance(outcome, Refused)} == {Refused(RefreshTokenReused)}
    assert (await store.find_session(session.id)).session.end_cause is SessionEnd.REUSE
    (won,) = [outcome for outcome in outcomes if isinstance(outcome, Advanced)]
    assert await store.advance_session(a_refresh(won.session)) == Refused(RefreshTokenReused)


async def test_r32_fifty_retries_at_once_get_one_and_the_same_successor(store, key, nodes):
    session, digest = await opened(store, key), os.urandom(32)
    outcomes = await asyncio.gather(*(next(nodes).advance_session(a_refresh(session, retry=digest)) for _ in range(FIFTY)))
    assert Counter(map(type, outcomes)) == {Advanced: 1, Repeated: FIFTY - 1}
    assert {outcome.session.generation for outcome in outcomes} == {1}
    assert len({outcome.session for outcome in outcomes}) == 1
    assert isinstance(await store.advance_session(a_refresh(outcomes[0].session)), Advanced)


async def test_r25_many_sessions_raced_for_at_once_each_have_one_winner(store, key, nodes):
    sessions = [await opened(store, key) for _ in range(30)]
    attempts = [a_refresh(session) for session in sessions] * 4
    random.Random(25).shuffle(attempts)
    outcomes = await asyncio.gather(*(next(nodes).advance_session(attempt) for attempt in attempts))
    winners = Counter(outcome.session.id for outcome in outcomes if isinstance(outcome, Advanced))
    condemned = Counter(outcome.session.id for outcome in outcomes if isinstance(outcome, Condemned))
    assert winners == condemned == {session.id: 1 for session in sessions}


async def test_r25_chains_of_refreshes_at_two_nodes_never_fork(store, other_node, key):
    """Each of two callers goes on with whatever it won last; together they never have two successors of one token."""
    session = await opened(store, key)
    seen = Counter()

    async def chain(node, turns):
        present = session
        for _ in range(turns):
            outcome = await node.advance_session(a_refresh(present, retry=bytes([present.generation]) * 32))
            if not isinstance(outcome, Advanced | Repeated):
                return
            seen[present.generation, outcome.session.generation, type(outcome)] += 1
            present = outcome.session

    await asyncio.gather(chain(store, 40), chain(other_node, 40))
    assert seen[0, 1, Advanced] == 1
    for (before, after, kind), count in seen.items():
        assert after == before + 1
        assert kind is Repeated or count == 1


# --- Two processes ---


async def contend(backend, sessions, *, retry, times):
    asked = {"address": backend.address, "sessions": [session.id.hex() for session in sessions], "retry": retry, "times": times}
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, CONTENDER, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=environ
        )
        for _ in range(2)
    ]
    for process in processes:
        process.stdin.write(json.dumps(asked).encode() + b"\n")
        assert await process.stdout.readline() == b"ready\n"
    for process in processes:
        process.stdin.write(b"go\n")
    answers = [await process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return [json.loads(answer) for answer, _ in answers]


async def test_r25_of_refreshes_in_two_processes_one_wins_for_each_session(store, key, backend):
    sessions = [await opened(store, key) for _ in range(40)]
    answers = await contend(backend, sessions, retry=None, times=2)
    outcomes = Counter()
    for at, session in enumerate(sessions):
        names = Counter(name for answer in answers for name in answer["names"][at :: len(sessions)])
        assert names == {"Advanced": 1, "Condemned": 1, "Refused": 2}
        outcomes += names
        assert (await store.find_session(session.id)).session.end_cause is SessionEnd.REUSE
    assert outcomes["Advanced"] == len(sessions)


async def test_r32_retries_in_two_processes_get_the_same_successor(store, key, backend):
    sessions = [await opened(store, key) for _ in range(40)]
    answers = await contend(backend, sessions, retry="5a" * 32, times=2)
    for at, session in enumerate(sessions):
        names = Counter(name for answer in answers for name in answer["names"][at :: len(sessions)])
        assert names == {"Advanced": 1, "Repeated": 3}
        assert (await store.find_session(session.id)).session.generation == 1
    assert {generation for answer in answers for generation in answer["generations"]} == {1}


# --- A refresh against a revocation ---


async def _log_out(store, case):
    await store.end_session(case.session.id, cause=SessionEnd.LOGOUT, now=START, by="test")


async def _revoke_key(store, case):
    await store.revoke_key(case.key.id, now=START, by="test")


async def _suspend(store, case):
    await store.set_partner_status(case.key.partner_id, PartnerStatus.SUSPENDED, now=START, by="test")


async def _suspend_and_resume(store, case):
    await _suspend(store, case)
    await store.set_partner_status(case.key.partner_id, PartnerStatus.ACTIVE, now=START, by="test")


async def _delete_company(store, case):
    await store.delete_company(case.key.partner_id, case.key.company_id, now=START, by="test")


class Case:
    """A session that is refreshed all the time while something ends it."""

    def __init__(self, key, session, dice):
        self.key = key
        self.session = session
        self.dice = dice
        self.newest = session
        self.acknowledged = False
        self.wins_after = []

    async def wander(self):
        for _ in range(self.dice.randrange(12)):
            await asyncio.sleep(0)

    async def refresh(self, node):
        """Refresh and refresh again until it is refused. An attempt that begins after the acknowledgement must not win."""
        while True:
            await self.wander()
            late = self.acknowledged
            outcome = await node.advance_session(a_refresh(self.newest))
            if not isinstance(outcome, Advanced):
                assert isinstance(outcome, Refused)
                return
            self.newest = outcome.session
            if late:
                self.wins_after.append(outcome)
                return

    async def end(self, node, way):
        await self.wander()
        await way(node, self)
        self.acknowledged = True


@pytest.mark.parametrize("way", [_log_out, _revoke_key, _suspend, _suspend_and_resume, _delete_company])
async def test_r27_after_an_acknowledged_revocation_no_token_is_usable(store, other_node, key, way):
    """Two hundred interleavings of each kind, a thousand in all, over one node and over two."""
    dice = random.Random(27)
    for round_ in range(5):
        cases = []
        for at in range(40):
            name = f"partner-{round_}-{at}"
            case_key = a_key(name)
            await store.add_partner(a_partner(name), case_key, by="test")
            if way is _delete_company:
                company = a_company(name)
                case_key = a_key(name, company.id)
                await store.create_company(company, case_key, replay=None, by="test")
            cases.append(Case(case_key, await opened(store, case_key), dice))
        nodes = (store, other_node if round_ % 2 else store)
        await asyncio.gather(*(part for case in cases for part in (case.refresh(nodes[0]), case.end(nodes[1], way))))
        for case in cases:
            assert case.wins_after == []
            # Whatever was the last token that anybody was given, it is dead, and so is the session that its JWT names.
            assert isinstance(await nodes[0].advance_session(a_refresh(case.newest)), Refused)
            found = await nodes[0].find_session(case.session.id)
            assert found.session.generation == case.newest.generation
            assert judge_session(found, START) is not None


@pytest.mark.parametrize("way", [_revoke_key, _suspend, _delete_company])
async def test_r27_no_login_begun_after_an_acknowledged_revocation_opens_a_session(store, other_node, company_key, way):
    dice = random.Random(40)
    case = Case(company_key, await opened(store, company_key), dice)
    late = []

    async def log_in():
        while True:
            begun_after = case.acknowledged
            outcome = await store.open_session(a_login(company_key))
            if not isinstance(outcome, Opened):
                return
            case.newest = outcome.session
            if begun_after:
                late.append(outcome)
                return

    await asyncio.gather(*(log_in() for _ in range(8)), case.end(other_node, way))
    assert late == []
    # One that was opened a moment before is as dead as the others.
    assert isinstance(await store.advance_session(a_refresh(case.newest)), Refused)


async def test_a_purge_beside_refreshes_takes_no_session_that_lives(store, other_node, key):
    sessions = [await opened(store, key) for _ in range(30)]

    async def refresh(session):
        for _ in range(5):
            outcome = await store.advance_session(a_refresh(session))
            assert isinstance(outcome, Advanced)
            session = outcome.session

    async def purge():
        for _ in range(20):
            purged = await other_node.purge_sessions(after=None, limit=100, ended_before=START)
            assert purged.deleted == 0

    await asyncio.gather(*(refresh(session) for session in sessions), purge())


async def test_r34_what_one_node_has_ended_the_other_finds_ended_when_the_verb_returns(store, other_node, key):
    for _ in range(30):
        session = await opened(store, key)
        await other_node.end_session(session.id, cause=SessionEnd.LOGOUT, now=START, by="test")
        assert (await store.find_session(session.id)).session.ended_at == START
        assert isinstance(await store.advance_session(a_refresh(session)), Refused)
