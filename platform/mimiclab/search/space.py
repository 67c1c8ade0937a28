"""A search space: dotted keys of the schema, each with a distribution that its values are drawn from.

A distribution is written as a mapping of one kind to its list: `{loguniform: [0.1, 10]}`. The schema of
experiments is built on this module, so it knows nothing of experiments.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

Distribution = Mapping[str, list[Any]]

KINDS = ("uniform", "loguniform", "int", "choice")

# Enough to tell trials apart; more digits could not be read in a table.
_SIGNIFICANT_DIGITS = 4


def check_distribution(written: object) -> dict[str, list[Any]]:
    """Give the distribution back if it is one.

    Raises:
        ValueError: it is of no known kind, or its values do not fit the kind.
    """
    if not (isinstance(written, dict) and len(written) == 1 and next(iter(written)) in KINDS):
        raise ValueError(f"found {_show(written)}, expected one of {', '.join(KINDS)}, such as {{uniform: [0, 1]}}")
    ((kind, values),) = written.items()
    if kind == "choice":
        if not (isinstance(values, list) and values):
            raise ValueError(f"choice: found {_show(values)}, expected a list of values")
        return {kind: values}
    number = int if kind == "int" else (int, float)
    if not (
        isinstance(values, list)
        and len(values) == 2
        and all(isinstance(v, number) and not isinstance(v, bool) and math.isfinite(v) for v in values)
        and values[0] < values[1]
    ):
        numbers = "whole numbers" if kind == "int" else "numbers"
        raise ValueError(f"{kind}: found {_show(values)}, expected two {numbers}, [low, high]")
    if kind == "loguniform" and values[0] <= 0:
        raise ValueError(f"loguniform: found {_show(values)}, expected a low end above 0")
    return {kind: values}


def with_dotted_keys(space: object) -> dict[str, Any]:
    """Write a space with one dotted key for each distribution, however its keys were nested.

    A file holds dotted keys; `--set search.space.optim.lr=...` adds a nested one, which comes later and wins.

    Raises:
        ValueError: there is no key to search over.
    """
    if not (isinstance(space, dict) and space):
        found = "no keys" if space == {} else _show(space)
        raise ValueError(f"found {found}, expected dotted keys, such as model.mimic.cls_weight: {{uniform: [0, 1]}}")
    return dict(_leaves(space, ""))


def extremes(distribution: Distribution) -> list[Any]:
    """The values to try before a search starts: both ends of a range, every choice."""
    ((kind, values),) = distribution.items()
    return values if kind in ("choice", "int") else [float(value) for value in values]


def draw(space: Mapping[str, Distribution], seed: int, number: int) -> dict[str, Any]:
    """The values of one trial: a function of the seed and of the trial's number, whatever else is drawn."""
    # A generator for each key: a key that is added or changed leaves the others' values as they are.
    return {key: _draw(space[key], random.Random(f"{seed} {number} {key}")) for key in space}


def _draw(distribution: Distribution, generator: random.Random) -> Any:
    ((kind, values),) = distribution.items()
    if kind == "choice":
        return generator.choice(values)
    low, high = values
    if kind == "int":
        return generator.randint(low, high)
    if kind == "uniform":
        value = generator.uniform(low, high)
    else:
        value = math.exp(generator.uniform(math.log(low), math.log(high)))
    return min(max(float(f"{value:.{_SIGNIFICANT_DIGITS}g}"), float(low)), float(high))


def _leaves(space: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in space.items():
        if isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _show(written: object) -> str:
    return json.dumps(written, ensure_ascii=False)
