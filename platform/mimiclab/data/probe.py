"""What an image file is: read once, decoded once, and forgotten."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError

from mimiclab.data.limits import IMAGE_SUFFIXES

# Images that wait for a thread at a time; progress is told as often.
_CHUNK = 128
_DEEP_MODES = ("I", "F")


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What was found in an image file.

    Attributes:
        digest: sha256 of the file's bytes; None where there is no file.
        problem: Why it cannot be decoded to RGB; what follows tells nothing then.
        size: Width and height as training reads it, without turning it by its EXIF orientation.
        orientation: EXIF's orientation, 1 is upright.
        one_channel: Gray levels only.
        cmyk: In the colours of print.
        alpha: With transparency.
        deep: More than 8 bits a channel.
    """

    digest: bytes | None = None
    problem: str | None = None
    size: tuple[int, int] = (0, 0)
    orientation: int = 1
    one_channel: bool = False
    cmyk: bool = False
    alpha: bool = False
    deep: bool = False


def probe_images(paths: Sequence[Path], advance: Callable[[int], object]) -> list[ImageFacts]:
    """Probe files in threads, one image a thread at a time; decoding, hashing and reading all release the GIL.

    Args:
        paths: The files.
        advance: Gets how many more are done, from time to time.
    """
    facts: list[ImageFacts] = []
    threads = ThreadPoolExecutor()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's name no file
            for start in range(0, len(paths), _CHUNK):
                chunk = paths[start : start + _CHUNK]
                facts += threads.map(probe_image, chunk)
                advance(len(chunk))
    finally:
        threads.shutdown(cancel_futures=True)
    return facts


def probe_image(path: Path) -> ImageFacts:
    """Read, hash and decode one file."""
    try:
        if not path.is_file():  # raises what is neither there nor missing, such as a name too long
            return ImageFacts()
        content = path.read_bytes()
    except OSError as error:
        return ImageFacts(problem=error.strerror)
    digest = hashlib.sha256(content).digest()
    try:
        with Image.open(io.BytesIO(content)) as image:
            return _decode(image, digest)
    except UnidentifiedImageError:
        return ImageFacts(digest, problem="of no known format" if content else "the file is empty")
    except Exception as error:  # what a decoder raises for damaged bytes is open-ended
        return ImageFacts(digest, problem=str(error) or type(error).__name__)


def _decode(image: Image.Image, digest: bytes) -> ImageFacts:
    size = image.size
    deep = image.mode.partition(";")[0] in _DEEP_MODES or any(";16" in str(tile) for tile in getattr(image, "tile", ()))
    # JPEG can leave out most of the inverse transform: every byte of the file is still decoded, in less time.
    shrunk = image.draft(None, (1, 1))
    image.load()
    mode, bands = image.mode, image.getbands()
    alpha = "A" in bands or "transparency" in image.info
    if mode != "RGB":
        image.convert("RGB")  # as training does; some modes cannot
    return ImageFacts(
        digest,
        size=size if shrunk else image.size,  # TIFF turns itself upright as it loads
        orientation=_orientation(image),
        one_channel=len([band for band in bands if band != "A"]) == 1 and not mode.startswith("P"),
        cmyk=mode == "CMYK",
        alpha=alpha,
        deep=deep,
    )


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF keeps nobody from reading the pixels
        return 1
    return value if isinstance(value, int) and 2 <= value <= 8 else 1


def image_files(folder: Path) -> list[str]:
    """All files below a folder whose name is like an image's, relative to it and sorted."""
    return sorted(
        os.path.relpath(os.path.join(parent, name), folder)  # noqa: PTH118 - Path is slow for 100,000 files
        for parent, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("._")
    )
