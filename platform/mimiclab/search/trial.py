"""One trial, in the process that Ray Tune gives it: an ordinary training run whose evaluations go to the search."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from rich.console import Console

from mimiclab import runs
from mimiclab.schema import Experiment
from mimiclab.tracking.searches import PARENT_TAG
from mimiclab.train import check, train

if TYPE_CHECKING:
    from mimiclab.data.splits import Splits


def run_trial(config: Mapping[str, int], *, experiments: Sequence[str], parent: str, folder: str) -> None:
    """Train one trial; Tune runs this in a process of its own, and kills it there when the trial is pruned."""
    os.chdir(folder)  # relative paths mean what they mean where the search was started
    experiment = Experiment.model_validate_json(experiments[config["number"]])
    console = Console(quiet=True)
    splits = check(experiment, console)
    if result := _last_result(experiment, splits):
        tune.report(result)
    train(
        experiment,
        console=console,
        tags={PARENT_TAG: parent},
        callbacks=[TuneReportCallback()],
        splits=splits,
    )


def _last_result(experiment: Experiment, splits: Splits) -> dict[str, Any] | None:
    """The last evaluation of a trial that is resumed: workers do not make it again, the search may not know of it."""
    from mimiclab import checkpoint
    from mimiclab.data.order import training_order

    newest = checkpoint.latest(runs.storage_of(experiment) / runs.CHECKPOINTS, warn=lambda _: None, deep=False)
    if newest is None:
        return None
    order = training_order(splits.train, experiment)
    step = newest.meta.get("evaluated")
    for epoch in range(1, experiment.optim.epochs + 1):
        if order.epoch_end_step(epoch) == step:
            return {"epoch": epoch, "step": step, **newest.meta["metrics"]}
    return None
