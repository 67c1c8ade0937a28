"""What a search cost, and what it would have cost to train all of its trials to the end."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mimiclab.search.budget import unit, units
from mimiclab.search.story import SearchStory, TrialStory

_HOUR_S = 3600.0


@dataclass(frozen=True)
class Cost:
    """Two numbers of one kind."""

    unit: str
    """In words."""
    spent: float
    full: float
    """Had every trial been trained to the end."""

    @property
    def share(self) -> float:
        """What was spent of the full cost."""
        return self.spent / self.full if self.full else 1.0


def begun(story: SearchStory) -> list[TrialStory]:
    """The trials that a cost is of: those that were started."""
    return [trial for trial in story.trials.values() if trial.outcome != "waiting" or story.hours(trial)]


def costs(story: SearchStory) -> list[Cost]:
    """Add up what the trials took that were begun: epochs, steps and hours, as far as they are known.

    Epochs and steps count up to each trial's last evaluation. A trial that an error ended would have come no further:
    it saves nothing. What others lack is taken to go on as it went: their steps per epoch, and the median time between
    their evaluations, or that of all trials where there are fewer than two. Runs that repeat a trial with other seeds
    are in neither number, nor are trials that were never begun.
    """
    trials = begun(story)
    missing = {trial.name: 0 if _is_over(trial) else max(0, story.max_t - trial.t) for trial in trials}
    spent = sum(trial.t for trial in trials)
    found = [Cost(f"{story.unit}s", spent, spent + sum(missing.values()))]
    steps = _steps(trials, missing) if story.unit == "epoch" else None
    return [*found, *(cost for cost in (steps, _hours(story, trials, missing)) if cost is not None)]


def _is_over(trial: TrialStory) -> bool:
    """Whether more training could not have been had: it is finished, or was ended by an error."""
    return trial.outcome in ("finished", "failed") or (trial.outcome == "pruned" and trial.cut is None)


def _steps(trials: Sequence[TrialStory], missing: Mapping[str, int]) -> Cost | None:
    per_epoch = {t.name: (t.curve[-1].step or 0) / t.curve[-1].epoch for t in trials if t.curve}
    if not all(per_epoch.values()) or not per_epoch:
        return None
    spent = sum(trial.curve[-1].step or 0 for trial in trials if trial.curve)
    usual = statistics.median(per_epoch.values())
    return Cost("steps", spent, spent + round(sum(per_epoch.get(name, usual) * num for name, num in missing.items())))


def _hours(story: SearchStory, trials: Sequence[TrialStory], missing: Mapping[str, int]) -> Cost | None:
    paces = {trial.name: pace for trial in trials if (pace := _pace(trial)) is not None}
    if not paces and any(missing.values()):
        return None
    usual = statistics.median(paces.values()) if paces else 0.0
    spent = sum(story.hours(trial) for trial in trials)
    more = sum(missing[t.name] * paces.get(t.name, usual) * units(t.resources) for t in trials) / _HOUR_S
    return Cost(unit(gpu=story.experiment.scale.gpu), spent, spent + more)


def _pace(trial: TrialStory) -> float | None:
    """Seconds of an epoch or step; the median is not moved by a restart between two evaluations."""
    between = [(after.time - before.time) / (after.t - before.t) for before, after in pairwise(trial.curve)]
    return statistics.median(between) if between else None
