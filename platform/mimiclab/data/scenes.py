"""A synthetic detection set: textured shapes on cluttered backgrounds, drawn from a seed.

It trains in minutes and needs no download. A class is a shape and nothing else: colour, texture, rotation
and size are drawn independently of it, so a detector has to learn form.

What a scene holds, at `size` = 128 pixels (other sizes scale):

* 1 to 6 objects, or none in every twelfth image. Most have a long side of 14 to 60 pixels; a tenth are
  down to 8 pixels and a tenth up to 110, log-uniform in each range.
* Up to four distractors without annotation: strokes, bars, half disks, crescents, blobs and letters.
* Later things cover earlier ones and may reach over the border. A placement that would leave any object
  with less than 40 % of its full shape visible is drawn again, and given up after some tries: every object
  in a picture is annotated, and every annotated object can be seen.
* A box is the tight box of the full shape, hidden parts included, clipped to the image; `area` counts the
  full shape's pixels inside of the image.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from mimiclab.errors import UserError

CLASSES = ("disk", "square", "triangle", "star")
_VERSION = 1  # raise it when anything that is drawn changes: it is part of the folder's name
_MAX_SEED = 2**32 - 1  # as in an experiment file
_SUPERSAMPLE = 4
_MIN_VISIBLE = 0.4
_TRIES = 20
_EMPTY_EVERY = 12
_SMALLEST = 8.0
# Share, shortest and longest long side for 128 pixels.
_SIZES = ((0.1, 8.0, 14.0), (0.8, 14.0, 60.0), (0.1, 60.0, 110.0))
_CONTRAST = 90.0

_Floats = npt.NDArray[np.float32]
_Points = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ScenesPaths:
    """Where a set of scenes lies, in COCO's format."""

    train_annotations: Path
    train_images: Path
    val_annotations: Path
    val_images: Path


@dataclass(frozen=True, eq=False)
class SceneObject:
    """One drawn object, as if nothing covered it.

    Attributes:
        label: Index into `CLASSES`.
        box: xyxy in pixels, clipped to the image.
        coverage: (size, size) in [0, 1], how much of every pixel the shape covers.
        full_area: In square pixels, with what lies outside of the image.
    """

    label: int
    box: tuple[float, float, float, float]
    coverage: _Floats
    full_area: float


def generate_scenes(root: Path, *, seed: int, num_train: int, num_val: int, size: int) -> ScenesPaths:
    """Write the set below `root`, in a folder named after the arguments; return at once where it is complete.

    The same arguments give the same bytes. That holds with the same versions of NumPy (its generator's
    distributions, which may change between versions, and float32 arithmetic) and of Pillow (polygons, resizing
    and the zlib that packs the pixels); no font is used, letters are polygons. Images are drawn independently
    of each other: a larger set starts with the images of a smaller one. The folder appears under its name only
    when it is whole.

    Args:
        root: Folder that holds the sets; made when missing.
        seed: Seed of the set; training and validation images come from separate streams of it.
        num_train: Number of training images.
        num_val: Number of validation images.
        size: Side of the square images in pixels.

    Raises:
        UserError: An argument is out of range, `root` is not writable, or the folder is there but not whole.
    """
    for key, value, least in (
        ("seed", seed, 0),
        ("num_train", num_train, 1),
        ("num_val", num_val, 1),
        ("size", size, 32),
    ):
        if value < least:
            raise UserError(f"scenes: {key} must be {least} or more, found {value}")
    if seed > _MAX_SEED:
        raise UserError(f"scenes: seed must be {_MAX_SEED} or less, found {seed}")
    parameters = {"version": _VERSION, "seed": seed, "num_train": num_train, "num_val": num_val, "size": size}
    folder = root / f"scenes-v{_VERSION}-seed{seed}-{num_train}x{num_val}-{size}px"
    paths = ScenesPaths(
        train_annotations=folder / "annotations" / "instances_train.json",
        train_images=folder / "train",
        val_annotations=folder / "annotations" / "instances_val.json",
        val_images=folder / "val",
    )
    if _is_complete(folder, parameters):
        return paths
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".scenes-") as aside:
            made = Path(aside) / folder.name
            for stream, (split, num_images) in enumerate((("train", num_train), ("val", num_val))):
                _write_split(made, split, num_images, size, seed, stream)
            (made / "complete.json").write_text(json.dumps(parameters))
            try:
                made.rename(folder)
            except OSError:
                # Another process may have been first; what it made is the same.
                if not _is_complete(folder, parameters):
                    raise
    except OSError as error:
        raise UserError(f"{folder}: cannot write the scenes there: {error.strerror}") from error
    return paths


def _is_complete(folder: Path, parameters: dict[str, int]) -> bool:
    """Whether the set is there whole.

    Raises:
        UserError: There is a folder of that name which is something else.
    """
    if not folder.exists():
        return False
    try:
        complete = json.loads((folder / "complete.json").read_text()) == parameters
    except (OSError, ValueError):
        complete = False
    if not complete:
        raise UserError(f"{folder}: expected a complete set of scenes, found something else; remove it to draw anew")
    return True


