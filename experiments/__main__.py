"""Run experiments and print a table: ``python -m experiments [NAME…] [--quick]``.

Exit code 1 if a promise was broken, or if a negative control was not.
"""

import argparse
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from experiments import EXPERIMENTS
from experiments.ground import Experiment, Ground, Work


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--quick", action="store_true", help="fewer of everything")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"there is no experiment {', '.join(unknown)}")
    root = Path(tempfile.mkdtemp(prefix="gatelodge-experiments-"))
    try:
        ground = Ground(root, quick=given.quick)
        # In the order of the table, whatever the order of the names: the search for secrets comes last.
        chosen = [experiment for name, experiment in EXPERIMENTS.items() if not given.names or name in given.names]
        good = [_run(experiment, ground) for experiment in chosen]
    finally:
        shutil.rmtree(root)
    print(f"\n{sum(good)} of {len(good)} experiments: the promise holds, and its negative control fails.")
    return 0 if all(good) else 1


def _run(experiment: Experiment, ground: Ground) -> bool:
    print(f"\n{experiment.name}: {experiment.promise}", flush=True)
    holds = _report("promise", "holds", "BROKEN", experiment.run, ground)
    control = _report(
        f"control: {experiment.control_says}", "HOLDS, so the experiment proves nothing", "fails", experiment.control, ground
    )
    return holds and not control


def _report(what: str, holds: str, broken: str, work: Work, ground: Ground) -> bool:
    begun = time.monotonic()
    try:
        verdict = work(ground)
    except Exception as fault:  # noqa: BLE001 - an experiment that breaks down has not proven anything; the others go on
        traceback.print_exc()
        print(f"  {what}: DID NOT FINISH ({type(fault).__name__})", flush=True)
        # Neither does a control that breaks down count as one that fails.
        return what != "promise"
    said = holds if verdict.holds else broken
    print(f"  {what}: {said} ({verdict.counts}; {time.monotonic() - begun:.0f} s)", flush=True)
    for fault in verdict.faults[: 20 if what == "promise" else 2]:
        print(f"    - {fault}", flush=True)
    return verdict.holds


if __name__ == "__main__":
    sys.exit(main())
