"""One experiment over several seeds: how much of a result is chance.

The runs `<name>-seed-<k>` are ordinary ones, each with its folder and its own history; what they have in common is
in MLflow's parent run `<name>`, and in no file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from mimiclab import runs
from mimiclab.errors import UserError
from mimiclab.experiment import LoadedExperiment, flatten, identity, resolved_yaml, vary
from mimiclab.reaper import reap_beside
from mimiclab.schema import Experiment
from mimiclab.session import ray_session
from mimiclab.tracking import parents
from mimiclab.tracking import runs as tracking
from mimiclab.train import check, complete, num_steps, train

if TYPE_CHECKING:
    from mimiclab.data.splits import Splits

MAX_SEEDS = 100
"""More is a mistake in typing rather than an experiment."""

CONFIDENCE = 0.95

_SHOWN = ("AP", "AP50", "AP75")


@dataclass(frozen=True)
class Statistic:
    """A metric over the seeds."""

    metric: str
    values: tuple[float, ...]
    """Of each seed, in their order."""

    @property
    def mean(self) -> float:
        """Mean of the values."""
        return statistics.fmean(self.values)

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval of the mean, by Student's t with n - 1 degrees of freedom; NaN of one value."""
        from scipy.special import stdtrit

        n = len(self.values)
        if n == 1:
            return math.nan
        return float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * statistics.stdev(self.values) / math.sqrt(n)


def train_seeds(
    loaded: LoadedExperiment,
    num: int,
    *,
    console: Console,
    address: str | None = None,
    fresh: bool = False,
    verbose: bool = False,
) -> list[Statistic]:
    """Train an experiment with `num` seeds, one after the other, and print the mean of each metric.

    Runs that were begun before go on, those that are complete are left as they are.

    Args:
        loaded: what to train, of the first seed.
        num: how many seeds, 1 to `MAX_SEEDS`.
        console: gets what a person wants to know.
        address: of a Ray cluster; see `ray_session`.
        fresh: remove all earlier runs of these names first.
        verbose: let Ray talk.

    Returns:
        The metrics of each run's last evaluation.

    Raises:
        UserError: anything that the user can mend, found before a worker starts wherever possible.
        KeyboardInterrupt: the run at work is recorded as killed; the same command goes on from its last checkpoint.
    """
    from mimiclab.tracking.ui import place_of

    experiment, experiments = loaded.experiment, plan(loaded, num)
    for each in experiments:
        runs.check(each, fresh=fresh)
    # The seed changes nothing of what is looked at.
    splits = check(experiment, console, fresh=fresh)
    if not fresh:
        _refuse_longer(experiments, splits)

    uri, project = tracking.absolute_uri(experiment.where.tracking), experiment.where.project
    work = fresh or any(complete(each, splits) is None for each in experiments)
    parent, found = None, list[Statistic]()
    status: parents.Status = "FAILED"
    try:
        with ray_session(address, experiment.scale, verbose=verbose) if work else contextlib.nullcontext():
            if fresh:
                _remove(experiment, experiments, uri)
            reap_beside(experiment, console)
            parent = parents.open_parent(
                uri,
                project,
                "seeds",
                experiment.name,
                _identity(experiment),
                # What is said of the seeds may change, a parameter may not.
                params={key: str(value) for key, value in flatten(experiment).items() if key != "seed"},
                note=f"{_seeds(experiments)}: `mean/` and `interval/` (95 %, ±) are those of the last evaluations.",
            )
            tracking.log_text(uri, parent, resolved_yaml(experiment))
            for number, each in enumerate(experiments, start=1):
                console.print(f"{each.name}, {number} of {num}", highlight=False)
                tags = {parents.PARENT_TAG: parent}
                train(each, console=console, address=address, verbose=verbose, tags=tags, splits=splits)
        found = summarize([_last_metrics(each) for each in experiments])
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if parent is not None:
            means = {f"mean/{each.metric}": each.mean for each in found}
            intervals = {f"interval/{each.metric}": each.half_width for each in found}
            parents.end_parent(uri, parent, status, {**means, **intervals})
    console.print(seeds_table(found, f"{experiment.name}, last evaluation of each run", _seeds(experiments)))
    console.print(f"MLflow:   {place_of(uri, parent)}", highlight=False)
    return found


