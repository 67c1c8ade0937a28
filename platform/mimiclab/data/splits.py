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


def locate(data: DataConfig) -> DataConfig:
    """The same data as train and val with absolute paths; scenes are generated where they are missing."""
    train, val = data.train, data.val
    if data.scenes is not None:
        scenes = data.scenes
        paths = generate_scenes(
            Path(scenes.root).absolute(),
            seed=scenes.seed,
            num_train=scenes.train,
            num_val=scenes.val,
            size=scenes.size,
        )
        train = Split(annotations=str(paths.train_annotations), images=str(paths.train_images))
        val = Split(annotations=str(paths.val_annotations), images=str(paths.val_images))
    assert train is not None
    assert val is not None
    return data.model_copy(update={"scenes": None, "train": _absolute(train), "val": _absolute(val)})


def read_splits(data: DataConfig) -> Splits:
    """Read and check both sets of located data.

    Raises:
        UserError: one of them cannot be read or has no object, or their classes differ.
    """
    assert data.train is not None
    assert data.val is not None
    train, val = (read_coco(Path(split.annotations), Path(split.images)) for split in (data.train, data.val))
    for key, split in (("train", train), ("val", val)):
        if all(record.iscrowd.all() for record in split.images):
            num_left_out = f", {len(split.left_out)} annotations left out" if split.left_out else ""
            raise UserError(
                f"data.{key}.annotations: {split.annotations} has no object in its {len(split.images)} images"
                f"{num_left_out}; expected at least one that is no crowd"
            )
    if train.classes != val.classes:
        raise UserError(
            f"data.val.annotations: {val.annotations} has the classes {list(val.classes)}, "
            f"expected those of {train.annotations}: {list(train.classes)}"
        )
    return Splits(train, val)


def _absolute(split: Split) -> Split:
    return Split(annotations=str(Path(split.annotations).absolute()), images=str(Path(split.images).absolute()))
