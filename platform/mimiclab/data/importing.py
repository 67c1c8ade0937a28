"""Data sets of other formats as annotation files in COCO's format, beside images that stay where they are.

Parsing a box is globox's part (MIT, no compiled code). Around it, because no reader that was looked at does
it: difficult objects, pixels that count from 1, images without label files, splits, and errors with a line.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console
from rich.progress import track

from mimiclab.data import voc, yolo
from mimiclab.data.foreign import Box, ForeignSet, Item, Remarks, Size, Split, image_size, load_globox
from mimiclab.errors import UserError

Format = Literal["auto", "voc", "yolo"]
_Read = list[tuple[Item, Size, list[Box]]]


def import_dataset(
    source: Path,
    target: Path,
    *,
    console: Console,
    format: Format = "auto",
    images: Path | None = None,
    classes: Path | None = None,
    difficult: voc.Difficult = "ignore",
    voc_one_based: bool = True,
    ignore_exif: bool = False,
    overwrite: bool = False,
) -> dict[str, Path]:
    """Write an annotation file for every split of a data set, and say what an experiment file needs.

    Nothing is left behind when it fails or is interrupted. Sizes are those of the images' headers.

    Args:
        source: Folder of the data set.
        target: Folder to write; it must not exist, be empty, or with `overwrite` hold nothing but JSON files.
        console: Shows progress on a terminal, and in any case what was written.
        format: `voc`, `yolo`, or whichever the folder looks like.
        images: Folder of the images, if it is not where the format has it.
        classes: File of the class names, a line each, or YAML with `names`. VOC needs none: names are then
            those of the boxes, sorted.
        difficult: What becomes of VOC's difficult objects. They do not count in VOC's evaluation, neither when
            they are found nor when they are missed: `ignore` makes them crowd regions, which is COCO's way
            to say almost that.
        voc_one_based: Whether VOC's pixels count from 1, as the format has it.
        ignore_exif: Take boxes to be of the stored pixels even where EXIF asks for the image to be turned.
        overwrite: Replace an earlier import.

    Returns:
        The annotation file of every split.

    Raises:
        UserError: something is missing, not sound, or in the way.
    """
    load_globox()
    _check_target(target, overwrite)
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    remarks = Remarks()
    foreign: ForeignSet
    if _format(source, format) == "voc":
        foreign = voc.VocFolder(source, images, classes, difficult, voc_one_based, remarks)
    else:
        foreign = yolo.YoloFolder(source, images, classes, remarks)
    _check_splits(source, foreign.splits)
    read = {split.name: _read(split, foreign, ignore_exif, remarks, console) for split in foreign.splits}
    names = foreign.classes or tuple(sorted({box.name for items in read.values() for box in _boxes(items)}))
    if not names:
        raise UserError(f"{source}: none of its files has an object, expected at least one")
    contents = {split.name: _coco(split.folder, read[split.name], names) for split in foreign.splits}
    _write(target, contents)

    files = {name: target / f"{name}.json" for name in contents}
    for name, content in contents.items():
        crowds = sum(annotation["iscrowd"] for annotation in content["annotations"])
        ignored = f", {crowds} of them to ignore" if crowds else ""
        console.print(
            f"{files[name]}: {len(content['images'])} images, {len(content['annotations'])} boxes{ignored}",
            highlight=False,
        )
    for line in remarks.lines():
        console.print(line, highlight=False)
    console.print(_experiment_lines(files, foreign.splits), highlight=False)
    return files


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target}: is there and no folder, expected a folder to write")
    found = sorted(target.iterdir())
    if found and not overwrite:
        raise UserError(f"{target}: is not empty, expected a new folder; --overwrite replaces an earlier import")
    for path in found:
        if path.suffix != ".json" or not path.is_file():
            raise UserError(f"{path}: is not of an import, expected nothing but JSON files in a folder to overwrite")


def _format(source: Path, format: Format) -> Format:
    if format != "auto":
        return format
    is_voc = (source / voc.ANNOTATIONS).is_dir()
    is_yolo = any((source / name).exists() for name in (*yolo.CONFIGS, yolo.CLASSES, "labels"))
    if is_voc == is_yolo:
        found = "both" if is_voc else "neither"
        raise UserError(
            f"{source}: expected the folder of a VOC data set ({voc.ANNOTATIONS}/) or of a YOLO one "
            f"({yolo.CONFIGS[0]}, {yolo.CLASSES} or labels/), found {found}; --format chooses"
        )
    return "voc" if is_voc else "yolo"


def _check_splits(source: Path, splits: tuple[Split, ...]) -> None:
    split_of: dict[Path, str] = {}
    for split in splits:
        for item in split.items:
            path = item.image.resolve()
            if path in split_of:
                raise UserError(f"{item.image}: is in {split_of[path]} and again in {split.name}, expected it once")
            split_of[path] = split.name
    if not split_of:
        raise UserError(f"{source}: has no images, expected at least one")
    if all(item.labels is None for split in splits for item in split.items):
        raise UserError(f"{source}: none of its {len(split_of)} images has a file of boxes")


def _read(split: Split, foreign: ForeignSet, ignore_exif: bool, remarks: Remarks, console: Console) -> _Read:
    read = []
    for item in track(split.items, split.name, console=console, transient=True, disable=not console.is_terminal):
        size = image_size(item.image, ignore_exif)
        if item.labels is None:
            remarks.add(f"images of {split.name} have no file of boxes and were kept as background", item.image)
        read.append((item, size, foreign.boxes(item.labels, size) if item.labels else []))
    return read


def _boxes(items: _Read) -> Iterable[Box]:
    return (box for _, _, boxes in items for box in boxes)


def _coco(folder: Path, items: _Read, names: tuple[str, ...]) -> dict[str, Any]:
    category_of = {name: index for index, name in enumerate(names, 1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for item, (width, height), boxes in items:
        file_name = item.image.relative_to(folder).as_posix()
        images.append({"id": len(images) + 1, "file_name": file_name, "width": width, "height": height})
        for box in boxes:
            x1, y1, x2, y2 = box.corners
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": len(images),
                    "category_id": category_of[box.name],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": int(box.ignore),
                }
            )
    categories = [{"id": index, "name": name} for name, index in category_of.items()]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def _write(target: Path, contents: dict[str, dict[str, Any]]) -> None:
    """Write the files aside and put them in place of the target, which stays if that fails."""
    target = target.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as aside:
            made, old = Path(aside) / "made", Path(aside) / "old"
            made.mkdir()
            for name, content in contents.items():
                (made / f"{name}.json").write_text(json.dumps(content))
            try:
                if target.exists():
                    target.rename(old)
                made.rename(target)
            except BaseException:
                if old.exists():
                    old.rename(target)
                raise
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror}") from error


def _experiment_lines(files: dict[str, Path], splits: tuple[Split, ...]) -> str:
    """The `data:` section; splits that it has no key for are comments."""
    lines = ["in the experiment file:", "data:"]
    for split in splits:
        paths = {"annotations": str(files[split.name].absolute()), "images": str(split.folder.absolute())}
        text = yaml.safe_dump(paths, default_flow_style=True, sort_keys=False, width=2**31, allow_unicode=True).strip()
        lines.append(f"  {'' if split.name in ('train', 'val') else '# '}{split.name}: {text}")
    return "\n".join(lines)
