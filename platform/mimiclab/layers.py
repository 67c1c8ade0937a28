"""YAML laid over YAML: `extends:` and `--set`, with every value knowing where it was written.

Layers stay trees of PyYAML nodes until the end, because a node carries the file and line that it came
from. The dialect is YAML 1.2's core schema: unlike PyYAML's own it reads `3e-4` as a number, and `no`,
`010` and `1:30` as neither a truth value, an octal number nor minutes. It has no infinities.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from mimiclab.errors import UserError

Key = tuple[str, ...]
OVERRIDE = "--set"

_TAG = "tag:yaml.org,2002:"
_SCALARS: dict[str, Callable[[str], Any]] = {
    _TAG + "null": lambda _: None,
    _TAG + "bool": lambda text: text.lower() == "true",
    _TAG + "int": int,
    _TAG + "float": float,
    _TAG + "str": str,
}
_log = logging.getLogger(__name__)


class _CoreSchema:
    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own name and type); None: whatever the first character
        None: [
            (_TAG + "null", re.compile(r"(~|null|Null|NULL|)$")),
            (_TAG + "bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$")),
            (_TAG + "int", re.compile(r"[-+]?[0-9]+$")),
            (_TAG + "float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")),
        ]
    }


class _Loader(_CoreSchema, yaml.SafeLoader):
    pass


class _Dumper(_CoreSchema, yaml.SafeDumper):
    pass


_Dumper.add_representer(list, lambda dumper, data: dumper.represent_sequence(_TAG + "seq", data, flow_style=True))


def dump(tree: dict[str, Any]) -> str:
    """Write a tree of plain values as YAML that reads back the same."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def read(path: Path) -> yaml.Node:
    """Read an experiment file, laid over the files that it extends.

    Raises:
        UserError: the file cannot be read, is no mapping, repeats a key, or extends itself.
    """
    return _read(path, ())


def parse_override(override: str) -> yaml.Node:
    """Turn `a.b=value` into a layer; the value is YAML.

    Raises:
        UserError: there is no `=`, or the value is not YAML.
    """
    dotted, equals, text = override.partition("=")
    parts = dotted.split(".")
    if not (all(parts) and equals):
        raise UserError(f"{OVERRIDE} {override}: expected KEY=VALUE, such as optim.lr=1e-3")
    node = _compose(text, OVERRIDE)
    if node is None:  # an empty value is null, as it is in a file
        mark = yaml.Mark(OVERRIDE, 0, 0, 0, None, 0)
        node = yaml.ScalarNode(_TAG + "null", "", mark, mark)
    for part in reversed(parts):
        key = yaml.ScalarNode(_TAG + "str", part, node.start_mark, node.end_mark)
        node = yaml.MappingNode(_TAG + "map", [(key, node)], node.start_mark, node.end_mark)
    return node


def merge(base: yaml.Node, top: yaml.Node) -> yaml.Node:
    """Lay `top` over `base`: mappings merge key by key, anything else replaces what was there."""
    if not (isinstance(base, yaml.MappingNode) and isinstance(top, yaml.MappingNode)):
        return top
    pairs = {key.value: (key, value) for key, value in base.value}
    for key, value in top.value:
        if key.value not in pairs:
            pairs[key.value] = (key, value)
            continue
        old_key, old_value = pairs[key.value]
        merged = merge(old_value, value)
        # A section with one key set from outside is still the file's section.
        outside = isinstance(merged, yaml.MappingNode) and _origin(key) == OVERRIDE
        pairs[key.value] = (old_key if outside else key, merged)
    return yaml.MappingNode(base.tag, list(pairs.values()), top.start_mark, top.end_mark)


def plain(node: yaml.Node) -> Any:
    """Give the plain Python value of a tree: dicts, lists, strings, numbers, truth values and None.

    Raises:
        UserError: a value has a tag that experiment files do not know.
    """
    if isinstance(node, yaml.MappingNode):
        return {key.value: plain(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [plain(item) for item in node.value]
    try:
        return _SCALARS[node.tag](node.value)
    except (KeyError, ValueError):
        tag = node.tag.replace(_TAG, "!!")
        raise UserError(
            f"{_origin(node)}: found the YAML tag {tag} on {node.value!r}, expected a plain value"
        ) from None


def origins(node: yaml.Node, prefix: Key = ()) -> Iterator[tuple[Key, str]]:
    """Yield every section and key of a tree with its "file:line", or "--set"."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*prefix, key.value), _origin(key)
            yield from origins(value, (*prefix, key.value))


def _origin(node: yaml.Node) -> str:
    mark = node.start_mark
    return OVERRIDE if mark.name == OVERRIDE else f"{mark.name}:{mark.line + 1}"


def _read(path: Path, children: tuple[Path, ...]) -> yaml.Node:
    if path.resolve() in [child.resolve() for child in children]:
        chain = " -> ".join(str(p) for p in (*children, path))
        raise UserError(f"{path}: files extend each other in a circle: {chain}")
    _log.debug("reading %s", path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected an experiment file (YAML)") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: found bytes that are not UTF-8 at {error.start}, expected YAML") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    node = _compose(text, str(path))
    if node is None:
        raise UserError(f"{path}: the file is empty, expected keys such as name: and data:")
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else repr(node.value)
        raise UserError(f"{_origin(node)}: found {kind}, expected keys such as name: and data:")

    extends = [value for key, value in node.value if key.value == "extends"]
    if not extends:
        return node
    node.value = [pair for pair in node.value if pair[0].value != "extends"]
    base = plain(extends[0])
    if not isinstance(base, str):
        raise UserError(f"{_origin(extends[0])}: extends: found {base!r}, expected the path of one file")
    base_path = path.parent / base
    if not base_path.exists():
        raise UserError(f"{_origin(extends[0])}: extends: no such file: {base_path}")
    return merge(_read(base_path, (*children, path)), node)


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        loader = _Loader(text)
        loader.name = name
        node = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line, problem = text.count("\n", 0, error.position), f"{error.reason}, found #x{error.character:02x}"
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line if error.problem_mark else 0
        problem = ", ".join(filter(None, (error.context, error.problem)))
    else:
        if node is not None:
            _check_keys(node, ())
        return node
    where = f"{OVERRIDE} {text}" if name == OVERRIDE else f"{name}:{line + 1}"
    raise UserError(f"{where}: not valid YAML: {problem}")


def _check_keys(node: yaml.Node, parents: tuple[yaml.Node, ...]) -> None:
    """Refuse what YAML allows and a tree of named keys does not."""
    if node in parents:
        raise UserError(f"{_origin(node)}: found an alias inside of what it stands for")
    children = list(node.value) if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{_origin(key)}: found a list or mapping as a key, expected a name")
            if key.value in lines:
                raise UserError(f"{_origin(key)}: key {key.value} is given twice, first on line {lines[key.value]}")
            lines[key.value] = key.start_mark.line + 1
            children.append(value)
    for child in children:
        _check_keys(child, (*parents, node))
