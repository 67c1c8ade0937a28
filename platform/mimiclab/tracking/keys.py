"""Keys from names of the data, which may hold any character, be long, or be alike: each gets one of its own."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import TypeVar

Name = TypeVar("Name", str, int)

_MAX_METRIC = 250
# MLflow makes a file of a picture's key and of some 75 characters more; a group comes before it.
_MAX_PICTURE = 139
_DIGITS = 8


def as_key(text: str) -> str:
    """``text`` as one part of any key: every character that some key may not hold is "_"."""
    return _cleaned(text, r"[^a-zA-Z0-9_\-. ]")


def metric_keys(names: Iterable[str], *, num_groups: int = 2) -> dict[str, str]:
    """A key for each metric by its name, whose last part may be that of a class.

    Letters of any language stay. What MLflow refuses, and more slashes than those of the groups, become "_".

    Args:
        names: As `student/AP/traffic light`.
        num_groups: How many slashes of a name are of groups.
    """
    parts = {name: name.split("/", num_groups) for name in names}
    keys = {name: "/".join(_cleaned(each, r"[^\w\-. ]") for each in found) for name, found in parts.items()}
    return _distinct(keys, {name: found[-1] for name, found in parts.items()}, _MAX_METRIC)


def picture_keys(names: Mapping[int, str]) -> dict[int, str]:
    """A key for each picture by the id of its image, from the image's name; a file name on every machine."""
    keys = {number: as_key(name) for number, name in names.items()}
    return _distinct(keys, {number: str(number) for number in names}, _MAX_PICTURE)


def _cleaned(text: str, refused: str) -> str:
    cleaned = re.sub(refused, "_", text)
    return cleaned if cleaned.strip(".") else "_" * max(1, len(cleaned))  # dots alone name a folder


def _distinct(keys: Mapping[Name, str], hashed: Mapping[Name, str], max_length: int) -> dict[Name, str]:
    """The same keys, but those that are too long, or that several names have, end with a hash."""
    times = Counter(keys.values())

    def own(name: Name, key: str) -> str:
        if len(key) <= max_length and times[key] == 1:
            return key
        digest = sha256(hashed[name].encode(errors="surrogatepass")).hexdigest()
        return f"{key[: max_length - _DIGITS - 1]}-{digest[:_DIGITS]}"

    return {name: own(name, key) for name, key in keys.items()}
