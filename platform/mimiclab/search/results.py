"""What a search found: the ranking, and the best trial as an experiment of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from mimiclab.schema import Experiment, SearchConfig
from mimiclab.search.budget import unit
from mimiclab.search.metric import name_of
from mimiclab.search.space import describe
from mimiclab.search.trials import Plan, Trial
from mimiclab.seeds import CONFIDENCE, Statistic


def ranking_table(ranking: Sequence[Trial], config: SearchConfig, title: str) -> Table:
    """The trials of a search with their values, the best first."""
    # Many columns: no lines between them, and what does not fit is folded.
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("trial")
    table.add_column("outcome")
    for column in _numbers(config):
        table.add_column(column, justify="right", overflow="fold")
    for trial in ranking:
        table.add_row(trial.name, trial.outcome, *_cells(trial, config))
    return table


def best_experiment(plan: Plan, best: Trial, num_trials: int) -> str:
    """The best trial's experiment under a name of its own, as a file that says where it comes from."""
    reached = best.best(plan.config.mode)
    assert reached is not None
    epoch, value = reached
    search, name, scores = plan.experiment, name_of(plan.config.metric), best.scores(plan.config.mode)
    mean = f" (mean of {len(scores)} seeds: {_mean(scores)})" if len(scores) > 1 else ""
    values = "".join(f"#   {key}: {show(value)}\n" for key, value in best.values.items())
    return (
        f"# The best of {num_trials} trials of the search {search.name}: {best.name} ({best.outcome}), "
        f"{name} {value:.4f} at epoch {epoch}{mean}.\n"
        f"# What the search chose:\n{values}" + plan.file_of(best, f"{search.name}-best")
    )


def note(search: Experiment, num_trials: int, ranking: Sequence[Trial] = (), spent: float | None = None) -> str:
    """What MLflow shows on the page of a search, in Markdown: its space and, at the end, its ranking.

    Args:
        search: the experiment.
        num_trials: how many trials there are.
        ranking: the trials, the best first.
        spent: GPU- or core-hours so far.
    """
    config = search.search
    assert config is not None
    lines = [
        f"ASHA search of {num_trials} trials ({config.algorithm}) for the {config.mode} of `{name_of(config.metric)}`, "
        f"{_length(search, config)} each, over",
        *(f"- `{key}`: {describe(distribution)}" for key, distribution in config.space.items()),
    ]
    if config.seeds_per_trial > 1:
        lines += [
            "",
            f"Trials that are not pruned have {config.seeds_per_trial} seeds, and rank by their mean.",
        ]
    if spent is not None:
        lines += ["", f"{spent_text(search, spent)}."]
    elif config.budget is not None:
        lines += ["", f"Budget: {config.budget:g} {unit(gpu=search.scale.gpu)}."]
    if ranking:
        columns = ["trial", "outcome", *_numbers(config)]
        lines += ["", _row(columns), _row("---" for _ in columns)]
        lines += [_row([trial.name, trial.outcome, *_cells(trial, config)]) for trial in ranking]
    return "\n".join(lines)


def spent_text(search: Experiment, spent: float) -> str:
    """What a search has spent, and whether that was all that it had."""
    assert search.search is not None
    budget, what = search.search.budget, unit(gpu=search.scale.gpu)
    if budget is None:
        return f"{spent:.3g} {what} were spent"
    ended = ", which ended the search" if spent >= budget else ""
    return f"{spent:.3g} of {budget:g} {what} were spent{ended}"


def show(value: Any) -> str:
    """A searched value as an experiment file has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _numbers(config: SearchConfig) -> list[str]:
    interval = [f"± {100 * CONFIDENCE:.0f} %"] if config.seeds_per_trial > 1 else []
    return [name_of(config.metric), *interval, "epochs", *_short_keys(list(config.space))]


def _cells(trial: Trial, config: SearchConfig) -> list[str]:
    scores = Statistic(name_of(config.metric), trial.scores(config.mode))
    numbers = [f"{scores.mean:.4f}" if scores.values else "-"]
    if config.seeds_per_trial > 1:
        numbers.append(f"{scores.half_width:.4f} ({len(scores.values)})" if len(scores.values) > 1 else "-")
    searched = [show(trial.values[key]) if key in trial.values else "-" for key in config.space]
    return [*numbers, str(trial.epochs), *searched]


def _mean(scores: Sequence[float]) -> str:
    found = Statistic("", tuple(scores))
    return f"{found.mean:.4f} ± {found.half_width:.4f}"


def _length(search: Experiment, config: SearchConfig) -> str:
    if config.unit == "epochs":
        return f"{config.grace_period} to {config.max_t or search.optim.epochs} epochs"
    most = f"{config.max_t} steps" if config.max_t else f"{search.optim.epochs} epochs"
    return f"{config.grace_period} steps to {most}"


def _short_keys(keys: Sequence[str]) -> list[str]:
    """The last part of each dotted key, or all of it where several end alike."""
    last = [key.rpartition(".")[2] for key in keys]
    return [short if last.count(short) == 1 else key for short, key in zip(last, keys, strict=True)]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
