"""The oldest PostgreSQL that is promised: the store's tests, which `make test` runs on the wheel's, on Debian's 15.

Among them is one that asks the server for its version. The control runs some of them on a store that asks for a setting which
only newer servers have.
"""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from xml.etree import ElementTree as ET

from tests.postgres import PROGRAMS

from experiments.ground import Experiment, Ground, Verdict
from experiments.patroni import DEBIAN_PROGRAMS

_ROOT: Final = Path(__file__).resolve().parents[1]
_CONFORMANCE: Final = "tests/store/conformance"
_PARTICULAR: Final = "tests/store/test_postgres.py"
_SOME: Final = f"{_CONFORMANCE}/test_tiers.py"
_FEWEST: Final = 400
"""How many there are in all, at least: none may get lost."""
_TIMEOUT: Final = 1800
_DRESS: Final = re.compile(r'(?:failed on \w+ with ")?[\w.]+: (?:\([\w.]+\) )?')
"""What stands before a fault's own words."""


def _test(report: Path, *arguments: str, cases: str, fewest: int) -> Verdict:
    """Run tests on the oldest. ``cases`` picks those that concern PostgreSQL; there have to be ``fewest`` of them."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--timeout=120",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
        "-k",
        cases,
    ]
    environ = {**os.environ, PROGRAMS: str(DEBIAN_PROGRAMS), "PYTHONPATH": str(_ROOT / "tests")}
    done = subprocess.run(
        [*command, *arguments], cwd=_ROOT, env=environ, capture_output=True, text=True, check=False, timeout=_TIMEOUT
    )
    assert report.exists(), done.stdout + done.stderr
    tried = ET.parse(report).findall(".//testcase")
    faults = [fault for case in tried for fault in _faults_of(case)]
    if len(tried) < fewest:
        faults.append(f"{len(tried)} tests were run, and not {fewest} or more")
    if done.returncode != 0 and not faults:
        faults.append(f"pytest ended with {done.returncode}: {done.stdout[-500:]}")
    version = subprocess.run([DEBIAN_PROGRAMS / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
    return Verdict(f"{len(tried)} tests on {version.strip()}", faults)


def _faults_of(case: ET.Element) -> Sequence[str]:
    """What went wrong in one; one that was left out counts."""
    found = [case.find(kind) for kind in ("failure", "error", "skipped")]
    said = [(each.get("message") or each.tag).splitlines()[0] for each in found if each is not None]
    return [f"{_DRESS.sub('', words, count=1)} ({case.get('classname')}.{case.get('name')})" for words in said]


def run(ground: Ground) -> Verdict:
    """All of them, on the product."""
    where = [_PARTICULAR, _SOME if ground.quick else _CONFORMANCE]
    many = ["--numprocesses=logical", "--maxprocesses=4", "--dist=worksteal"]
    return _test(ground.root / "oldest.xml", *many, *where, cases="postgres", fewest=ground.scale(_FEWEST, 20))


def control(ground: Ground) -> Verdict:
    """Some, on a store that asks for more than 15 has."""
    return _test(ground.root / "oldest-control.xml", "-p", "experiments.newer", _SOME, cases="newer", fewest=1)


EXPERIMENT: Final = Experiment(
    name="oldest",
    promise="PostgreSQL 15, the oldest that is promised, does all that the store asks of it",
    run=run,
    control=control,
    control_says="a store that asks for a setting of PostgreSQL 17",
    finds='unrecognized configuration parameter "transaction_timeout"',
)
