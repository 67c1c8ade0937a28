"""One Ray cluster for all tests that need one: starting it costs more than most of them."""

import os
import signal
from collections.abc import Iterator

import pytest

from mimiclab.session import ENVIRONMENT

# A suite that was started in the background inherits an ignored Ctrl-C, and so would the commands that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    os.environ.update(ENVIRONMENT)
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()