def _write_split(folder: Path, split: str, num_images: int, size: int, seed: int, stream: int) -> None:
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(num_images):
        pixels, objects = render_scene(seed, stream, index, size)
        image_id = index + 1
        file_name = f"{image_id:06d}.png"
        Image.fromarray(pixels).save(folder / split / file_name, compress_level=1)  # noise hardly compresses
        images.append({"id": image_id, "file_name": file_name, "width": size, "height": size})
        for item in objects:
            x1, y1, x2, y2 = item.box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": item.label + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": round(float(item.coverage.sum()), 2),
                    "iscrowd": 0,
                }
            )
    content = {
        "info": {"description": f"MimicLab scenes, version {_VERSION}, seed {seed}, {split}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)],
    }
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def render_scene(seed: int, stream: int, index: int, size: int) -> tuple[npt.NDArray[np.uint8], list[SceneObject]]:
    """Draw one scene: pixels (size, size, 3) and its objects in the order they were drawn.

    `stream` is 0 for training and 1 for validation.
    """
    # A counter block of its own for every image: no two of them share a draw.
    rng = np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, index]))
    canvas = _background(rng, size)
    num_objects = 0 if index % _EMPTY_EVERY == _EMPTY_EVERY - 1 else int(rng.integers(1, 7))
    kinds = ["object"] * num_objects + ["distractor"] * int(rng.integers(0, 5))
    objects: list[SceneObject] = []
    visible: list[_Floats] = []  # what is still to be seen of every object
    for kind in rng.permutation(kinds):
        label = int(rng.integers(len(CLASSES))) if kind == "object" else None
        for _ in range(_TRIES):
            outline = _object_outline(rng, CLASSES[label]) if label is not None else _distractor_outline(rng)
            length = _draw_length(rng, size)
            shape = _rasterise(outline, length, rng.uniform(0, size, 2), size)
            remaining = [seen * (1 - shape.coverage) for seen in visible]
            if any(seen.sum() < _MIN_VISIBLE * item.full_area for seen, item in zip(remaining, objects, strict=True)):
                continue
            if label is not None and shape.coverage.sum() < _MIN_VISIBLE * shape.full_area:
                continue
            _paint(rng, canvas, shape.coverage)
            visible = remaining
            if label is not None:
                objects.append(SceneObject(label, shape.box, shape.coverage, shape.full_area))
                visible.append(shape.coverage)
            break
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(rng.uniform(2, 9))
    return canvas.clip(0, 255).round().astype(np.uint8), objects


@dataclass(frozen=True, eq=False)
class _Shape:
    """A rasterised outline: coverage (size, size) in [0, 1], box clipped to the image, area unclipped."""

    coverage: _Floats
    box: tuple[float, float, float, float]
    full_area: float


def _rasterise(outline: _Points, length: float, centre: _Points, size: int) -> _Shape:
    """Draw an outline (K, 2) so that its long side is `length` and its box is centred at `centre`."""
    low, high = outline.min(axis=0), outline.max(axis=0)
    points = (outline - (low + high) / 2) * (length / (high - low).max()) + centre
    # Whole pixels around it, also where they are outside of the image: the box is that of the full shape.
    origin = np.floor(points.min(axis=0)).astype(int) - 1
    width, height = (np.ceil(points.max(axis=0)).astype(int) + 1 - origin).tolist()
    mask = Image.new("L", (width * _SUPERSAMPLE, height * _SUPERSAMPLE))
    corners = ((points - origin) * _SUPERSAMPLE).ravel().tolist()
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    bounds = mask.getbbox()
    assert bounds is not None, "a shape of a pixel or more always covers something"
    x1, y1, x2, y2 = (np.array(bounds) / _SUPERSAMPLE + np.tile(origin, 2)).clip(0, size).tolist()
    crop = np.asarray(mask.reduce(_SUPERSAMPLE), dtype=np.float32) / 255
    coverage = np.zeros((size, size), dtype=np.float32)
    left, top = origin.tolist()
    inside = np.s_[max(top, 0) : min(top + height, size), max(left, 0) : min(left + width, size)]
    if min(left + width, top + height) > 0 and max(left, top) < size:
        coverage[inside] = crop[
            inside[0].start - top : inside[0].stop - top, inside[1].start - left : inside[1].stop - left
        ]
    return _Shape(coverage, (x1, y1, x2, y2), float(crop.sum()))


def _draw_length(rng: np.random.Generator, size: int) -> float:
    """The long side of a thing, in pixels."""
    _, low, high = _SIZES[rng.choice(len(_SIZES), p=[share for share, _, _ in _SIZES])]
    return max(_SMALLEST, size / 128 * math.exp(rng.uniform(math.log(low), math.log(high))))


def _circle(num: int, radius: float | _Points = 1.0, turn: float = 2 * math.pi) -> _Points:
    """`num` points on a circle or a part of it, each at its own radius where several are given."""
    angles = turn * np.arange(num) / num
    points: _Points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.reshape(radius, (-1, 1))
    return points


