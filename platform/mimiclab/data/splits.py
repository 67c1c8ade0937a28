"""The two data sets that an experiment names."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mimiclab.data.coco import CocoDataset, content_hash, read_coco
from mimiclab.data.columns import ImageFiles
from mimiclab.data.scenes import generate_scenes
from mimiclab.errors import UserError
from mimiclab.schema import DataConfig, Split
from mimiclab.storage import Place, storage_at

Part = Literal["train", "val"]
PARTS: tuple[Part, Part] = ("train", "val")

# How often a long packing says how far it is.
_SECONDS_PER_LINE = 15.0


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
    cache = None if data.cache is None else str(Path(data.cache).absolute())
    return data.model_copy(update={"scenes": None, "train": _absolute(train), "val": _absolute(val), "cache": cache})


def read_splits(data: DataConfig) -> Splits:
    """Read and check both sets of located data.

    Raises:
        UserError: one of them cannot be read or has no object, or their classes differ.
    """
    train, val = (_read(data, part) for part in PARTS)
    for part, split in zip(PARTS, (train, val), strict=True):
        if split.columns.iscrowd.all():
            num_left_out = f", {len(split.left_out)} annotations left out" if split.left_out else ""
            raise UserError(
                f"{_key(data, part)}: {split.origin} has no object in its {len(split.images)} images"
                f"{num_left_out}; expected at least one that is no crowd"
            )
    if train.classes != val.classes:
        raise UserError(
            f"{_key(data, 'val')}: {val.origin} has the classes {list(val.classes)}, "
            f"expected those of {train.origin}: {list(train.classes)}"
        )
    return Splits(train, val)


def pack_splits(data: DataConfig, splits: Splits, folder: Place, say: Callable[[str], object]) -> DataConfig:
    """Pack those of located data's sets that are plain files into a folder, unless that was done before.

    Each gets a subfolder named by what it is made of, so that data which changed is packed anew.

    Args:
        data: Where the sets are.
        splits: What `read_splits` gave for it.
        folder: One that all workers see.
        say: Gets a line for each set that is packed.

    Returns:
        The same data with packed sets.

    Raises:
        UserError: An image cannot be read or decoded, or the folder cannot be written.
    """
    from mimiclab.data.cache import locked
    from mimiclab.data.manifest import MANIFEST
    from mimiclab.data.pack import file_stats, pack
    from mimiclab.data.parallel import in_threads

    root = storage_at(folder)
    packed: dict[str, Split] = {}
    for part, split in zip(PARTS, (splits.train, splits.val), strict=True):
        if not isinstance(split.source, ImageFiles):
            continue
        made_of = hashlib.sha256(f"{content_hash(split)} {split.source.folder} ".encode())
        made_of.update(file_stats(split.source).tobytes())
        name = f"{split.annotations.stem}-{made_of.hexdigest()[:16]}"
        target = root / name
        try:
            with ExitStack() as stack:
                if root.local is not None:  # trials that start together want the same; a bucket takes it twice
                    root.local.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(locked(root.local / f".{name}.lock"))
                if MANIFEST not in target.sizes():
                    say(f"packing {len(split.images)} images of {split.origin} into {target.name}")
                pack(split, target.uri, run=in_threads(os.cpu_count() or 1), done=_counted(len(split.images), say))
        except OSError as error:
            raise UserError(f"{root.name}: packed data cannot be written there: {error}") from error
        packed[part] = Split(packed=target.uri)
    return data.model_copy(update=packed)


def _counted(total: int, say: Callable[[str], object]) -> Callable[[int], None]:
    """Adds up what is done, and says so now and then."""
    done, said = 0, time.monotonic()

    def count(num: int) -> None:
        nonlocal done, said
        done += num
        if done < total and time.monotonic() - said > _SECONDS_PER_LINE:
            said = time.monotonic()
            say(f"packed {done} of {total} images")

    return count


def _read(data: DataConfig, part: Part) -> CocoDataset:
    split = getattr(data, part)
    if split.packed is None:
        return read_coco(Path(split.annotations), Path(split.images))
    from mimiclab.data.shards import read_packed

    return read_packed(
        split.packed,
        cache=None if data.cache is None else Path(data.cache),
        cache_bytes=None if data.cache_gb is None else int(data.cache_gb * 1e9),
    )


def _key(data: DataConfig, part: Part) -> str:
    return f"data.{part}.{'annotations' if getattr(data, part).packed is None else 'packed'}"


def _absolute(split: Split) -> Split:
    return Split(
        **{name: path if "://" in path else str(Path(path).absolute()) for name, path in split.model_dump().items()}
    )
