"""Values that follow from what other values came to: Optuna's tree-structured Parzen estimator (TPE).

J. Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011. Nothing of Optuna is kept: for every
proposal a study is made of what the search knows, so that the same values follow from the same record.
"""

from __future__ import annotations

import functools
import hashlib
import json
import statistics
import warnings
from collections.abc import Callable, Iterable
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from mimiclab.errors import UserError
from mimiclab.schema import SearchConfig
from mimiclab.search.space import MAX_SDS, Distribution, kind_of, rounded, within_conditions
from mimiclab.search.trials import Trial

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

MAX_DRAWS = 50
"""Proposals for one trial whose values do not fit together, after which the space is taken to be at fault."""

# Quantiles of the outermost normal values.
_LOW, _HIGH = (NormalDist().cdf(sds) for sds in (-MAX_SDS, MAX_SDS))


def check_optuna() -> None:
    """Make sure that Optuna is there.

    Raises:
        UserError: it is not.
    """
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UserError(
            "search.algorithm: optuna needs a package that is not installed; expected mimiclab[optuna], or another "
            "algorithm"
        ) from None


def propose(
    config: SearchConfig, seed: int, number: int, known: Iterable[Trial], fits: Callable[[dict[str, Any]], None]
) -> None:
    """Propose values for a trial until some fit together.

    Args:
        config: the search.
        seed: of the search.
        number: of the trial; with the seed it decides what is random.
        known: trials with values, running ones too: nothing near those is proposed meanwhile.
        fits: takes the values, or raises a UserError where they do not fit together.

    Raises:
        UserError: none of `MAX_DRAWS` proposals fit.
    """
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    random = int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # Keys apart from each other: where there are conditions, few trials have the same ones.
        sampler = optuna.samplers.TPESampler(seed=random, multivariate=False, constant_liar=True)
    study = optuna.create_study(direction="maximize" if config.mode == "max" else "minimize", sampler=sampler)
    study.add_trials([_told(trial, config) for trial in known])
    for _ in range(MAX_DRAWS):
        asked = study.ask()

        values = within_conditions(config.space, functools.partial(_suggest, asked))
        try:
            fits(values)
            return
        except UserError as error:
            refused = error
            study.tell(asked, state=TrialState.FAIL)
    shown = ", ".join(f"{key} = {value}" for key, value in values.items())
    raise UserError(
        f"search.space: {MAX_DRAWS} proposals in a row do not fit together, the last one {shown}: {refused}; expected "
        "a space in which most values do, or conditions (when)"
    ) from refused


def _told(trial: Trial, config: SearchConfig) -> FrozenTrial:
    """What the study hears of a trial."""
    from optuna.trial import TrialState, create_trial

    scores = trial.scores(config.mode)
    if trial.outcome in ("waiting", "running"):
        state = TrialState.RUNNING
    elif trial.outcome in ("pruned", "out of budget"):
        state = TrialState.PRUNED
    else:
        state = TrialState.COMPLETE if trial.outcome == "finished" and scores else TrialState.FAIL
    space = {key: config.space[key] for key in trial.values}
    return create_trial(
        state=state,
        value=statistics.fmean(scores) if state == TrialState.COMPLETE else None,
        params={key: _from_value(distribution, trial.values[key]) for key, distribution in space.items()},
        distributions={key: _distribution(distribution) for key, distribution in space.items()},
        intermediate_values=dict(trial.evaluations),
    )


def _distribution(distribution: Distribution) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    kind, values = kind_of(distribution)
    if kind == "choice":  # by place: a list is no category of Optuna's, and 1 is True
        return CategoricalDistribution(range(len(values)))
    if kind == "int":
        return IntDistribution(*values)
    if kind == "normal":  # by its quantile
        return FloatDistribution(0.0, 1.0)
    low, high = map(float, values)
    return FloatDistribution(low, high, log=kind == "loguniform")


def _suggest(asked: optuna.Trial, key: str, distribution: Distribution) -> Any:
    kind, values = kind_of(distribution)
    if kind == "choice":
        return values[asked.suggest_categorical(key, range(len(values)))]
    if kind == "int":
        return asked.suggest_int(key, *values)
    if kind == "normal":
        quantile = _LOW + asked.suggest_float(key, 0.0, 1.0) * (_HIGH - _LOW)
        return rounded(distribution, NormalDist(*map(float, values)).inv_cdf(quantile))
    return rounded(distribution, asked.suggest_float(key, *map(float, values), log=kind == "loguniform"))


def _from_value(distribution: Distribution, value: Any) -> Any:
    kind, values = kind_of(distribution)
    if kind == "choice":
        written = [json.dumps(each) for each in values]
        return written.index(json.dumps(value))
    if kind == "normal":
        quantile = (NormalDist(*map(float, values)).cdf(value) - _LOW) / (_HIGH - _LOW)
        return min(max(quantile, 0.0), 1.0)
    return value
