"""A search space: dotted keys of the schema, each with a distribution that its values are drawn from.

A distribution is written as a mapping of one kind to its list: `{loguniform: [0.1, 10]}`, and may say when it counts:
`{when: {model.student.offsets: [analytic_learned]}, uniform: [0, 1]}`. The schema of experiments is built on this
module, so it knows nothing of experiments.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Distribution = Mapping[str, Any]

KINDS = ("uniform", "loguniform", "normal", "int", "choice")
WHEN = "when"

MAX_GRID_INT = 10
"""A grid takes whole numbers that are no more than so many."""
MAX_GRID = 10_000
"""Combinations of a grid; more are a mistake in writing."""

MAX_SDS = 3
"""Normal values are no further off their mean than so many standard deviations, so that the outermost ones can be
checked beforehand."""

# Enough to tell trials apart; more digits could not be read in a table.
_SIGNIFICANT_DIGITS = 4


def check_distribution(written: object) -> dict[str, Any]:
    """Give the distribution back if it is one.

    Raises:
        ValueError: it is of no known kind, its values do not fit the kind, or its condition is none.
    """
    kinds = [name for name in written if name != WHEN] if isinstance(written, dict) else []
    if not (isinstance(written, dict) and len(kinds) == 1 and kinds[0] in KINDS):
        raise ValueError(f"found {_show(written)}, expected one of {', '.join(KINDS)}, such as {{uniform: [0, 1]}}")
    kind = kinds[0]
    checked = {kind: _checked(kind, written[kind])}
    if WHEN not in written:
        return checked
    when = dict(_conditions(written[WHEN])) if isinstance(written[WHEN], dict) else {}
    if not (when and all(isinstance(values, list) and values for values in when.values())):
        raise ValueError(f"when: found {_show(written[WHEN])}, expected other keys, each with a list of its values")
    return {WHEN: when, **checked}


def _checked(kind: str, values: Any) -> list[Any]:
    if kind == "choice":
        if not (isinstance(values, list) and values):
            raise ValueError(f"choice: found {_show(values)}, expected a list of values")
        return values
    number = int if kind == "int" else (int, float)
    names = "[mean, sd]" if kind == "normal" else "[low, high]"
    if not (
        isinstance(values, list)
        and len(values) == 2
        and all(isinstance(v, number) and not isinstance(v, bool) and math.isfinite(v) for v in values)
        and (kind == "normal" or values[0] < values[1])
    ):
        numbers = "whole numbers" if kind == "int" else "numbers"
        raise ValueError(f"{kind}: found {_show(values)}, expected two {numbers}, {names}")
    if kind == "loguniform" and values[0] <= 0:
        raise ValueError(f"loguniform: found {_show(values)}, expected a low end above 0")
    if kind == "normal" and values[1] <= 0:
        raise ValueError(f"normal: found {_show(values)}, expected a standard deviation above 0")
    return values


def mistakes_between(space: Mapping[str, Distribution], algorithm: str) -> Iterator[tuple[str, str]]:
    """What is wrong with keys of a space in view of its other keys and of the algorithm: pairs of key and message."""
    for key, distribution in space.items():
        kind, values = kind_of(distribution)
        endless = kind != "choice" and not (kind == "int" and len(_points(distribution)) <= MAX_GRID_INT)
        if algorithm == "grid" and endless:
            expected = f"choice, or int of at most {MAX_GRID_INT} values"
            yield key, f"{kind}: found {_show(values)} in a grid, expected {expected}"
            continue
        for other, allowed in distribution.get(WHEN, {}).items():
            if other not in space:
                yield key, f"when: found {other}, expected a key that is searched too"
                continue
            known = kind_of(space[other])[0] in ("choice", "int")
            strange = [value for value in allowed if not (known and value in _points(space[other]))]
            if strange:
                searched = describe({k: v for k, v in space[other].items() if k != WHEN})
                yield key, f"when: {other} is never {_show(strange[0])}: found {searched}, expected one of its values"
        circle = _circle(space, key)
        if circle and key == next(each for each in space if each in circle):
            yield key, f"when: found a circle, {' -> '.join([*circle, key])}; expected conditions that end"
    size = math.prod(len(_points(d)) for d in space.values()) if algorithm == "grid" else 0
    if size > MAX_GRID:
        yield next(iter(space)), f"found a grid of {size} combinations, expected at most {MAX_GRID}"


def kind_of(distribution: Distribution) -> tuple[str, list[Any]]:
    """The kind of a distribution, and its list."""
    ((kind, values),) = ((name, value) for name, value in distribution.items() if name != WHEN)
    return kind, values


def describe(distribution: Distribution) -> str:
    """A distribution in words."""
    kind, values = kind_of(distribution)
    when = [f"{key} is {' or '.join(map(_show, allowed))}" for key, allowed in distribution.get(WHEN, {}).items()]
    return f"{kind} {_show(values)}" + (f" when {' and '.join(when)}" if when else "")


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
    kind, values = kind_of(distribution)
    if kind == "normal":
        mean, sd = values
        return [mean - MAX_SDS * float(sd), mean + MAX_SDS * float(sd)]
    return values if kind in ("choice", "int") else [float(value) for value in values]


def conditions(space: Mapping[str, Distribution], key: str) -> dict[str, Any]:
    """Values of other keys with which a key is searched: the first that its conditions allow, and those of theirs."""
    found: dict[str, Any] = {}
    for other, allowed in space[key].get(WHEN, {}).items():
        found |= {**conditions(space, other), other: allowed[0]}
    return found


def draw(space: Mapping[str, Distribution], seed: int, number: int) -> dict[str, Any]:
    """The values of one trial: a function of the seed and of the trial's number, whatever else is drawn."""
    # A generator for each key: a key that is added or changed leaves the others' values as they are.
    return within_conditions(space, lambda key, d: _draw(d, random.Random(f"{seed} {number} {key}")))


