"""When machines go: one by one and without memory, or many of a zone at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Fleet:
    """Spot machines of one worker each.

    Each machine lives `mtbf_s` on average, in both kinds of trace; `burst` says how many go together.
    """

    workers: int
    mtbf_s: float
    """Mean life of one machine in seconds; inf where none is ever taken."""
    notice_share: float = 1.0
    """Share of the losses that are announced in time for a checkpoint: AWS gives 120 s, GCP and Kubernetes 25 to 30."""
    replace_s: float = 180.0
    """Mean seconds until another machine takes the place of one that is gone."""
    zones: int = 1
    """Over which the machines are spread evenly."""
    burst: float = 0.0
    """Share of a zone's machines that a loss takes at once; 0 takes one machine."""

    @property
    def mtbi_s(self) -> float:
        """Mean seconds between interruptions of a run that holds all the machines."""
        return self.mtbf_s * self._taken / self.workers

    @property
    def _taken(self) -> float:
        """Machines that a loss takes, on average."""
        if not self.burst:
            return 1.0
        zone = self.workers / self.zones
        # A loss that takes nothing is none.
        return zone * self.burst / -math.expm1(zone * math.log1p(-self.burst)) if self.burst < 1 else zone

    def losses(self, rng: np.random.Generator) -> Iterator[tuple[float, int, bool]]:
        """Draw losses for ever: seconds since the one before, machines taken, whether they were announced.

        A loss finds the fleet whole: what is lost while another loss is repaired is left out, which flatters fleets
        that lose machines faster than they get them.
        """
        zone = max(1, round(self.workers / self.zones))
        while True:
            wait = rng.exponential(self.mtbi_s) if math.isfinite(self.mtbi_s) else math.inf
            taken = 1
            if self.burst:
                while not (taken := int(rng.binomial(zone, self.burst))):
                    pass
            yield wait, taken, bool(rng.random() < self.notice_share)
