"""What one training needs, as numbers: the work, what a checkpoint and a restart cost, and what limits a step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """A training of `num_steps` steps of `global_batch` images.

    All rates are of one worker (one GPU) but for the store's, which all workers share.
    """

    num_steps: int
    global_batch: int
    images_per_s: float
    """Forward, backward and update of one worker, in images a second."""
    exchange_s: float = 0.0
    """Seconds of each step for exchanging gradients, where there are two workers or more."""
    loader_images_per_s: float = math.inf
    """Images a second that the loader processes of one worker decode and augment."""
    store_images_per_s: float = math.inf
    """Images a second that the store of the data delivers to all workers together."""
    checkpoint_s: float = 0.5
    """Seconds that a checkpoint holds training up."""
    evaluation_s: float = 0.0
    """Seconds of all evaluations together, on one worker; they are dealt out to all."""
    restart_s: float = 60.0
    """Seconds from an interruption to the first step after it, on two workers."""
    restart_s_per_worker: float = 0.05
    """Seconds more for each further worker: the head starts their processes, one after the other."""

    def step_s(self, workers: int) -> float:
        """Seconds of a step, by its slowest part: loading runs beside computing."""
        return max(self.limits(workers).values())

    def limits(self, workers: int) -> dict[str, float]:
        """Seconds that each part alone would take for a step: what computes, what loads, what stores."""
        share = math.ceil(self.global_batch / workers)
        exchange = self.exchange_s if workers > 1 else 0.0
        return {
            "compute": share / self.images_per_s + exchange,
            "loader": share / self.loader_images_per_s,
            "store": self.global_batch / self.store_images_per_s,
        }

    def restart(self, workers: int) -> float:
        """Seconds from an interruption to the first step after it."""
        return self.restart_s + self.restart_s_per_worker * max(0, workers - 2)

    def work_s(self, workers: int) -> float:
        """Seconds of useful work on so many workers: what it takes where nothing fails and nothing is saved."""
        return self.num_steps * self.step_s(workers) + self.evaluation_s / workers
