"""The quick variants of the experiments: each promise holds, and each negative control fails for its own reason."""

import shutil

import pytest
from experiments.catalogue import EXPERIMENTS
from experiments.ground import Ground
from experiments.timing import mann_whitney
from experiments.trace import parse

# What measures time or runs many nodes wants a quiet machine, and what fails over or shifts clocks wants Debian's packages:
# `make experiments` has both.
ALONE = {"timing", "start", "rolling", "quotas", "nodes", "postgres", "outage", "revocation", "failover", "scale", "oldest"}
NAMES = [name for name in EXPERIMENTS if name not in ALONE]


@pytest.fixture
def ground(tmp_path):
    if shutil.which("strace") is None:
        pytest.fail("strace is not installed: `make test` installs it when run as root")
    with Ground(tmp_path, quick=True) as ground:
        yield ground


@pytest.mark.parametrize("name", NAMES)
def test_the_promise_holds(name, ground):
    verdict = EXPERIMENTS[name].run(ground)
    assert verdict.holds, "\n".join([verdict.counts, *verdict.faults])


@pytest.mark.parametrize("name", NAMES)
def test_the_negative_control_fails_for_its_own_reason(name, ground):
    verdict = EXPERIMENTS[name].control(ground)
    assert EXPERIMENTS[name].control_fails(verdict), "\n".join([verdict.counts, *verdict.faults])


def test_samples_of_one_kind_are_not_told_apart_and_shifted_ones_are():
    same = [float(number % 997) for number in range(4000)]
    assert mann_whitney(same[::2], same[1::2]) > 0.01
    assert mann_whitney(same[::2], [value + 50 for value in same[1::2]]) < 1e-6


def test_the_rank_test_agrees_with_a_table():
    # Two samples of five without overlap: U = 0; the normal approximation without continuity correction gives z = -2.611.
    assert mann_whitney([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == pytest.approx(0.00902, abs=1e-4)


def test_a_trace_keeps_the_order_in_which_calls_begin_and_end():
    calls = parse(
        '11 1.000001 read(5<socket:[7]>, ""..., 99) = 3\n'
        "12 1.000002 fdatasync(9</data/x.db-wal> <unfinished ...>\n"
        '11 1.000003 write(2</log>, ""..., 4) = 4\n'
        "12 1.000004 <... fdatasync resumed>) = -1 EIO (Input/output error) (INJECTED)\n"
    )
    assert [(call.name, call.file, call.begun, call.ended, call.result) for call in calls] == [
        ("read", "socket:[7]", 0, 0, 3),
        ("fdatasync", "/data/x.db-wal", 1, 3, -1),
        ("write", "/log", 2, 2, 4),
    ]
    assert [call.good for call in calls] == [True, False, True]
