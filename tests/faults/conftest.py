"""One Ray cluster for all tests that need one, and a run that nothing happened to."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from buckets import CREDENTIALS
from tinyruns import quiet, tiny

from mimiclab.runs import Run
from mimiclab.session import ENVIRONMENT
from mimiclab.train import train

# A suite that was started in the background inherits an ignored Ctrl-C, and so would the commands that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    os.environ.update({**ENVIRONMENT, **CREDENTIALS})  # which workers inherit
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def undisturbed(root: Path, ray_cluster: None) -> Run:
    """A run of two workers from start to end."""
    return train(tiny(root), console=quiet())
