"""The course of a search: its trials and rungs as the record has them, and every event that moves them on."""

from __future__ import annotations

import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from mimiclab.experiment import resolved_yaml
from mimiclab.search import metric
from mimiclab.search.asha import Decision
from mimiclab.search.budget import run_of
from mimiclab.search.record import Event, Record, decision_event, stamped, value_of
from mimiclab.search.results import show, spent_text
from mimiclab.search.rules import RULES, Rules
from mimiclab.search.trials import Plan, Trial, ranked, resources_of, trial_name

Ending = Literal["finished", "pruned", "out of budget", "preempted", "failed"]

_OVER: Mapping[str | None, Ending] = {None: "finished", "rung": "pruned", "budget": "out of budget"}


class Course:
    """Where a search stands. What happens is written to the record before it takes effect.

    Args:
        plan: the search.
        trials: what it gives; they are brought to where the record says they are, and changed in place from there.
        record: of the search, empty where it is new.
        say: gets a line for each event.
        allowed: called before anything is written; what it raises ends the search.
        heard: when the driver before was last heard of, in seconds since 1970, if it died.
    """

    def __init__(
        self,
        plan: Plan,
        trials: Sequence[Trial],
        record: Record,
        say: Callable[[str], None],
        allowed: Callable[[], None] = lambda: None,
        heard: float | None = None,
    ) -> None:
        self._plan = plan
        self._record = record
        self._say = say
        self._allowed = allowed
        self._heard = heard
        self._is_open = False
        self._trials = {trial.name: trial for trial in trials}
        self._rules = Rules()
        self._given: set[str] = set()
        self._stops: dict[str, str | None] = {}
        self._deaths: dict[str, Counter[str]] = {}
        self._scores: dict[int, float] = {}
        self._bests: list[tuple[int, float]] = []
        self._num = 0
        self._said_spent = False
        self._improved: Callable[[int, float], None] = lambda step, value: None
        self._changed: Callable[[Trial], object] = lambda run: None
        decision = None
        for event in record.events:
            decision = self._take(event)
        # Half of the last write may be missing: a result without its decision.
        self._missing = [decision_event(record.events[-1], decision)] if decision else []
        # The latest word on it; what was decided before holds.
        self._rules.budget = plan.config.budget
        for run in self._runs():
            held = self._stops.get(run.name) in (("rung", "budget") if self.is_spent else ("rung",))
            if run.outcome in ("running", "out of budget") and not held:
                run.outcome = "waiting"

    @property
    def left(self) -> list[Trial]:
        """The runs that are still to be begun, or to be run on, the next one first."""
        if self.is_spent:
            return []
        waiting = [run for run in self._runs() if run.outcome == "waiting" and run.name not in self._given]
        return sorted(waiting, key=lambda run: not run.begun)

    @property
    def is_over(self) -> bool:
        """Whether nothing runs, and nothing is left to be run."""
        return not self.left and not any(run.outcome == "running" or run.name in self._given for run in self._runs())

    @property
    def is_spent(self) -> bool:
        """Whether the budget is spent."""
        return self._rules.is_spent(self._now())

    @property
    def spent(self) -> float:
        """GPU-hours, or core-hours, so far."""
        return self._rules.account.spent(self._now())

    def open(
        self,
        improved: Callable[[int, float], None] = lambda step, value: None,
        changed: Callable[[Trial], object] = lambda run: None,
    ) -> None:
        """Begin, or go on: from here on the record is written.

        Args:
            improved: hears of the best value of all trials, each time that it changes: the number of results and ends
                up to then, and the value. What was before is told now, again.
            changed: hears of every run that begins, goes on, or is over.
        """
        self._improved, self._changed = improved, changed
        for step, value in self._bests:
            self._improved(step, value)
        if self.is_over and not self._missing:
            return
        begin = plan_event(self._plan, [*self._trials.values()])
        if self._heard is not None:
            begin["heard"] = self._heard
        self._is_open = True
        self._write(*self._missing, begin)
        self._missing = []
        # What an earlier driver was killed in: decisions that it had made hold, the rest is to be run on.
        for run in self._runs():
            if run.outcome == "running":
                self.complete(run)

    def next(self) -> Trial | None:
        """The run to start now, with its values, if there is one; it counts as given away."""
        run = next(iter(self.left), None)
        if run is None:
            if self.is_spent and not self._said_spent:
                self._said_spent = True
                self._say(f"{spent_text(self._plan.experiment, self.spent)}: no trial goes on")
            return None
        if not run.values:
            from mimiclab.search.proposals import propose

            plan, known = self._plan, [trial for trial in self._trials.values() if trial.values]
            propose(plan.config, plan.experiment.seed, run.number, known, functools.partial(plan.fill, run))
        self._given.add(run.name)
        return run

    def begin(self, run: Trial, where: str | None = None, resources: Mapping[str, float] | None = None) -> None:
        """A run starts, or goes on where an earlier process left it.

        Args:
            run: which.
            where: the machine of its process.
            resources: what it takes of the cluster; None for what its workers do.
        """
        event: Event = {"event": "resumed" if run.begun else "started", **run.key}
        if not run.begun:
            event["values"] = run.values
        self._write({**event, "where": where, "resources": resources or resources_of(self._plan.experiment)})
        after = f" after epoch {run.epochs}" if run.epochs else ""
        values = ", ".join(f"{key} {show(value)}" for key, value in run.values.items())
        self._say(f"{run.name}  {event['event']}{after}: {values}")
        self._changed(run)

    def result(
        self,
        run: Trial,
        *,
        epoch: int,
        metrics: Mapping[str, float],
        step: int | None = None,
        last: bool = False,
        where: str | None = None,
    ) -> bool:
        """Whether a run goes on after an evaluation.

        An epoch that is known already changes nothing: a run that is resumed tells its last one again.

        Args:
            run: which.
            epoch: after which it was evaluated.
            metrics: of the evaluation.
            step: of training.
            last: whether training ends here, before its last epoch too.
            where: the machine that computed it.

        Raises:
            UserError: the searched metric is not among the metrics.
        """
        if epoch <= run.epochs:
            return run.name not in self._stops
        searched = self._plan.config.metric
        event: Event = {"event": "result", **run.key, "epoch": epoch, "step": step}
        event["value"] = value = metric.value_of(searched, metrics)
        if not isinstance(searched, str):
            event["metrics"] = {name: metrics[name] for name in searched}
        if where is not None:
            event["where"] = where
        if last or epoch >= run.experiment.optim.epochs:
            event["last"] = True
        self._write(event)
        self._say(f"{run.name}  epoch {epoch}/{run.experiment.optim.epochs}, {metric.name_of(searched)} {value:.4f}")
        return run.name not in self._stops

    def complete(self, run: Trial) -> None:
        """A run was stopped, or ended by itself."""
        self.end(run, _OVER[self._stops.get(run.name)])

    def end(self, run: Trial, outcome: Ending, error: str | None = None) -> None:
        """A run is over for good."""
        self._write({"event": "ended", **run.key, "outcome": outcome, "error": error})
        after = f" after epoch {run.epochs}" if run.name in self._stops and run.epochs else ""
        self._say(f"{run.name}  {outcome}{after}" + (f": {error}" if error else ""))
        self._changed(run)

    def died(self, run: Trial, why: Literal["crash", "preemption"], reason: str) -> None:
        """The process of a run died, which says nothing of its values: it is to be run on, unless that is too often.

        Args:
            run: which.
            why: whether its machine was taken.
            reason: a line for people.
        """
        if run.name in self._stops:
            self.complete(run)
            return
        scale = run.experiment.scale
        num = self._deaths.get(run.name, Counter())[why] + 1
        if why == "crash" and num > scale.max_crashes:
            text = f"scale.max_crashes: {scale.max_crashes}, and its process died {num} times without a new evaluation"
            self.end(run, "failed", f"{text}; the last time: {reason}")
        elif why == "preemption" and scale.max_preemptions is not None and num > scale.max_preemptions:
            text = f"scale.max_preemptions: {scale.max_preemptions}, and its process was taken its machine {num} times"
            self.end(run, "preempted", f"{text}; the last time: {reason}")
        else:
            self._write({"event": "retried", **run.key, "why": why, "reason": reason})
            self._say(f"{run.name}  its process died, it is to be run on: {reason}")

    def settle(self, run: Trial) -> None:
        """MLflow knows how a run stands, and its values."""
        self._write({"event": "settled", **run.key})

    def _now(self) -> float:
        """Up to when runs count: before `open` to the end of the driver before, with which theirs came."""
        if self._is_open:
            return time.time()
        return max(self._record.events[-1]["time"] if self._record.events else 0.0, self._heard or 0.0)

    def _runs(self) -> Iterator[Trial]:
        """The trials, and what repeats those that have finished, of the best one first."""
        yield from self._trials.values()
        if self._plan.config.seeds_per_trial > 1:
            for trial in ranked(self._trials.values(), self._plan.config.mode):
                yield from trial.repeats if trial.outcome == "finished" else ()

    def _write(self, *events: Event) -> None:
        self._allowed()
        written: list[Event] = []
        for event in events:
            # In one write: a result never stands there without what follows from it.
            written.append(event if "time" in event else stamped(event))
            if event["event"] != "decision" and (decision := self._take(written[-1])):
                written.append(decision_event(written[-1], decision))
        self._record.add(*written)

    def _take(self, event: Event) -> Decision | None:
        """Move everything on by an event; the decision where it is a result."""
        decision = self._rules.take(event)
        if "trial" in event and event["event"] != "decision":
            self._move(self._run(event), event)
        if decision is not None and not decision.go_on:
            self._stops[run_of(event)] = decision.reason
        return decision

    def _move(self, run: Trial, event: Event) -> None:
        kind, name = event["event"], run.name
        if kind in ("started", "resumed"):
            if not run.values:
                self._plan.fill(run, event["values"])
            run.begun, run.settled, run.outcome, run.error = True, False, "running", None
            self._given.discard(name)
            self._stops.pop(name, None)  # of one that the budget had stopped, which is larger now
        elif kind == "result":
            run.evaluations.append((event["epoch"], value_of(event)))
            self._deaths.pop(name, None)
            self._rank(run)
        elif kind == "retried":
            run.outcome, run.settled = "waiting", False
            self._given.discard(name)
            self._deaths.setdefault(name, Counter())[event.get("why", "crash")] += 1
        elif kind == "ended":
            run.outcome, run.error, run.settled = event["outcome"], event["error"], False
            self._given.discard(name)
            self._rank(run)
        elif kind == "settled":
            run.settled = True

    def _run(self, event: Event) -> Trial:
        trial = self._trials[event["trial"]]
        if "seed" not in event:
            return trial
        return next(repeat for repeat in trial.repeats if repeat.seed == event["seed"])

    def _rank(self, run: Trial) -> None:
        """Tell of the best value of all trials where it has changed."""
        self._num += 1
        mode = self._plan.config.mode
        trial = self._trials[trial_name(run.number)]
        if scores := trial.scores(mode):
            self._scores[run.number] = statistics.fmean(scores)
        if self._scores:
            best = max(self._scores.values()) if mode == "max" else min(self._scores.values())
            if not self._bests or best != self._bests[-1][1]:
                self._bests.append((self._num, best))
                self._improved(self._num, best)


def plan_event(plan: Plan, trials: Sequence[Trial]) -> Event:
    """A search and its trials as the event that begins a driver's part of the record."""
    config = plan.config
    rules = {**config.model_dump(include={*RULES}), "max_t": plan.max_t, "again": True}
    return {
        "event": "search",
        "experiment": resolved_yaml(plan.experiment.model_copy(update={"search": None})),
        "written": plan.written,
        "variables": plan.variables,
        "metric": metric.name_of(config.metric),
        **{name: rules[name] for name in RULES},
        "budget": config.budget,
        "trials": {trial.name: trial.values for trial in trials},
    }
