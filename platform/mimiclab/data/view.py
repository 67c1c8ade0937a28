"""A contact sheet: training images with their boxes, as they are stored and as a training step sees them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from mimiclab.data.coco import CocoDataset, read_coco
from mimiclab.data.dataset import TrainBatches, read_record, training_batches
from mimiclab.data.splits import locate, read_splits
from mimiclab.errors import UserError
from mimiclab.experiment import load_experiment
from mimiclab.pictures import Panel, side_by_side
from mimiclab.schema import DataConfig, Experiment, Split

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_SIDE = 320
_GAP = 16
_TITLE_LENGTH = 36
_BACKGROUND = "#f0f0f0"


def view(
    path: str, images: Path | None, *, num: int, step: int, output: Path, overrides: Sequence[str] = ()
) -> CocoDataset:
    """Write a contact sheet of training samples: each stored image next to what training makes of it.

    Args:
        path: An experiment file (.yaml, .yml); an annotation file (.json), with the folder `images`; or a
            packed data set. All but an experiment are shown as an experiment with default values would see them.
        images: Folder of images, with an annotation file only.
        num: How many samples.
        step: The global step (from 0) whose samples come first; those of the next steps follow.
        output: Picture to write, .png, .jpg or .webp; what is there is replaced when the new one is whole.
        overrides: `dotted.key=value` of an experiment.

    Returns:
        The data set that was shown.

    Raises:
        UserError: A path or an image cannot be read, or `output` cannot be written.
    """
    suffix = output.suffix.lower()
    if suffix not in _FORMATS:
        raise UserError(f"--output {output}: found the suffix {suffix!r}, expected one of {', '.join(_FORMATS)}")
    # Path.is_dir raises for names that are too long.
    if not os.path.isdir(output.absolute().parent) or os.path.isdir(output):  # noqa: PTH112
        raise UserError(f"--output {output}: cannot be written: expected a file in a folder that exists")
    dataset, experiment = _open(path, images, overrides)
    pairs = list(_pairs(dataset, training_batches(dataset, experiment), num, step))
    aside = output.with_name(f".view-{os.getpid()}{suffix}")
    try:
        contact_sheet(pairs).save(aside, _FORMATS[suffix])
        aside.replace(output)
    except (OSError, ValueError) as error:  # of formats, ValueError is for a sheet that is too large
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise UserError(f"--output {output}: cannot be written: {reason}") from error
    finally:
        aside.unlink(missing_ok=True)
    return dataset


def _open(path: str, images: Path | None, overrides: Sequence[str]) -> tuple[CocoDataset, Experiment]:
    suffix = Path(path).suffix.lower()
    if suffix == ".json":
        if images is None:
            raise UserError(f"{path}: --images must say which folder its images are in")
        split = Split(annotations=path, images=str(images))
    elif images is not None:
        raise UserError(f"--images goes with an annotation file (.json) only, found {path}")
    else:
        split = Split(packed=path)
    if suffix in (".yaml", ".yml"):
        experiment = load_experiment(path, overrides).experiment
        return read_splits(locate(experiment.data)).train, experiment
    if overrides:
        raise UserError(f"--set goes with an experiment (.yaml) only, found {path}")
    experiment = Experiment(name="view", data=DataConfig(train=split, val=split))
    if images is not None:
        return read_coco(Path(path), images), experiment
    from mimiclab.data.shards import read_packed

    return read_packed(path), experiment


def _pairs(dataset: CocoDataset, batches: TrainBatches, num: int, step: int) -> Iterator[Image.Image]:
    """The samples of training from a step on, each with the stored image to its left."""
    global_batch = batches.order.global_batch
    for first in range(0, num, global_batch):
        batch = batches[step + first // global_batch]
        samples = zip(batches.order.slots(step + first // global_batch), batch.images, batch.targets, strict=True)
        for number, (slot, image, target) in enumerate(list(samples)[: num - first]):
            record = dataset.images[slot.index]
            before = _panel(
                read_record(record).permute(1, 2, 0).numpy(),
                record.boxes,
                record.labels,
                record.iscrowd,
                record.path.name,
                dataset.classes,
            )
            after = _panel(
                image.permute(1, 2, 0).numpy(),
                target["boxes"].numpy(),
                target["labels"].numpy(),
                target["iscrowd"].numpy(),
                f"step {step + first // global_batch}, slot {number}",
                dataset.classes,
            )
            yield _in_a_row([before, after], _GAP // 4)


def _panel(
    pixels: npt.NDArray[np.uint8],
    boxes: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    iscrowd: npt.NDArray[np.bool_],
    title: str,
    classes: Sequence[str],
) -> Image.Image:
    """One image (H, W, 3) with its boxes, fitted into a square."""
    height, width = pixels.shape[:2]
    scale = _SIDE / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    fitted = Image.new("RGB", (_SIDE, size[1]), _BACKGROUND)
    fitted.paste(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BICUBIC))
    names = [*classes, *(f"{name} (crowd)" for name in classes)]
    if len(title) > _TITLE_LENGTH:
        title = f"...{title[3 - _TITLE_LENGTH :]}"
    panel = Panel(title, boxes * np.tile(np.divide(size, (width, height)), 2), labels + len(classes) * iscrowd)
    return side_by_side(np.asarray(fitted), [panel], names)


def contact_sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures in rows, about as many in a row as the sheet gets square by."""
    width = max(picture.width for picture in pictures)
    height = max(picture.height for picture in pictures)
    columns = max(1, round(math.sqrt(len(pictures) * height / width)))
    rows = [_in_a_row(pictures[first : first + columns], _GAP) for first in range(0, len(pictures), columns)]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height + _GAP for row in rows) - _GAP), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + _GAP
    return sheet


def _in_a_row(pictures: Sequence[Image.Image], gap: int) -> Image.Image:
    size = (sum(picture.width + gap for picture in pictures) - gap, max(picture.height for picture in pictures))
    row = Image.new("RGB", size, "white")
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + gap
    return row
