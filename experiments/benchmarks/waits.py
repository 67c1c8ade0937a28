"""What makes the host wait for a GPU's results, counted on any device by torch's dispatch.

These are operators whose outcome Python or an output's shape needs, and numbers that are made on the host and copied
(`lift_fresh` is torch's name for them). Moves between devices, as of images and targets, are not among them.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mimicdet

# Operators that copy a number to the host, or whose output is as long as the data says.
WAITS = (
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "lift_fresh",
    "masked_select",
    "nms",
    "nonzero",
    "unique_dim",
)
Waits = Counter[tuple[str, str]]


class _Operators(TorchDispatchMode):
    """Counts the operators of WAITS, and lookups by a mask, by the line of the package that calls them."""

    def __init__(self, counted: Waits) -> None:
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = (
            [index for index in args[1] if index is not None] if name in ("index", "index_put", "index_put_") else []
        )
        if name in WAITS or any(isinstance(mask, Tensor) and mask.dtype == torch.bool for mask in masks):
            self.counted[name, _caller()] += 1
        return func(*args, **(kwargs or {}))


class _Lists(TorchFunctionMode):
    """Counts calls of `tolist`, which is no operator."""

    def __init__(self, counted: Waits) -> None:
        super().__init__()
        self.counted = counted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:
            self.counted["tolist", _caller()] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def count_waits() -> Iterator[Waits]:
    """Count, by operator and calling line, what waits for a GPU's results."""
    counted: Waits = Counter()
    with _Operators(counted), _Lists(counted):
        yield counted


def _caller() -> str:
    package = str(Path(mimicdet.__file__).parent)
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(package):
            return f"{Path(frame.filename).name}: {frame.line}"
    return "outside of mimicdet"
