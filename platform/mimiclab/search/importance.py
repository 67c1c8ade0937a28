"""Which keys of a search mattered: how much worse a random forest predicts the metric with a key's values shuffled.

L. Breiman, "Random Forests" (Machine Learning 45, 2001): trees on bootstrap samples of the trials, and the permutation
importance of their features; both as scikit-learn has them. With tens of trials this is a hint, not a finding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mimiclab.search.space import Distribution, kind_of
from mimiclab.search.story import SearchStory, TrialStory

MIN_TRIALS = 8
"""With fewer different ones a forest tells nothing."""
TREES, SHUFFLES, SEED = 200, 20, 0


@dataclass(frozen=True)
class Importance:
    """What the keys explain of a metric."""

    keys: tuple[str, ...]
    mean: tuple[float, ...]
    """Of each key: by how much R^2 over all trials falls when the key's values are shuffled, mean of all shuffles."""
    sd: tuple[float, ...]
    """Standard deviation over the shuffles."""
    r2: float
    """Out-of-bag, each trial predicted by the trees that did not see it; 1 is all, 0 no better than the mean."""
    t: int
    """At which epoch, or step, all trials are compared."""
    trials: int


@dataclass(frozen=True)
class Unknown:
    """Why there is no importance to tell of."""

    reason: str


def importance(story: SearchStory) -> Importance | Unknown:
    """Fit the forest to the trials of a search.

    All trials are compared after the same training: as long as every trial had that ran to its end or was cut. A
    trial's last value would mostly tell how long it was allowed to run. Others, as those that failed, are left out.
    """
    over = [t for t in story.trials.values() if t.outcome == "finished" or t.cut is not None]
    t = min((trial.t for trial in over), default=0)
    compared = [(trial, value) for trial in over if (value := trial.at(t)) is not None]
    different = {json.dumps(trial.values, sort_keys=True) for trial, _ in compared}
    if len(different) < MIN_TRIALS:
        return Unknown(
            f"it takes {MIN_TRIALS} different trials that ran to their end or were cut; there are {len(different)}"
        )
    y = np.array([value for _, value in compared])
    if np.ptp(y) == 0:
        return Unknown(f"all {len(y)} trials had the same value at {story.unit} {t}")
    keys = [key for key in story.config.space if len({json.dumps(t.values.get(key)) for t, _ in compared}) > 1]
    x = np.array([[_number(trial, key, story.config.space[key]) for key in keys] for trial, _ in compared])
    return _fit(keys, x, y, t, story.unit)


def _fit(keys: Sequence[str], x: Any, y: Any, t: int, unit: str) -> Importance | Unknown:
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    forest = RandomForestRegressor(TREES, min_samples_leaf=2, oob_score=True, random_state=SEED).fit(x, y)
    r2 = float(forest.oob_score_)
    if r2 <= 0:
        return Unknown(
            f"a random forest over the {len(y)} trials at {unit} {t} predicts trials that it has not seen no better "
            f"than their mean does (R² out of bag {r2:.2f}): chance, or keys that do not matter here"
        )
    found = permutation_importance(forest, x, y, n_repeats=SHUFFLES, random_state=SEED)
    order = np.argsort(-found.importances_mean)
    return Importance(
        keys=tuple(keys[i] for i in order),
        mean=tuple(float(found.importances_mean[i]) for i in order),
        sd=tuple(float(found.importances_std[i]) for i in order),
        r2=r2,
        t=t,
        trials=len(y),
    )


def _number(trial: TrialStory, key: str, distribution: Distribution) -> float:
    """A value as a feature: trees split it anywhere, so that the order of choices does not matter much."""
    if key not in trial.values:
        return math.nan  # the forest sends those to the better side
    kind, values = kind_of(distribution)
    return float(values.index(trial.values[key]) if kind == "choice" else trial.values[key])
