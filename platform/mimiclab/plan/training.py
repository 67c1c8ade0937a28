"""An experiment as a job to plan: its steps come from its file and its data, its speed from what was measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from mimiclab.errors import UserError
from mimiclab.plan.job import Job

if TYPE_CHECKING:
    from mimiclab.data.splits import Splits
    from mimiclab.schema import Experiment

EVALUATION_SPEEDUP = 3.0
"""How many images a GPU evaluates, scoring included, in the time that it trains on one, where nobody measured it."""


def job_of(
    experiment: Experiment,
    *,
    images: int | None,
    val_images: int | None,
    images_per_s: float,
    eval_images_per_s: float | None,
    loader_images_per_s: float | None,
    store_mb_per_s: float | None,
    image_kb: float,
    checkpoint_s: float,
    restart_s: float,
    exchange_s: float,
) -> Job:
    """The job that an experiment is.

    Args:
        experiment: its epochs, batch and evaluations count.
        images: of the training set; None counts those that the experiment names.
        val_images: of the validation set; None counts them where the others are counted, else evaluations are left
            out.
        images_per_s: of one worker.
        eval_images_per_s: of one worker; None is `EVALUATION_SPEEDUP` times the former.
        loader_images_per_s: of one worker's loader processes; None where they are no limit.
        store_mb_per_s: of the store of the data, for all workers; None where it is no limit.
        image_kb: mean size of an encoded image.
        checkpoint_s: that a checkpoint holds training up.
        restart_s: from an interruption to the first step.
        exchange_s: of each step, for gradients.

    Raises:
        UserError: the images cannot be counted.
    """
    if images is None:
        splits = _read(experiment)
        images = len(splits.train.images)
        val_images = len(splits.val.images) if val_images is None else val_images
    steps = math.ceil(images * experiment.optim.epochs / experiment.optim.global_batch)
    evaluations = math.ceil(experiment.optim.epochs / experiment.eval.every_epochs)  # the last epoch ends with one
    return Job(
        num_steps=steps,
        global_batch=experiment.optim.global_batch,
        images_per_s=images_per_s,
        exchange_s=exchange_s,
        loader_images_per_s=loader_images_per_s or math.inf,
        store_images_per_s=store_mb_per_s * 1000 / image_kb if store_mb_per_s else math.inf,
        checkpoint_s=checkpoint_s,
        evaluation_s=evaluations * (val_images or 0) / (eval_images_per_s or EVALUATION_SPEEDUP * images_per_s),
        restart_s=restart_s,
    )


def _read(experiment: Experiment) -> Splits:
    from mimiclab.data.splits import locate, read_splits

    train = experiment.data.train
    if train is not None and train.annotations is not None and not Path(train.annotations).is_file():
        raise UserError(
            f"data.train.annotations: {train.annotations} is not here to be counted; expected --images N, the number "
            "of training images"
        )
    return read_splits(locate(experiment.data))
