"""How far a cluster can grow, as its head's labels say, and whether those of the shipped clusters say what is so."""

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from mimiclab.cluster.capacity import PREFIX, capacity
from mimiclab.errors import UserError
from mimiclab.schema import ScaleConfig
from mimiclab.session import check_resources

FOLDER = Path(__file__).parents[2] / "cluster"
HEAD = ({"memory": 1e9}, {"ray.io/market-type": "on-demand"})
NODE = ({"CPU": 8.0, "GPU": 1.0, "accelerator_type:L4": 1.0}, {"ray.io/market-type": "spot"})
GROWING = (HEAD[0], {f"{PREFIX}CPU": "24", f"{PREFIX}GPU": "3", f"{PREFIX}L4": "2"})


def test_a_cluster_that_stays_as_it_is_gives_what_its_nodes_have() -> None:
    assert capacity([HEAD, NODE, NODE]) == {"memory": 1e9, "CPU": 16, "GPU": 2, "accelerator_type:L4": 2}
    assert capacity([]) == {}


def test_one_that_grows_gives_what_its_head_says_and_what_is_there_anyway() -> None:
    alone = capacity([GROWING])
    assert alone == {"memory": 1e9, "CPU": 24, "GPU": 3, "accelerator_type:L4": 2}
    assert capacity([GROWING, NODE]) == alone
    assert capacity([GROWING, *[NODE] * 4])["CPU"] == 32


def test_a_run_may_be_as_large_as_the_cluster_can_become() -> None:
    check_resources([GROWING], ScaleConfig(workers=3, gpu=True))
    check_resources([GROWING], ScaleConfig(workers=2, gpu=True, accelerator_type="L4"))
    with pytest.raises(UserError, match="4 workers of 1 GPU each need 4, found 3 in the cluster"):
        check_resources([GROWING], ScaleConfig(workers=4, gpu=True))
    with pytest.raises(UserError, match=r"accelerator_type:A10G each need 0\.001, found 0 in the cluster"):
        check_resources([GROWING], ScaleConfig(gpu=True, accelerator_type="A10G"))


@pytest.mark.parametrize("value", ["many", "-1", "1.5", ""])
def test_a_label_that_is_no_number_is_named(value: str) -> None:
    with pytest.raises(UserError, match=rf"label mimiclab/max-GPU of a node: expected a whole number, found '{value}'"):
        capacity([(HEAD[0], {f"{PREFIX}GPU": value})])


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_the_head_of_a_cloud_says_how_far_it_grows(cloud: str) -> None:
    config = yaml.safe_load((FOLDER / f"{cloud}-spot.yaml").read_text())
    types = [each for name, each in config["available_node_types"].items() if name != config["head_node_type"]]

    [start] = [line for line in config["head_start_ray_commands"] if "ray start --head" in line]

    assert labels(re.search(r"--labels=(\S+)", start)[1]) == expected(  # type: ignore[index]
        [(each["max_workers"], each["resources"], each["labels"]) for each in types], config["max_workers"]
    )


@pytest.mark.parametrize("file", ["raycluster", "rayjob"])
def test_the_head_on_kubernetes_says_how_far_it_grows(file: str) -> None:
    spec = yaml.safe_load((FOLDER / "kuberay" / f"{file}.yaml").read_text())["spec"]
    spec = spec.get("rayClusterSpec", spec)

    # What Ray's autoscaler makes of the file: it starts no pod for a resource that is not in there.
    config = _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "a", "namespace": "b"}, "spec": spec})

    types = [each for name, each in config["available_node_types"].items() if name != config["head_node_type"]]
    found = {key: value for key, value in spec["headGroupSpec"]["labels"].items() if key.startswith(PREFIX)}
    assert found == expected(
        [(each["max_workers"], each["resources"], each["labels"]) for each in types], config["max_workers"]
    )


def labels(text: str) -> dict[str, str]:
    return {key: value for key, value in (each.split("=") for each in text.split(",")) if key.startswith(PREFIX)}


def expected(types: list[tuple[int, dict[str, int], dict[str, str]]], max_nodes: int) -> dict[str, str]:
    """The labels of a head at whose side there are up to so many nodes of each type, and so many in all."""
    most: Counter[str] = Counter()
    for num, resources, node in types:
        # By the resource that workers ask for, which the label has to agree with.
        [model] = [key.removeprefix("accelerator_type:") for key in resources if key.startswith("accelerator_type:")]
        assert model == node["ray.io/accelerator-type"]
        most[model] += min(num, max_nodes) * resources["GPU"]
    for kind in ("CPU", "GPU"):
        each = sorted((resources[kind] for num, resources, _ in types for _ in range(num)), reverse=True)
        most[kind] = sum(each[:max_nodes])
    return {f"{PREFIX}{kind}": str(num) for kind, num in most.items()}
