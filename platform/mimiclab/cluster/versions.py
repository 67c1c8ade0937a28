"""Whether an environment has what the code of a job was submitted with; run on the cluster before the job's verb.

It needs nothing but Python: what lacks may be anything. An image that is older than the code shows here, in one line,
and not as an ImportError somewhere.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

FILE = "versions.json"
"""In a job's package: what `here` gave where it was submitted."""


def here() -> dict[str, str]:
    """The version of each package that MimicLab cannot do without, as this environment has it."""
    needed = (line for line in requires("mimiclab") or () if "extra ==" not in line)
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in needed]
    return {name: found for name in names if (found := _version(name)) is not None}


def compare(expected: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """What this environment lacks of other versions, and what it has in another one, in words."""
    found = {name: _version(name) for name in expected}
    missing = [f"{name} {wanted}" for name, wanted in expected.items() if found[name] is None]
    others = [f"{name} {has}, not {expected[name]}" for name, has in found.items() if has not in (None, expected[name])]
    return missing, others


def _version(name: str) -> str | None:
    try:
        return version(name).partition("+")[0]  # torch for a laptop's CPU is 2.15.0+cpu
    except PackageNotFoundError:
        return None


def _main(file: str) -> int:
    missing, others = compare(json.loads(Path(file).read_text()))
    if others:
        print(f"warning: other versions here than where this was submitted: {'; '.join(others)}", flush=True)
    if missing:
        print(
            f"error: the environment of this node lacks {', '.join(missing)}; expected one of the lock file of the "
            "code that was submitted",
            file=sys.stderr,
        )
    return 2 if missing else 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
