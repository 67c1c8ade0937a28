"""A run's deployed detector as one file for other programs, checked against the detector that it was made from."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mimicdet.export import INPUT, METADATA_FILE, OUTPUTS, export_onnx, export_torch, min_exported_side
from mimicdet.inputs import IMAGE_MEAN, IMAGE_STD
from mimicdet.interface import Detections, Detector
from mimiclab.errors import UserError
from mimiclab.predict import load_detector
from mimiclab.runs import Run
from mimiclab.schema import Experiment

Format = Literal["onnx", "torch"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}
INSTALL = "pip install mimiclab[onnx]"


@dataclass(frozen=True)
class Difference:
    """How far an exported file is from its detector, on one image."""

    num: int
    """Detections that both have: of the same class, and nowhere else as close."""
    unmatched: int
    """Detections that one of them has more than the other, by class."""
    boxes: float
    """Largest difference of two coordinates, in pixels."""
    scores: float


def export(run: Run, format: Format, output: Path | None, say: Callable[[str], object]) -> Path:
    """Write the deployed path of a run's best weights; an existing file is replaced when the new one is whole.

    Args:
        run: of MimicDet.
        format: `onnx`, or `torch` for a .pt2.
        output: file to write; by default one named as the run, in its folder, or in the current one of a remote run.
        say: gets a line at a time: what was written, and how far it is from the detector.

    Returns:
        The file.

    Raises:
        UserError: the run is of another detector, the file cannot be written, or packages are missing.
    """
    file = (output or (run.storage.local or Path()) / f"{run.name}{SUFFIXES[format]}").absolute()
    experiment = run.located()
    if experiment.model.detector != "mimicdet":
        raise UserError(f"run {run.name}: its detector is {experiment.model.detector}, expected a MimicDet run")
    if format == "onnx":
        _check_packages()
    if file.is_dir() or not (file.parent.is_dir() and os.access(file.parent, os.W_OK)):
        raise UserError(f"{file}: cannot be written, expected a file in a folder that exists and that you may write to")
    detector = load_detector(run, experiment)
    aside = file.with_name(f".{file.stem}-{os.getpid()}{SUFFIXES[format]}")
    try:
        with _quiet():
            write = export_onnx if format == "onnx" else export_torch
            write(detector, aside, _metadata(run, experiment))
        checked = check(aside, format, detector, _random_image(experiment))
        aside.replace(file)
    except ValueError as error:
        raise UserError(f"run {run.name}: {error}") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from error
    finally:
        aside.unlink(missing_ok=True)
    limit = experiment.model.inference.max_detections
    say(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
    shortest = min_exported_side(experiment.model.pyramid)
    images = "any number of images, of any size" if format == "onnx" else f"images of {shortest} pixels a side or more"
    say(f"input:   {INPUT} (N, 3, H, W) uint8, RGB; {images}")
    say(f"outputs: boxes (N, {limit}, 4) xyxy pixels, scores (N, {limit}), labels (N, {limit}), best first;")
    say("         label -1 where there is nothing")
    say(f"check:   {checked}")
    return file


def read_metadata(file: Path) -> dict[str, str]:
    """What an exported file says about itself: see `_metadata`; `classes` is a JSON list, in the order of labels."""
    if file.suffix == SUFFIXES["onnx"]:
        import onnx

        return {entry.key: entry.value for entry in onnx.load(file, load_external_data=False).metadata_props}
    import torchvision  # noqa: F401 (registers the NMS that the program calls)

    extra = {METADATA_FILE: ""}
    torch.export.load(file, extra_files=extra)
    metadata: dict[str, str] = json.loads(extra[METADATA_FILE])
    return metadata


def check(file: Path, format: Format, detector: Detector, image: Tensor) -> str:
    """Run an exported file on one image (3, H, W), and say how far it is from the detector."""
    found = _run(file, format, image)
    if found is None:
        return f"skipped, the package onnxruntime is missing: {INSTALL}"
    (wanted,) = detector.detect_heads([image], topk=1)["student"]
    compared = difference(wanted, found)
    height, width = image.shape[1:]
    more = f", {compared.unmatched} without a counterpart" if compared.unmatched else ""
    return (
        f"{compared.num} detections in noise of {width} x {height}{more}; largest difference from the detector: "
        f"boxes {compared.boxes:.2g} px, scores {compared.scores:.2g}"
    )


def difference(ours: Detections, theirs: Detections) -> Difference:
    """Compare detections of one image, whatever the order of those with almost the same score."""
    boxes, scores, num, unmatched = 0.0, 0.0, 0, 0
    for label in torch.cat([ours["labels"], theirs["labels"]]).unique():
        mine, other = ours["labels"] == label, theirs["labels"] == label
        unmatched += abs(int(mine.sum()) - int(other.sum()))
        if not (mine.any() and other.any()):
            continue
        far = (ours["boxes"][mine][:, None] - theirs["boxes"][other]).abs().amax(-1)
        closest, index = far.min(1)
        num += len(closest)
        boxes = max(boxes, float(closest.max()))
        scores = max(scores, float((ours["scores"][mine] - theirs["scores"][other][index]).abs().max()))
    return Difference(num, unmatched, boxes, scores)


def _check_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--format onnx: the package {error.name} is missing, expected it from: {INSTALL}") from error


def _metadata(run: Run, experiment: Experiment) -> dict[str, str]:
    inference = experiment.model.inference
    return {
        "run": run.name,
        "step": str(run.best().step),
        "mimiclab": version("mimiclab"),
        "classes": json.dumps(run.classes),
        "images": "uint8 RGB, 0 to 255; normalised inside, after division by 255, by image_mean and image_std",
        "image_mean": json.dumps(IMAGE_MEAN),
        "image_std": json.dumps(IMAGE_STD),
        "score_threshold": str(inference.score_threshold),
        "nms_iou": str(inference.nms_iou),
        "max_detections": str(inference.max_detections),
    }


def _random_image(experiment: Experiment) -> Tensor:
    """Noise, as large as the experiment's images."""
    resize = experiment.data.resize
    shortest = min_exported_side(experiment.model.pyramid)
    size = [max(side, shortest) for side in (resize.short, resize.long)]
    return torch.randint(256, (3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@torch.no_grad()
def _run(file: Path, format: Format, image: Tensor) -> Detections | None:
    """What an exported file detects in an image; None where nothing here can run it."""
    if format == "torch":
        outputs = torch.export.load(file).module()(image[None])
    else:
        try:
            import onnxruntime
        except ImportError:
            return None
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        outputs = map(torch.from_numpy, session.run(list(OUTPUTS), {INPUT: image[None].numpy()}))
    boxes, scores, labels = (output[0] for output in outputs)
    exists = labels >= 0
    return {"boxes": boxes[exists], "scores": scores[exists], "labels": labels[exists]}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what the exporters tell their own developers."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="torchvision")
            yield
    finally:
        logger.setLevel(level)
