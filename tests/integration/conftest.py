"""One Ray cluster for all tests that need one: starting it costs more than most of them."""

import os
from collections.abc import Iterator

import pytest

from mimiclab.session import ENVIRONMENT


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    os.environ.update(ENVIRONMENT)
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()
