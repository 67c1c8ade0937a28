"""The course of a search: its trials and rungs as the record has them, and every event that moves them on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from mimiclab.experiment import resolved_yaml
from mimiclab.schema import Experiment
from mimiclab.search.record import RULES, Event, Record, decision_event, recompute, rungs_of, value_of
from mimiclab.search.results import show
from mimiclab.search.trials import Trial, last_epoch


class Course:
    """Where a search stands. What happens is written to the record before it takes effect.

    Args:
        experiment: the search.
        trials: all of them; they are brought to where the record says they are, and changed in place from there.
        record: of the search, empty where it is new.
        say: gets a line for each event.
        allowed: called before anything is written; what it raises ends the search.
    """

    def __init__(
        self,
        experiment: Experiment,
        trials: Sequence[Trial],
        record: Record,
        say: Callable[[str], None],
        allowed: Callable[[], None] = lambda: None,
    ) -> None:
        self._record = record
        self._say = say
        self._allowed = allowed
        self._trials = {trial.name: trial for trial in trials}
        begin = plan_event(experiment, trials)
        self._metric, self._max_t = str(begin["metric"]), int(begin["max_t"])
        self._asha = rungs_of(begin)
        self._stopped: set[str] = set()
        for event in record.events:
            if "trial" in event:
                self._replay(self._trials[event["trial"]], event)
        if any(trial.outcome in ("waiting", "running") for trial in trials):
            # Half of the last write may be missing: a result without its decision.
            torn = bool(record.events) and record.events[-1]["event"] == "result"
            self._write(*([*recompute(record.events)][-1:] if torn else []), begin)
        self._take_up()

    @property
    def left(self) -> list[Trial]:
        """The trials that are still to be run, or to be run on."""
        return [trial for trial in self._trials.values() if trial.outcome == "waiting"]

    def begin(self, trial: Trial) -> None:
        """A trial starts, or goes on where an earlier driver left it."""
        event = {"event": "resumed" if trial.begun else "started", "trial": trial.name}
        self._write(event)
        self._replay(trial, event)
        after = f" after epoch {trial.epochs}" if trial.epochs else ""
        values = ", ".join(f"{key} {show(value)}" for key, value in trial.values.items())
        self._say(f"{trial.name}  {event['event']}{after}: {values}")

    def result(self, trial: Trial, epoch: int, value: float) -> bool:
        """Whether a trial goes on after an evaluation.

        An epoch that is known already changes nothing: a trial that is resumed tells its last one again.
        """
        if epoch <= trial.epochs:
            return trial.name not in self._stopped
        decision = self._asha.decide(trial.name, epoch, value)
        # In one write: a result never stands there without what follows from it.
        self._write(
            {"event": "result", "trial": trial.name, "epoch": epoch, "value": value},
            decision_event(trial.name, epoch, decision),
        )
        self._note(trial, epoch, value, decision.go_on)
        self._say(f"{trial.name}  epoch {epoch}/{self._max_t}, {self._metric} {value:.4f}")
        return decision.go_on

    def complete(self, trial: Trial) -> None:
        """A trial was stopped, or ended by itself."""
        if trial.name in self._stopped:
            self.end(trial, "pruned")
        else:
            self.end(trial, "finished")

    def end(self, trial: Trial, outcome: Literal["finished", "pruned", "failed"], error: str | None = None) -> None:
        """A trial is over for good."""
        event = {"event": "ended", "trial": trial.name, "outcome": outcome, "error": error}
        self._write(event)
        self._replay(trial, event)
        after = f" after epoch {trial.epochs}" if outcome == "pruned" and trial.epochs else ""
        self._say(f"{trial.name}  {outcome}{after}" + (f": {error}" if error else ""))

    def settle(self, trial: Trial) -> None:
        """MLflow knows how a trial stands, and its values."""
        event = {"event": "settled", "trial": trial.name}
        self._write(event)
        self._replay(trial, event)

    def _write(self, *events: Event) -> None:
        self._allowed()
        self._record.add(*events)

    def _replay(self, trial: Trial, event: Event) -> None:
        kind = event["event"]
        if kind in ("started", "resumed"):
            trial.begun, trial.settled, trial.outcome = True, False, "running"
        elif kind == "result":
            value = value_of(event)
            decision = self._asha.decide(trial.name, event["epoch"], value)
            self._note(trial, event["epoch"], value, decision.go_on)
        elif kind == "ended":
            trial.outcome, trial.error, trial.settled = event["outcome"], event["error"], False
        elif kind == "settled":
            trial.settled = trial.in_mlflow = True

    def _note(self, trial: Trial, epoch: int, value: float, go_on: bool) -> None:
        trial.evaluations.append((epoch, value))
        if not go_on:
            self._stopped.add(trial.name)

    def _take_up(self) -> None:
        """What an earlier driver was killed in: decisions that it had made hold, the rest is to be run on."""
        for trial in self._trials.values():
            if trial.outcome != "running":
                continue
            if trial.name in self._stopped:
                self.end(trial, "pruned")
            else:
                trial.outcome = "waiting"


def plan_event(experiment: Experiment, trials: Sequence[Trial]) -> Event:
    """A search and its trials as the event that begins a driver's part of the record."""
    config = experiment.search
    assert config is not None
    rules: dict[str, Any] = {**config.model_dump(include=set(RULES)), "max_t": last_epoch(experiment)}
    return {
        "event": "search",
        "experiment": resolved_yaml(experiment),
        "metric": config.metric,
        **{name: rules[name] for name in RULES},
        "trials": {trial.name: trial.values for trial in trials},
    }
