"""What a record tells of a search: each trial's curve, where it was cut, how long it ran, and what all of it cost."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mimiclab.experiment import LoadedExperiment, load_experiment
from mimiclab.schema import Experiment, SearchConfig
from mimiclab.search.budget import Account, run_of
from mimiclab.search.rules import Event, rungs_of, value_of


@dataclass(frozen=True)
class Point:
    """An evaluation."""

    t: int
    """How far the trial was: epochs or steps, as the search counts."""
    value: float
    """Of the searched metric; may be NaN."""
    time: float
    """When the search heard of it, seconds since 1970."""
    epoch: int
    step: int | None = None
    """None in a record that has none."""


@dataclass(frozen=True)
class Cut:
    """A trial was compared at a rung, and stopped for it."""

    rung: int
    t: int
    """How far it was, at or after the rung."""
    cutoff: float
    """What its value was worse than."""


@dataclass
class TrialStory:
    """One trial, as far as the record tells; or a run that repeats it with another seed."""

    name: str
    values: dict[str, Any]
    outcome: str = "waiting"
    """As `trials.Outcome`; "running" of a driver that was killed lasts until the next one begins."""
    error: str | None = None
    curve: list[Point] = field(default_factory=list)
    rung: int | None = None
    """The last one at which it was compared."""
    cut: Cut | None = None
    where: str | None = None
    """The machine that it runs on, or ran on last; None where that is not known yet."""
    resources: dict[str, float] = field(default_factory=dict)
    """What it takes of the cluster while it runs."""
    since: float | None = None
    """When it was started or resumed last; None while it does not run."""
    repeats: dict[int, TrialStory] = field(default_factory=dict)
    """By their seeds."""

    @property
    def t(self) -> int:
        """How far it was at its last evaluation, in epochs or steps."""
        return self.curve[-1].t if self.curve else 0

    def best(self, mode: str) -> Point | None:
        """Its best evaluation, the earliest of equals; None if it has none."""
        sign = -1 if mode == "max" else 1
        known = [point for point in self.curve if not math.isnan(point.value)]
        return min(known, key=lambda point: sign * point.value, default=None)

    def scores(self, mode: str) -> tuple[float, ...]:
        """What it ranks by, by the mean: its best value, and that of each repeat that has finished."""
        runs = [self, *(repeat for repeat in self.repeats.values() if repeat.outcome == "finished")]
        return tuple(best.value for run in runs if (best := run.best(mode)) is not None)

    def at(self, t: int) -> float | None:
        """What it had at its last evaluation up to `t`; None where it had none, or NaN."""
        value = next((p.value for p in reversed(self.curve) if p.t <= t), math.nan)
        return None if math.isnan(value) else value


@dataclass
class SearchStory:
    """A search, as far as the record tells."""

    experiment: Experiment
    config: SearchConfig
    metric: str
    """Its name, or what its terms add up to."""
    unit: str
    """"epoch" or "step", in which `t` and the following are counted."""
    max_t: int
    """Where a trial ends that is not cut."""
    rungs: tuple[int, ...]
    trials: dict[str, TrialStory]
    heard: float
    """When the record was written to last, seconds since 1970."""
    account: Account = field(default_factory=Account)

    def take(self, event: Event) -> None:
        """Take note of what happened next."""
        self.account.take(event)
        self.heard = max(self.heard, event["time"])
        if event["event"] == "search":
            for run in self.runs():
                if run.outcome in ("running", "killed"):
                    run.outcome, run.since = "waiting", None
        elif "trial" in event:
            run = self.trials[event["trial"]]
            if "seed" in event:
                run = run.repeats.setdefault(event["seed"], TrialStory(run_of(event), run.values))
            _follow(run, event, self.unit)

    def runs(self) -> list[TrialStory]:
        """The trials, each followed by what repeats it."""
        return [run for trial in self.trials.values() for run in (trial, *trial.repeats.values())]

    def hours(self, run: TrialStory) -> float:
        """GPU- or core-hours of a run up to the last event."""
        return self.account.spent(self.heard, run.name)

    def ranked(self) -> list[TrialStory]:
        """The trials with the best first, as `trials.ranked` has them."""
        sign = -1 if self.config.mode == "max" else 1

        def rank(item: tuple[int, TrialStory]) -> tuple[bool, float, int]:
            scores = item[1].scores(self.config.mode)
            return not scores, sign * statistics.fmean(scores) if scores else 0.0, item[0]

        return [trial for _, trial in sorted(enumerate(self.trials.values()), key=rank)]


def tell(events: Sequence[Event]) -> SearchStory:
    """Go through the events of a record, see record.py; there has to be one `search`."""
    last = next(event for event in reversed(events) if event["event"] == "search")
    experiment = loaded_of(events).experiment
    assert experiment.search is not None
    story = SearchStory(
        experiment=experiment,
        config=experiment.search,
        metric=last["metric"],
        unit="step" if last.get("unit") == "steps" else "epoch",
        max_t=int(last["max_t"]),
        rungs=rungs_of(last).rungs,
        trials={name: TrialStory(name, values) for name, values in last["trials"].items()},
        heard=events[-1]["time"],
    )
    for event in events:
        story.take(event)
    return story


def loaded_of(events: Sequence[Event]) -> LoadedExperiment:
    """The experiment of a record as its latest driver read it: the same trials follow from it."""
    last = next(event for event in reversed(events) if event["event"] == "search")
    # Records of earlier versions have but the resolved one. Trials that vary that may differ: some defaults follow
    # from other keys.
    return _load(last.get("written") or last["experiment"], last.get("variables", {}))


def resolved_of(events: Sequence[Event]) -> Experiment:
    """The experiment of a record with the defaults that its latest driver had; it may lack the search."""
    last = next(event for event in reversed(events) if event["event"] == "search")
    return _load(last["experiment"], {}).experiment


def _load(text: str, variables: Mapping[str, str]) -> LoadedExperiment:
    with tempfile.TemporaryDirectory(prefix="mimiclab-") as folder:
        file = Path(folder) / "search.yaml"
        file.write_text(text)
        return load_experiment(file, environ=variables)


def _follow(trial: TrialStory, event: Event, unit: str) -> None:
    kind = event["event"]
    if kind in ("started", "resumed"):
        trial.outcome, trial.since = "running", event["time"]
        trial.values = event.get("values") or trial.values
        trial.where = event.get("where")  # where it ran before says nothing of where it runs now
        trial.resources = event.get("resources") or trial.resources
    elif kind == "result":
        trial.curve.append(_point(event, unit))
        trial.where = event.get("where") or trial.where
    elif kind == "decision":
        trial.rung = event["rung"] or trial.rung
        if not event["go_on"] and event.get("reason", "rung") == "rung":
            trial.cut = Cut(event["rung"], trial.t, event["cutoff"])
    elif kind == "retried":
        trial.outcome, trial.since = "waiting", None
    elif kind == "ended":
        trial.outcome, trial.error, trial.since = event["outcome"], event["error"], None
    elif kind == "settled" and trial.outcome == "running":
        # The driver was stopped, and lived to say so.
        trial.outcome, trial.since = "killed", None


def _point(event: Event, unit: str) -> Point:
    return Point(event[unit], value_of(event), event["time"], event["epoch"], event.get("step"))
