"""What a training step and an inference make the host of a GPU wait for, counted on a CPU by torch's dispatch."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from waits import count_waits

from mimicdet import MimicDet, ModelConfig
from mimicdet.config import BackboneConfig, InferenceConfig, StudentConfig, TeacherConfig


def waits(act: Callable[[], object]) -> Counter[str]:
    """How often each operator is waited for, wherever it is called."""
    with count_waits() as counted:
        act()
    found: Counter[str] = Counter()
    for (name, _), num in counted.items():
        found[name] += num
    return found


@pytest.fixture(scope="module")
def detector() -> MimicDet:
    torch.manual_seed(0)
    return MimicDet(
        ModelConfig(
            backbone=BackboneConfig(name="resnet18", width=16),
            student=StudentConfig(offsets="analytic_learned", num_samples=32),
            teacher=TeacherConfig(num_rois=16, num_convs=1),
            inference=InferenceConfig(score_threshold=0.0),
        ),
        3,
    )


def images(num: int) -> list[Tensor]:
    return [torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(i)) for i in range(num)]


@pytest.mark.parametrize("num", [1, 3])
def test_a_training_step_waits_for_what_is_listed_alone(detector: MimicDet, num: int) -> None:
    box = torch.tensor([[10.0, 20, 60, 80], [5, 5, 20, 25]])
    targets = [{"boxes": box, "labels": torch.tensor([0, 2]), "key": torch.tensor(i)} for i in range(num)]
    found = waits(lambda: detector.train().loss_terms(images(num), targets))
    assert found == {
        "lift_fresh": 1,  # the images' sizes
        "tolist": 1,  # how many boxes each level of the teacher's has
        "_local_scalar_dense": 4 * num,  # checks of a target, which is still on the host where it comes from a loader
        "nms": num,
        "index": num,  # positives among the refinement's samples
        "nonzero": 4 + 8 * num,  # 2 samplers, twice; 7 masks that are sampled from, and what is outside of padding
    }


@pytest.mark.parametrize("num", [1, 3])
def test_inference_waits_for_what_is_listed_alone(detector: MimicDet, num: int) -> None:
    found = waits(lambda: detector.eval().detect(images(num)))
    assert found == {
        "lift_fresh": 1 + num,  # the images' sizes; torchvision's batched_nms has a constant
        "tolist": 1,  # how many scores each image has above the threshold
        "nms": num,
        "nonzero": 3 + num,  # 2 samplers, those scores, and what is outside of padding
    }