def grid(space: Mapping[str, Distribution]) -> list[dict[str, Any]]:
    """Every combination of a space of choices once, in the order of the file, the last key's values in turn first."""
    found: dict[str, dict[str, Any]] = {}
    for combination in itertools.product(*map(_points, space.values())):
        values = _at(space, dict(zip(space, combination, strict=True)))
        found.setdefault(_show(values), values)
    return list(found.values())


def within_conditions(space: Mapping[str, Distribution], give: Callable[[str, Distribution], Any]) -> dict[str, Any]:
    """The values of one trial: of the keys whose conditions hold, each asked for once, after those it depends on."""
    known: dict[str, Any] = {}

    def value(key: str) -> Any:
        if key not in known:
            known[key] = give(key, space[key])
        return known[key]

    def holds(key: str) -> bool:
        conditions = space[key].get(WHEN, {})
        return all(holds(other) and value(other) in allowed for other, allowed in conditions.items())

    return {key: value(key) for key in space if holds(key)}


def rounded(distribution: Distribution, value: float) -> float:
    """A value of a range with a few digits, and not beyond its ends."""
    low, high = map(float, extremes(distribution))
    return min(max(float(f"{value:.{_SIGNIFICANT_DIGITS}g}"), low), high)


def _at(space: Mapping[str, Distribution], point: Mapping[str, Any]) -> dict[str, Any]:
    return within_conditions(space, lambda key, _: point[key])


def _points(distribution: Distribution) -> Sequence[Any]:
    kind, values = kind_of(distribution)
    return range(values[0], values[1] + 1) if kind == "int" else values


def _circle(space: Mapping[str, Distribution], key: str) -> list[str]:
    """The keys by which a key depends on itself, itself first; empty where it does not."""
    paths = [[key]]
    seen = set()
    while paths:
        path = paths.pop()
        for other in space[path[-1]].get(WHEN, {}):
            if other == key:
                return path
            if other in space and other not in seen:
                seen.add(other)
                paths.append([*path, other])
    return []


def _draw(distribution: Distribution, generator: random.Random) -> Any:
    kind, values = kind_of(distribution)
    if kind == "choice":
        return generator.choice(values)
    low, high = extremes(distribution)
    if kind == "int":
        return generator.randint(low, high)
    if kind == "uniform":
        value = generator.uniform(low, high)
    elif kind == "normal":
        value = math.inf
        while not low <= value <= high:
            value = generator.gauss(*values)
    else:
        value = math.exp(generator.uniform(math.log(low), math.log(high)))
    return rounded(distribution, value)


def _leaves(space: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in space.items():
        if isinstance(value, dict) and value and WHEN not in value and all(isinstance(v, dict) for v in value.values()):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _conditions(when: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in when.items():
        if isinstance(value, dict) and value:
            yield from _conditions(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _show(written: object) -> str:
    return json.dumps(written, ensure_ascii=False)
