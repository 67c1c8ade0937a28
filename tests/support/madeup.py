"""Records of searches that never ran: events with the times, values and ends that a test wants."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mimiclab.experiment import load_experiment
from mimiclab.search.course import plan_event
from mimiclab.search.record import Record, decision_event
from mimiclab.search.rules import Decision, Rules
from mimiclab.search.trials import Plan
from mimiclab.storage import Storage

START = 1_800_000_000.0
FILE = """
name: look
data: {scenes: {}}
optim: {epochs: 9}
search:
  trials: 12
  reduction_factor: 3
  space:
    optim.lr: {loguniform: [1e-4, 1e-2]}
    model.pyramid.stagger: {choice: [0, 1]}
"""
STEPS = 10
"""Of an epoch."""


class MadeUp:
    """The events of a search, one after the other, with the decisions that follow from them.

    Args:
        folder: that holds the experiment and, below runs/, the search.
        text: of the experiment.
        overrides: of its keys.
    """

    def __init__(self, folder: Path, text: str = FILE, *overrides: str) -> None:
        file = folder / "look.yaml"
        file.write_text(text)
        plan = Plan(load_experiment(file, overrides))
        self.trials = plan.trials()
        self.max_t = plan.max_t
        self.storage = Storage(folder / "runs" / plan.experiment.name)
        self.events: list[dict[str, Any]] = []
        self.now = START
        self._rules = Rules()
        self._begin = plan_event(plan, self.trials)
        self.driver()

    def write(self) -> Record:
        """The record as a file."""
        record = Record(self.storage)
        record.add(*self.events[len(record.events) :])
        return record

    def add(self, kind: str, number: int | None = None, wait: float = 0.0, **more: Any) -> Decision | None:
        """What happens next, `wait` seconds later."""
        self.now += wait
        trial = {} if number is None else {"trial": self.trials[number].name}
        event = {"event": kind, **trial, **more, "time": self.now}
        decision = self._rules.take(event)
        self.events += [event, *([decision_event(event, decision)] if decision else [])]
        return decision

    def driver(self, wait: float = 0.0) -> None:
        self.add(wait=wait, kind=self._begin["event"], **{k: v for k, v in self._begin.items() if k != "event"})

    def start(self, number: int, **more: Any) -> None:
        values = self.trials[number].values
        self.add("started", number, values=values, where="node-1", resources={"CPU": 2.0}, **more)

    def result(self, number: int, epoch: int, value: float, wait: float = 60.0, **more: Any) -> bool:
        """Whether the trial goes on."""
        told = None if math.isnan(value) else value
        decision = self.add("result", number, wait, epoch=epoch, step=STEPS * epoch, value=told, **more)
        assert decision is not None
        return decision.go_on

    def end(self, number: int, outcome: str, error: str | None = None, **more: Any) -> None:
        self.add("ended", number, outcome=outcome, error=error, **more)

    def run(self, number: int, curve: Callable[[int], float], most: int | None = None) -> None:
        """A trial alone, to its end or its cut, or for as many epochs as it is given."""
        self.start(number)
        for epoch in range(1, (most or self.max_t) + 1):
            if not self.result(number, epoch, curve(epoch)):
                self.end(number, "pruned")
                return
        if most is None:
            self.end(number, "finished")


def rising(best: float) -> Callable[[int], float]:
    """A curve on its way to a value."""
    return lambda epoch: best * (1 - math.exp(-epoch / 3))


def effect(values: dict[str, Any], noise: random.Random) -> float:
    """What is best for a trial: the learning rate matters, the stagger does not."""
    return 0.3 - 0.1 * abs(math.log10(values["optim.lr"]) + 3) + noise.gauss(0, 0.003)
