"""One Ray cluster for all tests that need one: starting it costs more than most of them."""

import os
from collections.abc import Iterator

import pytest

from mimiclab.session import ENVIRONMENT


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    os.environ.update(ENVIRONMENT)
    import ray

    # The dashboard is what cleans up after stopped trials asks; a search starts its own clusters with it too.
    ray.init(address="local", num_cpus=4, include_dashboard=True, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()
