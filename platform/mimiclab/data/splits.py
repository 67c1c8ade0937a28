"""The two data sets that an experiment names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mimiclab.data.coco import CocoDataset, read_coco
from mimiclab.data.scenes import generate_scenes
from mimiclab.errors import UserError
from mimiclab.schema import DataConfig, Split


@dataclass(frozen=True)
class Splits:
    """Training and validation set, with the same classes."""

    train: CocoDataset
    val: CocoDataset


def locate(data: DataConfig) -> tuple[Split, Split]:
    """Where training and validation set lie, absolute; scenes are generated where they are missing."""
    if data.scenes is not None:
        scenes = data.scenes
        paths = generate_scenes(
            Path(scenes.root).absolute(),
            seed=scenes.seed,
            num_train=scenes.train,
            num_val=scenes.val,
            size=scenes.size,
        )
        return (
            Split(annotations=str(paths.train_annotations), images=str(paths.train_images)),
            Split(annotations=str(paths.val_annotations), images=str(paths.val_images)),
        )
    assert data.train is not None
    assert data.val is not None
    return _absolute(data.train), _absolute(data.val)


def read_splits(train: Split, val: Split) -> Splits:
    """Read and check both sets.

    Raises:
        UserError: one of them cannot be read, or their classes differ.
    """
    splits = Splits(*(read_coco(Path(split.annotations), Path(split.images)) for split in (train, val)))
    if splits.train.classes != splits.val.classes:
        raise UserError(
            f"data.val.annotations: {val.annotations} has the classes {list(splits.val.classes)}, "
            f"expected those of {train.annotations}: {list(splits.train.classes)}"
        )
    return splits


def _absolute(split: Split) -> Split:
    return Split(annotations=str(Path(split.annotations).absolute()), images=str(Path(split.images).absolute()))
