"""The closed formula for a run of fixed size whose machines go without memory; what `simulate` is checked against.

Losses come at a rate r = workers / mtbf while the run works or saves. One that is announced (a share p of them) costs
a checkpoint C; one that is not costs the work since the last checkpoint. Either is followed by D + R seconds, for a
new machine and a restart, in which no further loss is counted. For s seconds of work between checkpoints (Daly 2006,
with the losses that cost work, of rate u = (1 - p) r):

    time per segment = (exp(u (s + C)) - 1) / u    until s + C seconds passed without an unannounced loss
    losses per segment = r times that
    total = segments * (time per segment + losses per segment * (p C + D + R)) + R

An announced loss saves the work, so less than s is at risk after it: the formula is exact for p = 0 and an upper bound
otherwise.
"""

from __future__ import annotations

import math

from mimiclab.plan.fleet import Fleet
from mimiclab.plan.job import Job


def expected_s(job: Job, fleet: Fleet, every_s: float) -> float:
    """Mean seconds from the start to the end of a run that does not go on with fewer machines.

    Args:
        job: what is trained.
        fleet: on what.
        every_s: seconds of work between checkpoints.
    """
    segments = job.work_s(fleet.workers) / every_s
    rate = 1 / fleet.mtbi_s
    unannounced = (1 - fleet.notice_share) * rate
    segment = every_s + job.checkpoint_s
    restart = job.restart(fleet.workers)
    per_segment = math.expm1(unannounced * segment) / unannounced if unannounced else segment
    repair = fleet.notice_share * job.checkpoint_s + fleet.replace_s + restart
    return segments * per_segment * (1 + rate * repair) + restart
