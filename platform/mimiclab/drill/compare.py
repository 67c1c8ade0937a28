"""What differs between two runs of one experiment: their histories, their last checkpoints."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mimiclab.checkpoint import Checkpoint
from mimiclab.tracking.client import connect
from mimiclab.tracking.protocol import is_measured

History = Mapping[str, Sequence[tuple[int, float]]]
"""(step, value) of every row of each series, in order."""

FROM_THE_STEP = ("train/lr", "epoch")
"""Series that are a function of the step alone, whatever the number of workers."""


@dataclass(frozen=True)
class Difference:
    """How the history of a series differs from the expected one."""

    series: str
    missing: tuple[int, ...] = ()
    """Steps that it lacks."""
    duplicate: tuple[int, ...] = ()
    """Steps that it has more than once."""
    extra: tuple[int, ...] = ()
    """Steps that it should not have."""
    differing: tuple[int, ...] = ()
    """Steps with another value."""

    def __str__(self) -> str:
        parts = (
            ("missing", self.missing),
            ("twice", self.duplicate),
            ("not expected", self.extra),
            ("differing", self.differing),
        )
        return f"{self.series}: " + "; ".join(f"{_listed(steps)} {what}" for what, steps in parts if steps)


@dataclass(frozen=True)
class TensorDifference:
    """How sets of tensors and values differ."""

    differing: tuple[str, ...]
    """Names of those that are not the same to the last bit, or that one set lacks."""
    largest: float
    """Largest absolute difference between numbers of the same place; NaN where one of them is, and not the other."""


def read_history(tracking: str, mlflow_run_id: str) -> dict[str, list[tuple[int, float]]]:
    """All metrics of a run but what depends on the time, or on its restarts."""
    client = connect(tracking)
    keys = sorted(client.get_run(mlflow_run_id).data.metrics)
    return {
        key: [(row.step, row.value) for row in client.get_metric_history(mlflow_run_id, key)]
        for key in keys
        if not is_measured(key)
    }


def compare_histories(expected: History, found: History, same_value: Callable[[str], bool]) -> list[Difference]:
    """The series that differ.

    Args:
        expected: each step once.
        found: rows in any order.
        same_value: says of which series values are compared, and not steps alone.
    """
    differences = []
    for series in sorted(expected.keys() | found.keys()):
        wanted, rows = dict(expected.get(series, ())), found.get(series, ())
        counts = Counter(step for step, _ in rows)
        differing = (step for step, value in rows if step in wanted and not _same(value, wanted[step]))
        difference = Difference(
            series,
            missing=tuple(sorted(wanted.keys() - counts.keys())),
            duplicate=tuple(sorted(step for step, count in counts.items() if count > 1)),
            extra=tuple(sorted(counts.keys() - wanted.keys())),
            differing=tuple(sorted(set(differing))) if same_value(series) else (),
        )
        if difference != Difference(series):
            differences.append(difference)
    return differences


def compare_tensors(expected: Mapping[str, Any], found: Mapping[str, Any]) -> TensorDifference:
    """Compare tensors and plain values, in dicts and lists nested as they like, bit for bit."""
    ours, theirs = dict(_leaves(expected)), dict(_leaves(found))
    differing, largest = list[str](), 0.0
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            differing.append(name)
        elif not _equal(ours[name], theirs[name]):
            differing.append(name)
            distance = _distance(ours[name], theirs[name])
            largest = distance if math.isnan(distance) or distance > largest else largest
    return TensorDifference(tuple(differing), largest)


def compare_checkpoints(expected: Checkpoint, found: Checkpoint) -> tuple[TensorDifference, TensorDifference]:
    """How weights differ, and how optimizer and whatever else the next step would depend on."""
    return (
        compare_tensors(expected.weights(), found.weights()),
        compare_tensors(expected.state(), found.state()),
    )


def compare_metrics(expected: Mapping[str, float], found: Mapping[str, float]) -> dict[str, float]:
    """`found` minus `expected` of each head's AP; NaN where one of them is missing."""
    names = sorted(name for name in expected.keys() | found.keys() if name.endswith("/AP") and name.count("/") == 1)
    heads = [name for name in names if not name.startswith("gap/")]
    return {name: found.get(name, math.nan) - expected.get(name, math.nan) for name in heads}


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _leaves(each, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value):
            yield from _leaves(each, f"{name}.{number}")
    else:
        yield name, value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
    return type(a) is type(b) and bool(a == b)


def _bits(tensor: Tensor) -> Tensor:
    # As numbers, NaN would differ from itself, and -0 equal 0.
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _distance(a: Any, b: Any) -> float:
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
        return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    return abs(a - b) if isinstance(a, int | float) and isinstance(b, int | float) else math.nan


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def _listed(steps: Sequence[int]) -> str:
    more = f" and {len(steps) - 5} more" if len(steps) > 5 else ""
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps[:5]))}{more}"
