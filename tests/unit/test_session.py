"""What a run asks of a cluster."""

import pytest

from mimiclab.errors import UserError
from mimiclab.schema import ScaleConfig
from mimiclab.session import check_resources, resources_per_worker


def test_a_worker_asks_for_its_threads_and_for_a_gpu_only_where_wanted():
    assert resources_per_worker(ScaleConfig(workers=3, threads=2)) == {"CPU": 2}
    assert resources_per_worker(ScaleConfig(workers=3, threads=2, gpu=True)) == {"CPU": 2, "GPU": 1}


def test_a_worker_of_a_kind_of_gpu_asks_for_what_ray_makes_of_it():
    from ray.train import ScalingConfig

    scale = ScaleConfig(gpu=True, accelerator_type="A10G")
    config = ScalingConfig(use_gpu=True, resources_per_worker={"CPU": 1}, accelerator_type="A10G")
    assert resources_per_worker(scale) == config._resources_per_worker_not_none


def test_a_cluster_that_just_holds_the_workers_is_large_enough():
    check_resources({"CPU": 6.0, "GPU": 3.0, "memory": 1.0}, ScaleConfig(workers=3, threads=2, gpu=True))


@pytest.mark.parametrize(
    ("found", "scale", "message"),
    [
        (
            {"CPU": 2.0},
            ScaleConfig(workers=3),
            "scale: 3 workers of 1 CPU each need 3, found 2 in the cluster; "
            "expected fewer workers, fewer threads or a larger cluster",
        ),
        (
            {"CPU": 8.0},
            ScaleConfig(workers=2, gpu=True),
            "scale: 2 workers of 1 GPU each need 2, found 0 in the cluster; expected fewer workers or a larger cluster",
        ),
    ],
)
def test_a_cluster_that_is_too_small_is_told_what_lacks(found, scale, message):
    with pytest.raises(UserError) as caught:
        check_resources(found, scale)
    assert str(caught.value) == message
