"""An annotation file as a tree of JSON: read whole, where the memory holds it, and of it what COCO's format needs."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict

import msgspec
import psutil

from mimiclab.errors import UserError

# Memory that parsing and the columns need, in sizes of the file. Measured: 2.7 with COCO's polygons, 7.5 without, 9.8
# for images alone with names beyond ASCII; where the standard module has to parse, 7.2 to 8.8 with polygons.
_MEMORY_FACTOR = 10
_GIB = 1 << 30
# Where a container sees its own limits (control groups, version 2).
_CGROUP = Path("/sys/fs/cgroup")


class _Image(TypedDict, total=False):
    id: Any
    file_name: Any
    width: Any
    height: Any


class _Category(TypedDict, total=False):
    id: Any
    name: Any


class _Annotation(TypedDict, total=False):
    id: Any
    image_id: Any
    category_id: Any
    bbox: Any
    area: Any
    iscrowd: Any


class _File(TypedDict, total=False):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Annotation]


# Other keys are passed over, polygons above all, which are nine tenths of COCO's files.
_DECODER = msgspec.json.Decoder(_File)


@contextmanager
def without_collector() -> Iterator[None]:
    """Keep Python's cycle collector out of parsing: it would go over all of the growing tree again and again.

    With it, parsing takes 2 to 3 times as long. A tree of JSON has no cycles; it is freed as the last name goes.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_json(path: Path) -> bytes:
    """The bytes of a file that is to be parsed.

    Raises:
        UserError: It cannot be read, or parsing it would take more memory than there is.
    """
    try:
        size, available = path.stat().st_size, _available()
        if size * _MEMORY_FACTOR > available:
            raise UserError(
                f"{path}: {_gib(size)} of annotations are too much for the memory: reading them takes about "
                f"{_gib(size * _MEMORY_FACTOR)}, {_gib(available)} are available"
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such annotation file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read as an annotation file: {error.strerror}") from error


def parse_json(path: Path, content: bytes) -> dict[str, Any]:
    """The object that a file holds, where it is of COCO's form with the keys of COCO's format only.

    Raises:
        UserError: It is no JSON object.
    """
    with suppress(ValueError, RecursionError):
        return dict(_DECODER.decode(content))
    # The standard module takes what is no JSON by the letter, as NaN, and finds whose fault it is.
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError) as error:  # JSON's and Unicode's errors are both ValueErrors
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not COCO's format: expected an object on top, found {kind_of(tree)}")
    return tree


def _available() -> int:
    """Free memory in bytes: the machine's, or what a container's limit leaves if that is less."""
    machine = int(psutil.virtual_memory().available)
    try:
        limit, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # Cached files count as used, and make room when it is asked for.
        return min(machine, limit - used + int(stat["inactive_file"]))
    except (OSError, ValueError, KeyError):  # of no container, or one without a limit, which reads "max"
        return machine


def _gib(size: float) -> str:
    return f"{size / _GIB:.3g} GiB"


def list_of(path: Path, content: dict[str, Any], key: str) -> list[Any]:
    """The list `key` of the file's object; a UserError where there is none."""
    if key not in content:
        raise UserError(f"{path}: not COCO's format: the file has no key {key!r}")
    value = content[key]
    if not isinstance(value, list):
        raise UserError(f"{path}: not COCO's format: {key} should be a list, found {kind_of(value)}")
    return value


def float_of(number: float) -> float:
    """A number as a float; JSON's integers have no bound, and what is too large is infinite."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def kind_of(value: Any) -> str:
    """What a value is, in words for a message."""
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return names.get(type(value), f"{value!r:.80}")
