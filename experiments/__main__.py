"""Run experiments and print a table: ``python -m experiments [NAME…] [--quick]``.

Exit code 1 if a promise was broken, or if a negative control was not.
"""

import argparse
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from experiments.catalogue import EXPERIMENTS
from experiments.ground import Experiment, Ground, Verdict, Work


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--quick", action="store_true", help="fewer of everything")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"there is no experiment {', '.join(unknown)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended here too
    root = Path(tempfile.mkdtemp(prefix="gatelodge-experiments-"))
    try:
        # In the order of the table, whatever the order of the names: the search for secrets comes last.
        chosen = [experiment for name, experiment in EXPERIMENTS.items() if not given.names or name in given.names]
        with Ground(root, quick=given.quick) as ground:
            rows = [_run(experiment, ground) for experiment in chosen]
    finally:
        shutil.rmtree(root)
    print()
    for row in rows:
        print(row)
    good = sum(row.good for row in rows)
    print(f"\n{good} of {len(rows)}: the promise holds, and its negative control fails.")
    return 0 if good == len(rows) else 1


@dataclass(frozen=True, slots=True)
class _Row:
    """A line of the table."""

    name: str
    promise: str
    control: str
    counts: str
    seconds: float

    @property
    def good(self) -> bool:
        """Whether both came out as they must."""
        return self.promise == "holds" and self.control == "fails"

    def __str__(self) -> str:
        return f"{self.name:10} promise {self.promise:10} control {self.control:14} {self.seconds:5.0f} s  {self.counts}"


def _run(experiment: Experiment, ground: Ground) -> _Row:
    print(f"\n{experiment.name}: {experiment.promise}", flush=True)
    begun = time.monotonic()
    promise = _try("promise", experiment.run, ground)
    control = _try(f"control ({experiment.control_says})", experiment.control, ground)
    return _Row(
        experiment.name,
        "broke down" if promise is None else "holds" if promise.holds else "BROKEN",
        "broke down" if control is None else "fails" if experiment.control_fails(control) else "DOES NOT FAIL",
        promise.counts if promise is not None else "",
        time.monotonic() - begun,
    )


def _try(what: str, work: Work, ground: Ground) -> Verdict | None:
    begun = time.monotonic()
    try:
        verdict = work(ground)
    except Exception as fault:  # noqa: BLE001 - what breaks down has proven nothing, and the others go on
        traceback.print_exc()
        print(f"  {what}: broke down ({type(fault).__name__})", flush=True)
        return None
    print(f"  {what}: {verdict.counts}; {len(verdict.faults)} faults; {time.monotonic() - begun:.0f} s", flush=True)
    for fault in verdict.faults[:3]:
        print(f"    - {fault}", flush=True)
    return verdict


if __name__ == "__main__":
    sys.exit(main())