def plan(loaded: LoadedExperiment, num: int) -> list[Experiment]:
    """Give the experiments of the seeds `seed`, `seed` + 1, ..., each named `<name>-seed-<k>`.

    Raises:
        UserError: there are too few or too many, or a name or seed is not one that an experiment may have.
    """
    if not 1 <= num <= MAX_SEEDS:
        raise UserError(f"--seeds: found {num}, expected 1 to {MAX_SEEDS}")
    first = loaded.experiment.seed
    experiments = []
    for seed in range(first, first + num):
        try:
            experiments.append(vary(loaded, f"{loaded.experiment.name}-seed-{seed}", {"seed": seed}))
        except UserError as error:
            raise UserError(f"{loaded.path}: --seeds {num}, seed {seed}: {error}") from error
    return experiments


def summarize(evaluations: Sequence[Mapping[str, float]]) -> list[Statistic]:
    """Gather AP, AP50 and AP75 of each head, and `gap/AP` where there is a teacher, from an evaluation per seed."""
    names = evaluations[0]
    heads = [head for head, slash, metric in (name.partition("/") for name in names) if metric == "AP"]
    shown = [f"{head}/{metric}" for head in heads if head != "gap" for metric in _SHOWN] + ["gap/AP"]
    return [Statistic(name, tuple(each[name] for each in evaluations)) for name in shown if name in names]


def seeds_table(found: Sequence[Statistic], title: str, seeds: str) -> Table:
    """A row per metric: its mean, half of its 95 % interval, and the value of each seed."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("mean", justify="right")
    table.add_column(f"± {100 * CONFIDENCE:.0f} %", justify="right")
    table.add_column(seeds)  # one column: of many seeds, the values take several lines
    for each in found:
        form = "+.3f" if each.metric.startswith("gap/") else ".3f"
        interval = "-" if math.isnan(each.half_width) else f"{each.half_width:.3f}"
        table.add_row(each.metric, f"{each.mean:{form}}", interval, " ".join(f"{v:{form}}" for v in each.values))
    return table


def _seeds(experiments: Sequence[Experiment]) -> str:
    first, last = experiments[0].seed, experiments[-1].seed
    return f"seed {first}" if first == last else f"seeds {first} to {last}"


def _identity(experiment: Experiment) -> str:
    """Hash what the seeds have in common: 12 hex digits, other than those of a run of this name."""
    text = json.dumps(["seeds", identity(experiment.model_copy(update={"seed": 0}))])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _newest(experiment: Experiment) -> dict[str, Any] | None:
    """What the newest sound checkpoint of a run says, None where there is none."""
    from mimiclab import checkpoint

    newest = checkpoint.latest(runs.storage_of(experiment) / runs.CHECKPOINTS, warn=lambda _: None, deep=False)
    return None if newest is None else newest.meta


def _last_metrics(experiment: Experiment) -> dict[str, float]:
    newest = _newest(experiment)
    assert newest is not None  # a complete run's
    metrics: dict[str, float] = newest["metrics"]
    return metrics


def _refuse_longer(experiments: Sequence[Experiment], splits: Splits) -> None:
    """A run of more epochs counts as complete; beside shorter ones it would not be one more draw of the same."""
    for each in experiments:
        newest, expected = _newest(each), num_steps(each, splits)
        if newest is not None and newest["step"] > expected:
            raise UserError(
                f"run {runs.storage_of(each).name}: it was trained to step {newest['step']} already, expected at most "
                f"{expected} (optim.epochs: {each.optim.epochs}), since all seeds are to train for as long; "
                "give more epochs, another name, or start all anew with --fresh"
            )


def _remove(experiment: Experiment, experiments: Sequence[Experiment], uri: str) -> None:
    """Remove all earlier runs at once, so that after a stop none of them is taken for a new one."""
    project = experiment.where.project
    tracking.forget_run(uri, project, experiment.name, _identity(experiment))
    for each in experiments:
        runs.prepare(each, fresh=True)
        tracking.forget_run(uri, project, each.name, identity(each))