def _vary(rng: np.random.Generator, outline: _Points) -> _Points:
    """Stretch an outline a little along some direction and turn it."""
    stretch = np.diag([math.exp(rng.uniform(-0.2, 0.2)), 1.0])
    return outline @ _rotation(rng) @ stretch @ _rotation(rng)


def _rotation(rng: np.random.Generator) -> _Points:
    angle = rng.uniform(0, 2 * math.pi)
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _object_outline(rng: np.random.Generator, name: str) -> _Points:
    outlines = {
        "disk": _circle(48),
        "square": _circle(4),
        "triangle": _circle(3),
        "star": _circle(10, np.tile([1.0, 0.42], 5)),
    }
    return _vary(rng, outlines[name])


def _distractor_outline(rng: np.random.Generator) -> _Points:
    """A shape that is none of the classes."""
    kind = rng.choice(["stroke", "bar", "half disk", "crescent", "blob", "letter"])
    if kind == "stroke":
        outline = _rectangle(rng.uniform(12, 40), 1)
    elif kind == "bar":
        outline = _rectangle(rng.uniform(3, 5), 1)
    elif kind == "half disk":
        outline = _circle(25, turn=math.pi * 25 / 24)
    elif kind == "crescent":
        arc = _circle(25, turn=math.pi * 25 / 24)
        outline = np.concatenate([arc, arc[::-1] * [1.0, 0.45]])
    elif kind == "blob":
        # Lobes deep enough that it is no disk, smooth enough that it is no star.
        angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        lobes = 0.45 * np.cos(2 * angles + rng.uniform(0, 6)) + 0.2 * np.cos(3 * angles + rng.uniform(0, 6))
        outline = _circle(48, 1 + lobes)
    else:
        outline = np.array(_LETTERS[rng.integers(len(_LETTERS))], dtype=np.float64)
    return _vary(rng, outline)


def _rectangle(width: float, height: float) -> _Points:
    return np.array([[0, 0], [width, 0], [width, height], [0, height]])


# L, T, U and H in strokes of width 1.
_LETTERS = (
    ((0, 0), (1, 0), (1, 3), (3, 3), (3, 4), (0, 4)),
    ((0, 0), (3, 0), (3, 1), (2, 1), (2, 4), (1, 4), (1, 1), (0, 1)),
    ((0, 0), (1, 0), (1, 3), (2, 3), (2, 0), (3, 0), (3, 4), (0, 4)),
    ((0, 0), (1, 0), (1, 1.5), (2, 1.5), (2, 0), (3, 0), (3, 4), (2, 4), (2, 2.5), (1, 2.5), (1, 4), (0, 4)),
)


def _background(rng: np.random.Generator, size: int) -> _Floats:
    """A soft pattern of a few scales between two colours, (size, size, 3)."""
    first = rng.uniform(30, 225, 3).astype(np.float32)
    second = (first + rng.uniform(-60, 60, 3)).clip(10, 245).astype(np.float32)
    pattern = np.zeros((size, size), dtype=np.float32)
    for cells in (3, 8, 24):
        grid = rng.random((cells, cells), dtype=np.float32)
        smooth = Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC)
        pattern += np.asarray(smooth) * np.float32(rng.uniform(0.1, 0.6))
    pattern -= pattern.min()
    pattern /= pattern.max()
    return first + pattern[:, :, None] * (second - first)


def _paint(rng: np.random.Generator, canvas: _Floats, coverage: _Floats) -> None:
    """Cover part of the canvas with a texture whose colour stands out from what is underneath."""
    total = coverage.sum()
    if total == 0:  # a distractor may miss the image
        return
    under = (canvas * coverage[:, :, None]).sum(axis=(0, 1)) / total
    colour = rng.uniform(15, 240, 3)
    while np.linalg.norm(colour - under) < _CONTRAST:
        colour = rng.uniform(15, 240, 3)
    size = len(canvas)
    texture = _texture(rng, size) * np.float32(rng.uniform(0, 25))
    painted = colour.astype(np.float32) + texture[:, :, None]
    canvas += coverage[:, :, None] * (painted - canvas)


def _texture(rng: np.random.Generator, size: int) -> _Floats:
    """Stripes, checks, a gradient or speckles in [-1, 1], (size, size)."""
    kind = rng.integers(4)
    if kind == 3:
        return rng.uniform(-1, 1, (size, size)).astype(np.float32)
    y, x = np.indices((size, size), dtype=np.float32)
    (a, b), (c, d) = _rotation(rng).astype(np.float32)
    u, v = a * x + b * y, c * x + d * y
    texture: _Floats = np.sin(u * np.float32(2 * math.pi / rng.uniform(4, 12)))
    if kind == 1:
        texture = np.sign(texture * np.sin(v * np.float32(2 * math.pi / rng.uniform(4, 12))))
    elif kind == 2:
        texture = u / np.abs(u).max()
    return texture
