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
    check_resources([({"CPU": 6.0, "GPU": 3.0, "memory": 1.0}, {})], ScaleConfig(workers=3, threads=2, gpu=True))


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
        check_resources([(found, {})], scale)
    assert str(caught.value) == message


SPOT = {"ray.io/market-type": "spot"}
HEAD = ({"CPU": 2.0}, {"ray.io/market-type": "on-demand"})
SMALL = ({"CPU": 1.0}, SPOT)
LARGE = ({"CPU": 8.0, "GPU": 1.0, "accelerator_type:L4": 1.0}, {**SPOT, "zone": "a"})


@pytest.mark.parametrize(
    ("nodes", "scale"),
    [
        ([SMALL] * 3, ScaleConfig(workers=3)),
        ([LARGE] * 2, ScaleConfig(workers=2, threads=8, gpu=True, accelerator_type="L4", placement="STRICT_SPREAD")),
        ([LARGE, SMALL], ScaleConfig(workers=4, threads=2, placement="STRICT_PACK")),
        ([HEAD, SMALL, SMALL], ScaleConfig(workers=2, label_selector=SPOT)),
        ([HEAD, SMALL, LARGE], ScaleConfig(workers=2, label_selector={"ray.io/market-type": "!spot"})),
        ([SMALL] * 3, ScaleConfig(workers={"min": 1, "max": 50})),
    ],
)
def test_nodes_that_just_hold_the_workers_are_enough(nodes, scale):
    check_resources(nodes, scale)


@pytest.mark.parametrize(
    ("nodes", "scale", "message"),
    [
        (
            [SMALL] * 3,
            ScaleConfig(threads=2),
            "scale: 1 workers of 2 CPU each, placed by PACK, found room for 0 of them in the cluster: nodes that may "
            "take them are 3 with 1 CPU; expected fewer workers, fewer threads or larger nodes",
        ),
        (
            [LARGE] * 4 + [SMALL],
            ScaleConfig(threads=32, gpu=True),
            "scale: 1 workers of 32 CPU and 1 GPU each, placed by PACK, found room for 0 of them in the cluster: nodes "
            "that may take them are 4 with 8 CPU and 1 GPU, 1 with 1 CPU and 0 GPU; expected",
        ),
        (
            [LARGE] * 2,
            ScaleConfig(workers=2, threads=5, placement="STRICT_PACK"),
            "placed by STRICT_PACK, found room for 1",
        ),
        (
            [LARGE, LARGE],
            ScaleConfig(workers=3, placement="STRICT_SPREAD"),
            "placed by STRICT_SPREAD, found room for 2",
        ),
        ([HEAD, SMALL], ScaleConfig(workers=2, label_selector=SPOT), "may take them are 1 with 1 CPU"),
        (
            [HEAD, LARGE],
            ScaleConfig(label_selector={"zone": "b"}),
            "scale.label_selector: no node of the cluster has zone: b; found zone: a, zone: none; expected labels that "
            "its nodes have",
        ),
    ],
)
def test_workers_that_no_node_has_room_for_are_refused(nodes, scale, message):
    with pytest.raises(UserError) as caught:
        check_resources(nodes, scale)
    assert message in str(caught.value)


def test_of_nodes_that_are_started_as_they_are_needed_the_sums_are_known():
    head = ({}, {"mimiclab/max-CPU": "16", **HEAD[1]})

    check_resources([head, SMALL], ScaleConfig(workers=2, threads=8, label_selector={"zone": "b"}))
