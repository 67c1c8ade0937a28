"""Detections next to the truth, as a picture."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

# Bright colours that stay apart from each other and from most photographs.
PALETTE = (
    *("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#42d4f4", "#f032e6", "#bfef45", "#fabed4"),
    *("#469990", "#dcbeff", "#9a6324", "#fffac8", "#800000", "#aaffc3", "#808000", "#ffd8b1", "#000075"),
)
"""Classes take these colours in order, again from the start when there are more."""

MIN_SCORE = 0.3
"""Detections below it are not looked at, in pictures and in tables of what was found."""

_MIN_WIDTH = 320
_MAX_WIDTH = 640
_MAX_HEIGHT = 2560
_GAP = 4
_STRIP_COLOUR = "#202020"


class Panel(NamedTuple):
    """What is drawn over one copy of the image.

    Attributes:
        title: Shown above, with the number of boxes.
        boxes: (M, 4) xyxy in pixels of the image.
        labels: (M,) indices into the class names.
        scores: (M,) in [0, 1]; None for ground truth, which has no scores.
    """

    title: str
    boxes: npt.ArrayLike
    labels: npt.ArrayLike
    scores: npt.ArrayLike | None = None


def side_by_side(
    image: npt.NDArray[np.uint8], panels: Sequence[Panel], classes: Sequence[str], min_score: float = MIN_SCORE
) -> Image.Image:
    """Draw each panel's boxes over a copy of the image, the copies in one row.

    Panels are 320 to 640 pixels wide: smaller images are enlarged, larger ones reduced. No panel is higher than 2560
    pixels; those of very tall images are narrower for it.

    Args:
        image: (H, W, 3) RGB.
        panels: From left to right, for instance ground truth, student, teacher.
        classes: The class names.
        min_score: Detections below it are left out.
    """
    height, width = image.shape[:2]
    scale = min(min(max(width, _MIN_WIDTH), _MAX_WIDTH) / width, _MAX_HEIGHT / height)
    base = Image.fromarray(image)
    if scale != 1:
        base = base.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BICUBIC)
    drawn = [_draw_panel(base, panel, classes, min_score, scale) for panel in panels]

    row = Image.new("RGB", (sum(part.width + _GAP for part in drawn) - _GAP, drawn[0].height), "white")
    left = 0
    for part in drawn:
        row.paste(part, (left, 0))
        left += part.width + _GAP
    return row


def words(text: str) -> Image.Image:
    """A small picture of a line of text, where there is nothing to draw."""
    font = ImageFont.load_default(14)
    left, top, right, bottom = font.getbbox(text)
    picture = Image.new("RGB", (round(right - left) + 24, round(bottom - top) + 24), _STRIP_COLOUR)
    ImageDraw.Draw(picture).text((12, picture.height / 2), text, "white", font, anchor="lm")
    return picture


def _draw_panel(base: Image.Image, panel: Panel, classes: Sequence[str], min_score: float, scale: float) -> Image.Image:
    font_size = 11 if base.width < 480 else 14
    font = ImageFont.load_default(font_size)
    strip = font_size + 9
    picture = base.copy()
    draw = ImageDraw.Draw(picture)
    shown = _shown(panel, min_score)
    # All boxes before all names, the best detections last: names stay readable in a crowd.
    for box, label, _ in shown:
        draw.rectangle([x * scale for x in box], outline=PALETTE[label % len(PALETTE)], width=2)
    for box, label, score in shown:
        name = classes[label] if score is None else f"{classes[label]} {score:.2f}"
        _draw_name(draw, name, (box[0] * scale, box[1] * scale), PALETTE[label % len(PALETTE)], font)

    with_title = Image.new("RGB", (base.width, strip + base.height), _STRIP_COLOUR)
    with_title.paste(picture, (0, strip))
    title = f"{panel.title} ({len(shown)})"
    ImageDraw.Draw(with_title).text((6, strip / 2), title, "white", font, anchor="lm")
    return with_title


def _shown(panel: Panel, min_score: float) -> list[tuple[list[float], int, float | None]]:
    """(box, label, score) of what is drawn, in order of scores. Boxes that cannot be drawn are left out."""
    boxes = np.asarray(panel.boxes, dtype=np.float64).reshape(-1, 4)
    labels = np.asarray(panel.labels, dtype=np.int64).tolist()
    drawable = np.isfinite(boxes).all(1) & (boxes[:, 2:] >= boxes[:, :2]).all(1)
    if panel.scores is None:
        return [(boxes[i].tolist(), labels[i], None) for i in np.flatnonzero(drawable)]
    scores = np.asarray(panel.scores, dtype=np.float64)
    drawable &= scores >= min_score
    order = [i for i in np.argsort(scores, kind="stable") if drawable[i]]
    return [(boxes[i].tolist(), labels[i], float(scores[i])) for i in order]


def _draw_name(
    draw: ImageDraw.ImageDraw,
    name: str,
    corner: tuple[float, float],
    colour: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Write a name on its colour: over the box's upper edge, inside of the box where there is no room."""
    _, _, width, height = draw.textbbox((0, 0), name, font)
    # Boxes may reach over the image's edges; their names may not.
    x = max(0, min(corner[0], draw.im.size[0] - width - 4))
    y = max(0, corner[1] - height - 2 if corner[1] >= height + 2 else corner[1])
    draw.rectangle([x, y, x + width + 3, y + height + 2], fill=colour)
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    is_bright = 0.299 * red + 0.587 * green + 0.114 * blue > 140
    draw.text((x + 2, y), name, "black" if is_bright else "white", font)
