"""How many steps from one checkpoint to the next, when machines disappear at random.

Checkpoints cost time, and so do the steps that are repeated after a failure: the shorter the interval, the more of the
one and the less of the other. Failures are taken to come without memory, a mean time M apart; a checkpoint holds
training up for C seconds. J. W. Young, "A first order approximation to the optimum checkpoint interval" (Communications
of the ACM 17, 1974) found sqrt(2 C M) seconds of work between checkpoints. J. T. Daly, "A higher order estimate of the
optimum checkpoint interval for restart dumps" (Future Generation Computer Systems 22, 2006) carried the expansion
further, eq. 37, which is what is used here; for C well below M both agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A number of steps between checkpoints, and what it costs; `str` gives a sentence for people."""

    steps: int
    step_s: float
    """Seconds of a step."""
    checkpoint_s: float
    """Seconds that a checkpoint holds training up."""
    mtbf_s: float
    """Mean time between failures of any of the run's machines, seconds."""

    @property
    def checkpoint_share(self) -> float:
        """Share of the time that goes into checkpoints while nothing fails."""
        return self.checkpoint_s / (self.steps * self.step_s + self.checkpoint_s)

    @property
    def loss(self) -> float:
        """Expected share of the time that goes into checkpoints and repeated steps.

        Exact for failures without memory that may come at any moment (Daly 2006, without the time of a restart,
        which no interval changes): W seconds of work and C of a checkpoint take M (exp((W + C) / M) - 1) on average.
        """
        work = self.steps * self.step_s
        exponent = (work + self.checkpoint_s) / self.mtbf_s
        # Beyond what a double can hold, nothing ever gets done.
        return 1 - work / (self.mtbf_s * math.expm1(exponent)) if exponent < 700 else 1.0

    def __str__(self) -> str:
        steps = "every step" if self.steps == 1 else f"every {self.steps} steps"
        return (
            f"{steps}: checkpoints cost {_percent(self.checkpoint_share)}, expected loss {_percent(self.loss)} "
            f"at one preemption per {_duration(self.mtbf_s)}"
        )


def best_interval(step_s: float, checkpoint_s: float, mtbf_s: float, *, written_s: float = 0.0) -> Interval:
    """The interval after which a checkpoint is due, so that least time is lost.

    Daly's estimate holds for C < 2 M. Above that a checkpoint is less likely to end than not, and the interval is M,
    as he recommends: no choice helps much there.

    Args:
        step_s: seconds of a step.
        checkpoint_s: seconds that a checkpoint holds training up; 0 gives a checkpoint every step.
        mtbf_s: mean time between failures of any of the run's machines, seconds.
        written_s: seconds until a checkpoint is written while training goes on; the next one is due no earlier, or
            training would wait.

    Raises:
        ValueError: a time is not a number of seconds above 0, or below 0 for that of a checkpoint.
    """
    if not (0 < step_s < math.inf and 0 <= checkpoint_s < math.inf and 0 < mtbf_s < math.inf):
        raise ValueError(
            f"a step of {step_s} s, a checkpoint of {checkpoint_s} s and {mtbf_s} s between failures; "
            "expected finite times, above 0 but for the checkpoint's, which may be 0"
        )
    ratio = checkpoint_s / (2 * mtbf_s)
    seconds = mtbf_s
    if ratio < 1:
        young = math.sqrt(2 * checkpoint_s * mtbf_s)
        seconds = young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint_s
    return Interval(max(1, round(seconds / step_s), math.ceil(written_s / step_s)), step_s, checkpoint_s, mtbf_s)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.0995 else f"{100 * share:.0f} %"


def _duration(seconds: float) -> str:
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s"
