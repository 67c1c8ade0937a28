"""What a search found: the ranking, and the best trial as an experiment of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from mimiclab.experiment import resolved_yaml
from mimiclab.schema import Experiment, SearchConfig
from mimiclab.search.space import describe
from mimiclab.search.trials import Trial, last_epoch


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


def best_experiment(search: Experiment, best: Trial, num_trials: int) -> str:
    """The best trial's experiment under a name of its own, as a file that says where it comes from."""
    assert search.search is not None
    reached = best.best(search.search.mode)
    assert reached is not None
    epoch, value = reached
    values = "".join(f"#   {key}: {show(value)}\n" for key, value in best.values.items())
    return (
        f"# The best of {num_trials} trials of the search {search.name}: {best.name} ({best.outcome}), "
        f"{search.search.metric} {value:.4f} at epoch {epoch}.\n"
        f"# What the search chose:\n{values}"
        + resolved_yaml(best.experiment.model_copy(update={"name": f"{search.name}-best"}))
    )


def note(search: Experiment, num_trials: int, ranking: Sequence[Trial] = ()) -> str:
    """What MLflow shows on the page of a search, in Markdown: its space and, at the end, its ranking."""
    config = search.search
    assert config is not None
    lines = [
        f"ASHA search of {num_trials} trials ({config.algorithm}) for the {config.mode} of `{config.metric}`, "
        f"{config.grace_period} to {last_epoch(search)} epochs each, over",
        *(f"- `{key}`: {describe(distribution)}" for key, distribution in config.space.items()),
    ]
    if ranking:
        columns = ["trial", "outcome", *_numbers(config)]
        lines += ["", _row(columns), _row("---" for _ in columns)]
        lines += [_row([trial.name, trial.outcome, *_cells(trial, config)]) for trial in ranking]
    return "\n".join(lines)


def show(value: Any) -> str:
    """A searched value as an experiment file has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _numbers(config: SearchConfig) -> list[str]:
    return [config.metric, "epochs", *_short_keys(list(config.space))]


def _cells(trial: Trial, config: SearchConfig) -> list[str]:
    best = trial.best(config.mode)
    value = f"{best[1]:.4f}" if best else "-"
    searched = [show(trial.values[key]) if key in trial.values else "-" for key in config.space]
    return [value, str(trial.epochs), *searched]


def _short_keys(keys: Sequence[str]) -> list[str]:
    """The last part of each dotted key, or all of it where several end alike."""
    last = [key.rpartition(".")[2] for key in keys]
    return [short if last.count(short) == 1 else key for short, key in zip(last, keys, strict=True)]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
