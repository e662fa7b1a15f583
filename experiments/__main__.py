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
    root = Path(tempfile.mkdtemp(prefix="gatelodge-experiments-"))
    try:
        # In the order of the table, whatever the order of the names: the search for secrets comes last.
        chosen = [experiment for name, experiment in EXPERIMENTS.items() if not given.names or name in given.names]
        with Ground(root, quick=given.quick) as ground:
            good = [_run(experiment, ground) for experiment in chosen]
    finally:
        shutil.rmtree(root)
    print(f"\n{sum(good)} of {len(good)} experiments: the promise holds, and its negative control fails.")
    return 0 if all(good) else 1


def _run(experiment: Experiment, ground: Ground) -> bool:
    print(f"\n{experiment.name}: {experiment.promise}", flush=True)
    promise = _try("promise", experiment.run, ground)
    control = _try(f"control ({experiment.control_says})", experiment.control, ground)
    holds = promise is not None and promise.holds
    fails = control is not None and experiment.control_fails(control)
    if promise is not None:
        print(f"  the promise {'holds' if holds else 'IS BROKEN'}", flush=True)
    print(f"  the control {'fails, as it must' if fails else 'DOES NOT FAIL as it must: this proves nothing'}", flush=True)
    return holds and fails


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
