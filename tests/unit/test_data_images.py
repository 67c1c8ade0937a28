"""Decoding: the same pixels whichever decoder, and a message for what cannot be decoded."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimiclab.data import images
from mimiclab.data.images import decode
from mimiclab.errors import UserError

DATA = Path(os.environ.get("MIMICLAB_DATA", Path(__file__).parents[3] / "shared" / "data"))
PIXELS = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)


def encoded(mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(buffer, **{"format": "JPEG", **options})
    return buffer.getvalue()


def by_pillow(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.array(image.convert("RGB"))


def exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


JPEGS = {
    "plain": encoded(quality=90),
    "coarse": encoded(quality=5),
    "4:4:4": encoded(subsampling=0),
    "4:2:2": encoded(subsampling=1),
    "4:2:0": encoded(subsampling=2),
    "progressive": encoded(progressive=True),
    "stored as RGB": encoded(keep_rgb=True),
    "rotated by EXIF": encoded(exif=exif(6)),
    "grey": encoded("L"),
    "CMYK": encoded("CMYK"),
    "with bytes behind its end": encoded() + b"and more",
}


@pytest.mark.parametrize("name", JPEGS)
def test_jpegs_have_pillows_pixels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = decode(JPEGS[name], "x")
    assert (pixels.shape, pixels.dtype) == (PIXELS.shape, np.uint8)
    np.testing.assert_array_equal(pixels, by_pillow(JPEGS[name]))
    monkeypatch.setattr(images, "decode_jpeg", None)
    np.testing.assert_array_equal(decode(JPEGS[name], "x"), pixels)


def test_photographs_have_pillows_pixels() -> None:
    files = sorted((DATA / "bccd" / "val").glob("*.jpg"))[::4]
    if not files:
        pytest.skip(f"needs the bccd data set in {DATA} (set MIMICLAB_DATA)")
    for file in files:
        np.testing.assert_array_equal(decode(file.read_bytes(), file.name), by_pillow(file.read_bytes()))


def test_colour_jpegs_take_the_fast_way(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    fast = images.decode_jpeg
    monkeypatch.setattr(images, "decode_jpeg", lambda *args: taken.append(args) or fast(*args))
    for name in ("plain", "progressive", "grey", "CMYK"):
        decode(JPEGS[name], "x")
    decode(encoded(format="PNG"), "x")
    assert [args[0] for args in taken] == [JPEGS["plain"], JPEGS["progressive"]]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its content is of no known format"),
        (b"text", "its content is of no known format"),
        (JPEGS["plain"][:900], "truncated"),
        (JPEGS["progressive"][:900], "truncated"),
        (JPEGS["grey"][:900], "truncated"),
        (encoded(format="PNG")[:900], "truncated"),
    ],
)
def test_what_cannot_be_decoded_is_named(
    content: bytes, message: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fast:
        monkeypatch.setattr(images, "decode_jpeg", None)
    with pytest.raises(UserError, match=f"^a/b.jpg: cannot be read as an image: .*{message}"):
        decode(content, "a/b.jpg")
