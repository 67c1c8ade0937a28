"""Ray's settings as a user has them, and what is remembered of clusters kept apart from this machine's."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def users_settings(state: Path, settings: dict[str, str] | None = None) -> Iterator[None]:
    """None of Ray's variables but `settings`, and clusters remembered in a folder `state`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        patch.setenv("XDG_STATE_HOME", str(state))
        for name, value in (settings or {}).items():
            patch.setenv(name, value)
        yield


# As `up` leaves them in the process that calls it.
AFTER_UP = {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_API_SERVER_ADDRESS": ""}
