"""A trained detector as it is deployed: images of any size in, detections in the images' own pixels out.

detector.json         what it is: classes, how images are resized, the resolved model
weights.safetensors   its weights

A model in MLflow carries these two files; `tracking/served.py` reads them where there is no MimicLab.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from mimicdet import ModelConfig
from mimicdet.config import is_published_name
from mimicdet.interface import Detections, Detector
from mimicdet.weights import load_matching
from mimiclab.build import build_detector
from mimiclab.checkpoint import WEIGHTS
from mimiclab.data.transforms import padded_size, resize, resized_size
from mimiclab.errors import UserError
from mimiclab.runs import Run
from mimiclab.schema import Resize

CONFIG = "detector.json"
DEFAULT_MIN_SCORE = 0.3
"""Detections with a lower score are left out where nobody asks for another."""
FORMAT = 1
"""Of detector.json; another number is another form."""


@dataclass(frozen=True)
class Deployed:
    """A detector in evaluation mode, and what its images go through."""

    detector: Detector
    classes: tuple[str, ...]
    resize: Resize

    def detect(self, images: Sequence[Tensor]) -> list[Detections]:
        """Detect objects in images (3, H, W) uint8 of any sizes.

        Images are put through together where they are padded to the same size, so that what is found in one depends
        on no other.

        Returns:
            Of each image boxes (D, 4) xyxy in its own pixels, scores (D,) and labels (D,), best first, on the CPU.
        """
        sizes = [resized_size(image.shape[2], image.shape[1], self.resize.short, self.resize.long) for image in images]
        groups: dict[tuple[int, int], list[int]] = {}
        for index, size in enumerate(sizes):
            groups.setdefault(padded_size([size]), []).append(index)
        answers: dict[int, Detections] = {}
        for pad_to, group in groups.items():
            resized = [resize(images[index], torch.zeros(0, 4), sizes[index])[0] for index in group]
            for index, found in zip(group, self.detector.detect(resized, pad_to=pad_to), strict=True):
                own = {name: value.cpu() for name, value in found.items()}
                height, width = images[index].shape[1:]
                # Multiplied before divided: a box that ends at the border still ends exactly there.
                boxes = own["boxes"] * torch.tensor([width, height]).repeat(2)
                answers[index] = {**own, "boxes": boxes / torch.tensor(sizes[index]).repeat(2)}
        return [answers[index] for index in range(len(images))]


def describe(run: Run) -> dict[str, Any]:
    """What detector.json says of a run's best weights; no path of this machine is in it."""
    best, experiment = run.best(), run.located()
    backbone = experiment.model.backbone
    if backbone.weights is not None and not is_published_name(backbone.weights):
        # Kept in part: without it, the backbone would be another one, with norms for a random start.
        backbone = replace(backbone, weights=Path(backbone.weights).name)
    return {
        "format": FORMAT,
        "mimiclab": version("mimiclab"),
        "run": run.name,
        "step": best.step,
        "classes": list(run.classes),
        "resize": {"short": experiment.data.resize.short, "long": experiment.data.resize.long},
        "min_score": DEFAULT_MIN_SCORE,
        "model": asdict(replace(experiment.model, weights=None, backbone=backbone)),
    }


def read(folder: Path) -> Deployed:
    """The detector that a folder's two files hold, in evaluation mode.

    Raises:
        UserError: A file is missing, damaged or of another form.
    """
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text())
        if config["format"] != FORMAT:
            raise UserError(
                f"{CONFIG}: found format {config['format']!r}, expected {FORMAT}: another MimicLab wrote it"
            )
        model = TypeAdapter(ModelConfig).validate_python(config["model"])
        bounds = Resize.model_validate(config["resize"])
        classes = tuple(map(str, config["classes"]))
        detector = build_detector(model, classes, pretrained=False)
        load_matching(detector, folder / WEIGHTS)
    except OSError as error:
        raise UserError(f"{CONFIG}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{CONFIG}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{CONFIG}: not what MimicLab writes: {error}") from error
    return Deployed(detector.eval(), classes, bounds)
