"""An experiment: read from its file, overridden, checked as a whole, written out, told apart from others."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mimiclab.errors import UserError
from mimiclab.layers import OVERRIDE, Key, dump, merge, origins, parse_override, plain, read
from mimiclab.mistakes import in_words
from mimiclab.schema import PATH_KEYS, Experiment, known_keys
from mimiclab.search.space import Distribution, conditions, extremes

if TYPE_CHECKING:
    from rich.text import Text

DEFAULT = "default"

DEFAULTS_VERSION = 1
"""To be raised when a default changes: what is left to it then is another run."""

_NONE = object()

# These change how fast, where and how long, and what is kept or shown, but not which run it is.
_NOT_IDENTITY = (
    *("scale.", "where.", "search", "checkpoint."),
    *("optim.epochs", "data.loader_processes", "data.cache", "eval.num_pictures"),
)


@dataclass(frozen=True)
class LoadedExperiment:
    """An experiment and where each of its values was written."""

    experiment: Experiment
    origins: dict[str, str]
    """Of every dotted key: "file:line", "--set" or "default"."""
    path: Path
    tree: dict[str, Any] = field(repr=False)
    """What was written, before defaults and `$VARIABLES` were filled in."""
    environ: Mapping[str, str] = field(repr=False)


def load_experiment(
    path: str | Path, overrides: Sequence[str] = (), environ: Mapping[str, str] = os.environ
) -> LoadedExperiment:
    """Read and validate an experiment file.

    Args:
        path: the YAML file.
        overrides: `dotted.key=value`, each laid over the file in turn; the value is YAML.
        environ: where `$VARIABLES` in paths are looked up.

    Raises:
        UserError: anything in the file or the overrides is wrong; the message lists every mistake found,
            each with file and line, key, what was found and what was expected.
    """
    path = Path(path)
    node = read(path)
    for override in overrides:
        node = merge(node, parse_override(override))
    tree = plain(node)
    # Split at every dot: a search space has dotted keys in a file, and nested ones where they come from --set.
    written = {_split(key): origin for key, origin in origins(node)}
    experiment, mistakes = _validate(tree, environ)
    if experiment is not None and experiment.search is not None:
        mistakes += _space_mistakes(experiment.search.space, tree, environ)
    found = [f"{_origin(_split(key), written, path)}: {mistake}" for key, mistake in mistakes]
    if len(found) > 1:
        raise UserError("\n  ".join([f"{path}: {len(found)} mistakes", *found]))
    if found or experiment is None:
        raise UserError(found[0])
    leaves = flatten(experiment)
    return LoadedExperiment(
        experiment=experiment,
        origins={key: written.get(tuple(key.split(".")), DEFAULT) for key in leaves},
        path=path,
        tree=tree,
        environ=environ,
    )


def vary(loaded: LoadedExperiment, name: str, values: Mapping[str, Any]) -> Experiment:
    """Give the experiment that a file would describe with another name, some dotted keys changed, and no search.

    Raises:
        UserError: it would not be a valid experiment.
    """
    experiment, mistakes = _validate(_varied(loaded.tree, {"name": name, **values}), loaded.environ)
    if experiment is None:
        raise UserError("; ".join(mistake for _, mistake in mistakes))
    return experiment


def flatten(experiment: Experiment) -> dict[str, Any]:
    """Give every value of an experiment under its dotted key, in the order of the schema."""
    return dict(_leaves(_tree(experiment), ""))


def resolved_yaml(experiment: Experiment) -> str:
    """Write an experiment out in full; loading it gives an equal experiment in any environment."""
    tree = _tree(experiment)
    for section, key in _paths(tree):
        section[key[-1]] = section[key[-1]].replace("$", "$$")
    return dump(tree)


def identity(experiment: Experiment) -> str:
    """Hash what a run computes: 12 hex digits over all but `scale:`, `where:` and `optim.epochs`.

    Defaults do not count, so that a key that the schema gains later changes no run that does not use it.
    """
    usual = defaults()
    leaves = {key: value for key, value in _identity_leaves(experiment).items() if usual.get(key, _NONE) != value}
    canonical = json.dumps([DEFAULTS_VERSION, leaves], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


@cache
def defaults() -> dict[str, Any]:
    """Every key that has a default, with it; those of `backbone` are for a random start."""
    shortest = {"name": "x", "data": {"scenes": {}}}
    return {key: value for key, value in flatten(Experiment.model_validate(shortest)).items() if key != "name"}


def differences(a: Experiment, b: Experiment) -> list[str]:
    """List the keys in which the identities of two experiments differ, each as `key: a -> b`."""
    old, new = _identity_leaves(a), _identity_leaves(b)
    return [
        f"{key}: {_show(old, key)} -> {_show(new, key)}" for key in {**old, **new} if _show(old, key) != _show(new, key)
    ]


def render(loaded: LoadedExperiment) -> Text:
    """Show every key with its value and origin, one per line; styled, plain where that is not seen."""
    from rich.text import Text

    leaves = flatten(loaded.experiment)
    lines = {key: f"{key} = {_show(leaves, key)}" for key in leaves}
    width = max(len(line) for line in lines.values() if len(line) < 80)
    text = Text().append(f"{loaded.path}, identity {identity(loaded.experiment)}\n", style="bold")
    for key, line in lines.items():
        origin = loaded.origins[key]
        text.append(f"{line:{width}}  {origin}\n", style="dim" if origin == DEFAULT else "")
    return text


def _validate(tree: dict[str, Any], environ: Mapping[str, str]) -> tuple[Experiment | None, list[tuple[Key, str]]]:
    """The experiment of a tree as it was written, or none and what is wrong at which key."""
    tree = copy.deepcopy(tree)
    mistakes = list(_expand_paths(tree, environ))
    try:
        # Validated as JSON: strict about types, yet lists may fill tuples and whole numbers floats.
        experiment = Experiment.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        known = list(known_keys())
        for details in error.errors():
            key = tuple(part for part in details["loc"] if isinstance(part, str))
            mistakes.append((key, in_words(details, known)))
    return (None if mistakes else experiment), mistakes


def _varied(tree: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    tree = copy.deepcopy({key: value for key, value in tree.items() if key != "search"})
    for dotted, value in values.items():
        *parents, name = dotted.split(".")
        section = tree
        for parent in parents:
            if not isinstance(section.get(parent), dict):
                section[parent] = {}
            section = section[parent]
        section[name] = value
    return tree


def _space_mistakes(
    space: Mapping[str, Distribution], tree: dict[str, Any], environ: Mapping[str, str]
) -> list[tuple[Key, str]]:
    """Try every key of a search space at its extremes; name the first value of each that the schema refuses."""
    found: list[tuple[Key, str]] = []
    known = set(known_keys())
    for key, distribution in space.items():
        where = ("search", "space", key)
        if key == "name" or key.startswith(_NOT_IDENTITY):
            fixed = f"name, {', '.join(part.rstrip('.') for part in _NOT_IDENTITY)} are the same for all trials"
            found.append((where, f"search.space.{key}: {fixed}, expected another key"))
            continue
        # A key that is drawn under a condition on others is tried where that holds.
        others = conditions(space, key)
        for value in extremes(distribution):
            _, mistakes = _validate(_varied(tree, {**others, key: value}), environ)
            if mistakes:
                value_in_words = f"{json.dumps(value, ensure_ascii=False)} does not fit: " if key in known else ""
                found.append((where, f"search.space.{key}: {value_in_words}{mistakes[0][1]}"))
                break
    return found


def _tree(experiment: Experiment) -> dict[str, Any]:
    return experiment.model_dump(mode="json")


def _leaves(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _identity_leaves(experiment: Experiment) -> dict[str, Any]:
    return {key: value for key, value in flatten(experiment).items() if not key.startswith(_NOT_IDENTITY)}


def _show(leaves: dict[str, Any], key: str) -> str:
    return json.dumps(leaves[key], ensure_ascii=False) if key in leaves else "nothing"


def _paths(tree: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Key]]:
    """Yield the section that holds each path-like value that is given, and its whole key."""
    for dotted in PATH_KEYS:
        *parents, name = key = tuple(dotted.split("."))
        section: Any = tree
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(section.get(name), str):
            yield section, key


def _expand_paths(tree: dict[str, Any], environ: Mapping[str, str]) -> Iterator[tuple[Key, str]]:
    """Replace variables and `~` in the path-like values, in place; yield what could not be replaced."""
    # An empty variable would silently turn $DATA/train into /train.
    values = {name: value for name, value in environ.items() if value}
    for section, key in _paths(tree):
        text = section[key[-1]]
        try:
            # Not pathlib: it would turn sqlite:/// into sqlite:/.
            section[key[-1]] = os.path.expanduser(Template(text).substitute(values))  # noqa: PTH111
        except KeyError as error:
            yield key, f"{'.'.join(key)}: variable {error.args[0]} is unset or empty, found {text!r}"
        except ValueError:
            yield key, f"{'.'.join(key)}: found {text!r}, expected $NAME or ${{NAME}} ($$ for a plain $)"


def _split(key: Key) -> Key:
    return tuple(".".join(key).split(".")) if key else ()


def _origin(key: Key, written: Mapping[Key, str], path: Path) -> str:
    """Where a key, or else the nearest section around it, was written."""
    around = next((key[:n] for n in range(len(key), 0, -1) if key[:n] in written), ())
    origin = written.get(around, str(path))
    overridden = any(k[: len(key)] == key and o == OVERRIDE for k, o in written.items())
    return f"{origin} with {OVERRIDE}" if overridden and origin != OVERRIDE else origin
