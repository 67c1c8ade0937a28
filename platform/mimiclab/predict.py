"""Images in, detections and pictures out, by the deployed path of a trained run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mimicdet.interface import Detector
from mimiclab.build import build_detector
from mimiclab.data.dataset import read_image
from mimiclab.data.limits import IMAGE_SUFFIXES
from mimiclab.data.transforms import resize, resized_size
from mimiclab.errors import UserError
from mimiclab.pictures import Panel, side_by_side
from mimiclab.runs import Run
from mimiclab.schema import Experiment


@dataclass(frozen=True)
class Detection:
    """One detected object."""

    box: tuple[float, float, float, float]
    """xyxy in the image's own pixels."""
    score: float
    label: str


def load_detector(run: Run, experiment: Experiment) -> Detector:
    """The detector of a run with its best weights, in evaluation mode."""
    detector = build_detector(experiment.model, run.classes, pretrained=False)
    detector.load_state_dict(run.best().weights())
    return detector.eval()


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Image files among the paths, and those in folders among them.

    Raises:
        UserError: a path does not exist, or there is no image at all.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"image {path}: no such file or folder")
    if not found:
        raise UserError(
            f"{', '.join(map(str, paths))}: no images, expected files ending in {', '.join(IMAGE_SUFFIXES)}"
        )
    return list(dict.fromkeys(found))


def predict(
    run: Run, images: Sequence[Path], save: Path, *, min_score: float, done: Callable[[], object]
) -> dict[Path, list[Detection]]:
    """Detect objects in image files, one at a time.

    Args:
        run: its best weights are used.
        images: files to read.
        save: folder for a picture of each image and one `detections.json`; made when missing.
        min_score: detections below are left out.
        done: called after each image.

    Raises:
        UserError: an image cannot be read, the folder cannot be made, or a picture would replace an image.
    """
    experiment = run.located()
    detector = load_detector(run, experiment)
    try:
        save.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--save {save}: cannot be made: {error.strerror}") from error
    names = _picture_names(images)
    inputs = {path.resolve() for path in images}
    for path, name in names.items():
        if (save / name).resolve() in inputs:
            raise UserError(
                f"--save {save}: the picture of {path} would replace an image there, expected another folder"
            )
    results: dict[Path, list[Detection]] = {}
    for path in images:
        pixels = read_image(path)
        height, width = pixels.shape[1:]
        size = resized_size(width, height, experiment.data.resize.short, experiment.data.resize.long)
        resized, _ = resize(pixels, torch.zeros(0, 4), size)
        found = detector([resized])[0]
        kept = found["scores"] >= min_score
        # Multiplied before divided: a box that ends at the border still ends exactly there.
        boxes = found["boxes"][kept] * torch.tensor([width, height]).repeat(2) / torch.tensor(size).repeat(2)
        scores, labels = found["scores"][kept], found["labels"][kept]
        results[path] = [
            Detection((x1, y1, x2, y2), score, run.classes[label])
            for (x1, y1, x2, y2), score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True)
        ]
        panel = Panel(path.name, boxes.numpy(), labels.numpy(), scores.numpy())
        picture = side_by_side(pixels.permute(1, 2, 0).numpy(), [panel], run.classes, min_score=min_score)
        picture.save(save / names[path])
        done()
    (save / "detections.json").write_text(json.dumps(dict(_records(results)), indent=1))
    return results


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


def _records(results: dict[Path, list[Detection]]) -> Iterator[tuple[str, object]]:
    for path, detections in results.items():
        yield (
            str(path),
            [{"box": list(d.box), "score": d.score, "label": d.label} for d in detections],
        )
