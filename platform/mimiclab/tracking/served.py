"""What answers where a model is served. This file travels with each model, and so does `mimicdet`: no MimicLab there.

Nothing of a model is unpickled. A model answers requests such as

    {"inputs": [{"image": "<the bytes of a JPEG or PNG file in base64>"}], "params": {"min_score": 0.5}}

with `{"predictions": [{"boxes": [[x1, y1, x2, y2]], "scores": [0.9], "labels": ["name"]}]}`, boxes in the image's own
pixels, best first. An image may also be a file of the server's, as `file:street/1.jpg`: only where the server was
started with MIMICLAB_IMAGES, and only from the folder that this names.
"""

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd  # type: ignore[import-untyped]
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from PIL import Image, UnidentifiedImageError
from pydantic import TypeAdapter
from torchvision.transforms.v2 import functional as F

from mimicdet import MimicDet, ModelConfig
from mimicdet.baselines import Baseline
from mimicdet.inputs import MIN_SIDE
from mimicdet.weights import load_matching

FOLDER = "MIMICLAB_IMAGES"
"""Environment variable: the folder that `file:` may name files of; without it, none is read."""
_FILE = "file:"


class ServedDetector(PythonModel):  # type: ignore[misc]
    """A detector behind MLflow's `predict`."""

    def load_context(self, context: PythonModelContext) -> None:
        """Build the detector from the model's two files."""
        config = json.loads(Path(context.artifacts["config"]).read_text())
        model = TypeAdapter(ModelConfig).validate_python(config["model"])
        kind = MimicDet if model.detector == "mimicdet" else Baseline
        detector = kind(model, len(config["classes"]), pretrained=False)
        load_matching(detector, context.artifacts["weights"])
        self._detector = detector.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self._classes: list[str] = config["classes"]
        self._bounds: tuple[int, int] = config["resize"]["short"], config["resize"]["long"]
        self._min_score: float = config["min_score"]

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Detect objects in the images of the column `image`, one by one: none depends on another."""
        min_score = (params or {}).get("min_score", self._min_score)
        return [self._detect(read_image(image), min_score) for image in model_input["image"]]

    def _detect(self, pixels: npt.NDArray[np.uint8], min_score: float) -> dict[str, Any]:
        height, width, _ = pixels.shape
        size = resized_size(width, height, *self._bounds)
        image = F.resize(torch.from_numpy(pixels).permute(2, 0, 1), [size[1], size[0]], antialias=True)
        found = {name: value.cpu() for name, value in self._detector.detect([image])[0].items()}
        kept = found["scores"].double() >= min_score
        boxes = found["boxes"][kept] * torch.tensor([width, height]).repeat(2) / torch.tensor(size).repeat(2)
        return {
            "boxes": boxes.tolist(),
            "scores": found["scores"][kept].tolist(),
            "labels": [self._classes[label] for label in found["labels"][kept].tolist()],
        }


def read_image(image: str) -> npt.NDArray[np.uint8]:
    """Pixels (H, W, 3), RGB, of an image in base64, or of a `file:` where that is allowed.

    Raises:
        MlflowException: It is none of these, or no image; a request with it is a bad one.
    """
    if not isinstance(image, str):
        raise MlflowException.invalid_parameter_value(f"image: expected a text, found a {type(image).__name__}")
    try:
        content = _file(image.removeprefix(_FILE)) if image.startswith(_FILE) else _base64(image)
        with Image.open(io.BytesIO(content)) as opened:
            return np.array(opened.convert("RGB"))
    except UnidentifiedImageError:
        raise MlflowException.invalid_parameter_value("image: cannot be read: it is of no known format") from None
    # What Pillow raises for a damaged file depends on its format.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MlflowException.invalid_parameter_value(f"image: cannot be read: {error}") from None


def resized_size(width: int, height: int, short: int, long: int) -> tuple[int, int]:
    """The (width, height) that the detector was trained for; as `mimiclab.data.transforms.resized_size`, in full."""
    small, large = min(width, height), max(width, height)
    numerator, denominator = (short, small) if short * large <= long * small else (long, large)
    scaled = [max(MIN_SIDE, (2 * side * numerator + denominator) // (2 * denominator)) for side in (width, height)]
    return scaled[0], scaled[1]


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise ValueError(f"expected the bytes of an image file in base64, found {text[:40]!r}: {error}") from None


def _file(name: str) -> bytes:
    allowed = os.environ.get(FOLDER)
    if not allowed:
        raise ValueError(f"this server reads no files: expected the bytes in base64, found {_FILE}{name}")
    folder = Path(allowed).resolve()
    path = (folder / name).resolve()  # links that lead out of the folder lead nowhere
    if not (path.is_relative_to(folder) and path.is_file()):
        raise ValueError(f"{_FILE}{name}: there is no such file in {FOLDER}")
    return path.read_bytes()


set_model(ServedDetector())
