"""Image files in, detections and pictures out, by the deployed path of a trained detector."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from mimicdet.interface import Detections, Detector
from mimiclab.build import build_detector
from mimiclab.data.dataset import read_image
from mimiclab.data.limits import IMAGE_SUFFIXES
from mimiclab.data.results import CocoIds
from mimiclab.deployed import Deployed
from mimiclab.errors import UserError
from mimiclab.pictures import Panel, side_by_side
from mimiclab.runs import Run
from mimiclab.schema import Experiment
from mimiclab.storage import Storage

DETECTIONS, COCO_RESULTS = "detections.json", "coco_results.json"

# Images that are read, looked at and drawn together.
_BATCH = 8


@dataclass(frozen=True)
class Detection:
    """One detected object."""

    box: tuple[float, float, float, float]
    """xyxy in the image's own pixels."""
    score: float
    label: str


@dataclass(frozen=True)
class Predictions:
    """What became of each image."""

    found: dict[Path, list[Detection]] = field(default_factory=dict)
    skipped: dict[Path, str] = field(default_factory=dict)
    """Of each image that cannot be read, why."""


def load_detector(run: Run, experiment: Experiment) -> Detector:
    """The detector of a run with its best weights, in evaluation mode."""
    detector = build_detector(experiment.model, run.classes, pretrained=False)
    detector.load_state_dict(run.best().weights())
    return detector.eval()


def load_deployed(run: Run) -> Deployed:
    """A run's best weights as they are deployed; see `load_detector`."""
    experiment = run.located()
    return Deployed(load_detector(run, experiment), run.classes, experiment.data.resize)


def find_images(paths: Sequence[Path], leave_out: Path | None = None) -> list[Path]:
    """Image files among the paths, and those in folders among them, at any depth.

    Args:
        paths: Files, whatever they are called, and folders.
        leave_out: Folder whose images are not taken when one of the folders holds it: that of an earlier answer.

    Raises:
        UserError: a path does not exist, or there is no image at all.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(_images_below(path, leave_out))
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"image {path}: no such file or folder")
    if not found:
        raise UserError(
            f"{', '.join(map(str, paths))}: no images, expected files ending in {', '.join(IMAGE_SUFFIXES)}"
        )
    return list(dict.fromkeys(found))


def _images_below(folder: Path, leave_out: Path | None) -> Iterator[Path]:
    answers = leave_out and leave_out.resolve()
    for path in folder.rglob("*"):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            parents = path.resolve().parents
            if answers is None or answers not in parents or answers in (folder.resolve(), *folder.resolve().parents):
                yield path


def predict(
    model: Deployed,
    images: Sequence[Path],
    save: Path,
    *,
    min_score: float,
    ids: CocoIds | None = None,
    done: Callable[[], object] = lambda: None,
    warn: Callable[[str], object] = lambda _: None,
) -> Predictions:
    """Detect objects in image files, and draw them.

    Every file is written aside and renamed when it is whole, those of all images after the last image: who stops
    earlier has pictures, and the other files as they were.

    Args:
        model: what detects.
        images: files to read; one that cannot be is left out.
        save: folder for a picture of each image and `detections.json`; made when missing.
        min_score: detections below are left out.
        ids: with them, `coco_results.json` has all detections, whatever their score: scorers need them.
        done: called after each image.
        warn: gets a line for each image that is left out.

    Raises:
        UserError: the folder cannot be made or written, or a picture would replace an image.
    """
    names = _picture_names(images)
    inputs = {path.resolve() for path in images}
    for path, name in names.items():
        if (save / name).resolve() in inputs:
            raise UserError(
                f"--save {save}: the picture of {path} would replace an image there, expected another folder"
            )
    try:
        save.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--save {save}: cannot be made: {error.strerror}") from error
    folder = Storage(save.absolute())
    model.detector.to("cuda" if torch.cuda.is_available() else "cpu")

    def draw(path: Path, pixels: Tensor, found: Detections) -> None:
        panel = Panel(path.name, found["boxes"].numpy(), found["labels"].numpy(), found["scores"].numpy())
        picture = side_by_side(pixels.permute(1, 2, 0).numpy(), [panel], model.classes, min_score=min_score)
        encoded = BytesIO()
        picture.save(encoded, "PNG")
        folder.write(names[path], encoded.getbuffer())
        done()

    predictions, results = Predictions(), []
    with ThreadPoolExecutor(min(_BATCH, os.cpu_count() or 1)) as pool:
        for start in range(0, len(images), _BATCH):
            paths, batch = images[start : start + _BATCH], dict[Path, Tensor]()
            for path, pixels in zip(paths, pool.map(_read, paths), strict=True):
                if isinstance(pixels, Tensor):
                    batch[path] = pixels
                else:
                    predictions.skipped[path] = pixels
                    warn(f"left out: {pixels}")
                    done()
            answers = model.detect(list(batch.values()))
            for path, found in zip(batch, answers, strict=True):
                predictions.found[path] = _listed(found, model.classes, min_score)
                if ids is not None:
                    results += ids.results(path, found)
            list(pool.map(draw, batch, batch.values(), answers))
    records = {str(path): [asdict(each) for each in found] for path, found in predictions.found.items()}
    folder.write(DETECTIONS, json.dumps(records, indent=1).encode())
    if ids is not None:
        folder.write(COCO_RESULTS, json.dumps(results).encode())
    return predictions


def _read(path: Path) -> Tensor | str:
    """The pixels of an image file, or why it has none."""
    try:
        return read_image(path)
    except UserError as error:
        return str(error)


def _listed(found: Detections, classes: Sequence[str], min_score: float) -> list[Detection]:
    rows = zip(found["boxes"].tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True)
    return [
        Detection((x1, y1, x2, y2), score, classes[label])
        for (x1, y1, x2, y2), score, label in rows
        if score >= min_score
    ]


def _picture_names(images: Sequence[Path]) -> dict[Path, str]:
    """A file name for each image's picture; numbered where two images share a stem."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in images:
        name, number = f"{path.stem}.png", 2
        while name in taken:
            name, number = f"{path.stem}-{number}.png", number + 1
        taken.add(name)
        names[path] = name
    return names
