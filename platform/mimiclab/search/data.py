"""The data of a search's trials, which most of them share: read once in a process."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from mimiclab.schema import DataConfig, Experiment

if TYPE_CHECKING:
    from mimiclab.data.order import Order
    from mimiclab.data.splits import Splits

# How images are shown changes nothing of what is read; of others, a grid over two data sets comes back to each.
_READ = {"train", "val", "scenes", "cache", "cache_gb"}
_KEPT = 2


def splits_of(experiment: Experiment) -> Splits:
    """What an experiment is trained and evaluated on; scenes are made where they are missing.

    Raises:
        UserError: it is not there, or damaged.
    """
    return _read(experiment.data.model_dump_json(include=_READ))


def order_of(experiment: Experiment) -> Order:
    """The order in which an experiment shows its data.

    Raises:
        UserError: the data is not there, or damaged.
    """
    from mimiclab.data.order import training_order

    return training_order(splits_of(experiment).train, experiment)


@lru_cache(maxsize=_KEPT)
def _read(data: str) -> Splits:
    from mimiclab.data.splits import locate, read_splits

    return read_splits(locate(DataConfig.model_validate_json(data)))
