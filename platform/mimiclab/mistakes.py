"""What pydantic found wrong with an experiment, in plain words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from pydantic_core import ErrorDetails

_EXPECTED = {
    "missing": "a value",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "model_type": "a section of keys",
    "dataclass_type": "a section of keys",
    "dict_type": "a section of keys",
    "literal_error": "{expected}",
    "string_too_short": "text that is not empty",
    "too_long": "at most {max_length} values",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than_equal": "{le} or less",
}


def in_words(error: ErrorDetails, known: Sequence[str]) -> str:
    """Say what was found at the dotted key of a pydantic error, and what was expected.

    Args:
        error: one entry of `ValidationError.errors()`.
        known: every dotted key of the schema; the nearest one is offered for an unknown key.
    """
    key = dotted(error["loc"])
    kind, context = error["type"], error.get("ctx", {})
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {key}; {_suggest(key, error['loc'], known)}"
    if kind == "value_error":  # raised by our own checks, which say what they found
        message = str(context["error"])
    else:
        found = "nothing" if kind == "missing" else _show(error["input"])
        expected = _EXPECTED.get(kind)
        message = f"found {found}, expected {expected.format(**context)}" if expected else error["msg"]
        if kind == "string_type" and isinstance(error["input"], int | float):
            message += " (put it in quotes)"
    return f"{key}: {message}" if key else message


def dotted(loc: Sequence[int | str]) -> str:
    """Write a location as `section.key`, and the items of a list as `key[0]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def _suggest(key: str, loc: Sequence[int | str], known: Sequence[str]) -> str:
    if key in known:
        return "a file nests its keys, dotted ones are for --set"
    here = [k for k in known if k.rpartition(".")[0] == dotted(loc[:-1])]
    for candidates in (here, known):
        nearest = get_close_matches(str(loc[-1]), [_leaf(k) for k in candidates], n=1)
        if nearest:
            # Several sections may have a key of this name; the one whose dotted key is nearest is meant.
            same = [k for k in candidates if _leaf(k) in nearest]
            return f"did you mean {get_close_matches(key, same, n=1, cutoff=0)[0]}?"
    return f"known here: {', '.join(_leaf(k) for k in here)}"


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "a section of keys"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
