"""Every experiment, in the order in which they are run: the search for secrets comes after all that leave files behind."""

from collections.abc import Mapping
from typing import Final

from experiments import (
    canary,
    clocks,
    failover,
    faults,
    growth,
    kills,
    nodes,
    oldest,
    order,
    outage,
    quotas,
    reuse,
    revocation,
    rolling,
    scale,
    spending,
    timing,
)
from experiments.ground import Experiment

EXPERIMENTS: Final[Mapping[str, Experiment]] = {
    experiment.name: experiment
    for experiment in (
        kills.EXPERIMENT,
        order.EXPERIMENT,
        faults.EXPERIMENT,
        faults.START,
        spending.EXPERIMENT,
        reuse.REUSE,
        reuse.RETRY,
        clocks.EXPERIMENT,
        nodes.EXPERIMENT,
        nodes.CRASHES,
        quotas.EXPERIMENT,
        revocation.EXPERIMENT,
        outage.EXPERIMENT,
        rolling.EXPERIMENT,
        failover.EXPERIMENT,
        timing.EXPERIMENT,
        growth.EXPERIMENT,
        scale.EXPERIMENT,
        oldest.EXPERIMENT,
        canary.EXPERIMENT,
    )
}
