"""Encoded images to pixels, in one place."""

from __future__ import annotations

import contextlib
import io
from typing import cast

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from mimiclab.errors import UserError

try:
    from simplejpeg import decode_jpeg
except ImportError:
    decode_jpeg = None

# Pillow knows every format; colour JPEGs go to simplejpeg where it is installed, which gives the same pixels (both
# are libjpeg-turbo) in two thirds of the time, since it decodes straight into three bytes per pixel: 0.52 ms for one
# of BCCD's 640 x 480 photographs instead of 0.79. torchvision.io is as fast as that, but since 0.29 it warns at every
# call that its decoders are deprecated and will be removed; their successor, TorchCodec, has to match the version of
# torch.


def decode(encoded: bytes, where: str) -> npt.NDArray[np.uint8]:
    """Decode an image to RGB, in its stored orientation: that is what COCO's boxes refer to, so EXIF is ignored.

    Args:
        encoded: The bytes of the file.
        where: What messages call the image.

    Returns:
        (H, W, 3) uint8.

    Raises:
        UserError: It cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if decode_jpeg and image.format == "JPEG" and image.mode == "RGB":
                with contextlib.suppress(ValueError):  # it is stricter; what is damaged Pillow has to say
                    return cast(npt.NDArray[np.uint8], decode_jpeg(encoded, "RGB"))
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise UserError(f"{where}: cannot be read as an image: its content is of no known format") from error
    # What Pillow raises for a damaged file depends on its format.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: cannot be read as an image: {error}") from error


def check_size(width: int, height: int, expected: tuple[int, int], where: str) -> None:
    """Compare an image's true size with the (width, height) that its annotation file states.

    Raises:
        UserError: They differ.
    """
    if (width, height) != expected:
        raise UserError(
            f"{where}: the image is {width} x {height}, its annotation file says {expected[0]} x {expected[1]}"
        )
