"""The rules of a search: whether a trial goes on after a result, by the results before it and by what was spent.

A decision is a function of the record's events alone, in their order.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from mimiclab.search.asha import Asha, Decision
from mimiclab.search.budget import Account

Event = dict[str, Any]

RULES = ("max_t", "grace_period", "reduction_factor", "mode", "unit", "again")
"""What decisions depend on besides results and the budget: keys of an event `search`."""


class Rules:
    """Makes the decisions of a search; `take` every event of its record in order.

    Attributes:
        account: what was spent.
        budget: in hours, as the latest driver has it; None for any amount.
    """

    def __init__(self) -> None:
        self.account = Account()
        self.budget: float | None = None
        self._unit = "epoch"
        self._asha: Asha | None = None

    @property
    def rungs(self) -> tuple[int, ...]:
        """In epochs or steps, the first one first; none before an event `search`."""
        return self._asha.rungs if self._asha else ()

    def take(self, event: Event) -> Decision | None:
        """Take note of an event; the decision about the trial where it is a result."""
        if event["event"] == "search":
            self._asha = self._asha or rungs_of(event)
            self._unit = "step" if event.get("unit") == "steps" else "epoch"
            self.budget = event.get("budget")
        self.account.take(event)
        return self._decide(event) if event["event"] == "result" else None

    def is_spent(self, at: float) -> bool:
        """Whether the budget was spent by a moment, in seconds since 1970."""
        return self.budget is not None and self.account.spent(at) >= self.budget

    def _decide(self, result: Event) -> Decision:
        assert self._asha is not None  # nothing is recorded before the search
        decision = Decision(go_on=True)
        if "seed" not in result:  # what repeats a finished trial is for its own sake
            decision = self._asha.decide(result["trial"], result[self._unit], value_of(result))
        if result.get("last"):  # it ends by itself
            return replace(decision, go_on=True, reason=None)
        if decision.go_on and self.is_spent(result["time"]):
            spent = round(self.account.spent(result["time"]), 6)
            return replace(decision, go_on=False, reason="budget", spent=spent)
        return decision


def rungs_of(search: Event) -> Asha:
    """Empty rungs of the search that an event `search` tells of."""
    # Records of earlier versions do not say: trials were compared once at each rung.
    return Asha(**{name: search.get(name, False) for name in RULES if name != "unit"})


def value_of(result: Event) -> float:
    """The metric's value in an event `result`."""
    return math.nan if result["value"] is None else float(result["value"])
