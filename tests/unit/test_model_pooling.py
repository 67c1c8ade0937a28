"""Pooling from a convolution that is computed only where boxes look, against the dense one."""

import math

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from mimicdet import MimicDet, ModelConfig, pooling
from mimicdet.config import (
    BackboneConfig,
    PyramidConfig,
    RefinementConfig,
    StudentConfig,
    TeacherConfig,
)
from mimicdet.pooling import pool, pool_convolved

pytestmark = pytest.mark.usefixtures("one_thread")

STRIDE = 4


def convolution(channels: int) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, channels + 1, 3, padding=1).double()


def boxes(num: int, height: int, width: int) -> Tensor:
    """RoIs in two images: random ones, the whole map, and tiny ones in its corners."""
    far = torch.tensor([width, height, width, height], dtype=torch.float64) * STRIDE
    ends = torch.rand(num, 2, 2, dtype=torch.float64).sort(1).values.flatten(1) * far
    whole = torch.cat([torch.zeros(2, dtype=torch.float64), far[2:]])[None]
    tiny = torch.cat([whole[:, :2], whole[:, :2] + 1e-3], 1)
    last = torch.cat([whole[:, 2:] - 1e-3, whole[:, 2:]], 1)
    xyxy = torch.cat([ends, whole, tiny, last])
    return torch.cat([torch.randint(2, (len(xyxy), 1)).double(), xyxy], 1)


# Odd and single cells, more and fewer bins than cells, one point to a bin and several.
@pytest.mark.parametrize(
    ("height", "width", "size", "ratio"), [(12, 20, 3, 2), (9, 7, 7, 1), (5, 1, 2, 3), (1, 6, 3, 2), (1, 1, 2, 2)]
)
def test_values_and_gradients_are_those_of_the_dense_convolution(
    height: int, width: int, size: int, ratio: int
) -> None:
    conv = convolution(4)
    features = torch.randn(2, 4, height, width, dtype=torch.float64, requires_grad=True)
    rois = boxes(12, height, width)
    inputs = [features, conv.weight, conv.bias]

    wanted = roi_align(conv(features), rois, size, 1 / STRIDE, ratio, aligned=True)
    found = pool_convolved(features, rois, size, 1 / STRIDE, ratio, conv)

    assert found.shape == wanted.shape == (15, 5, size, size)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
    upstream = torch.randn_like(wanted)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(wanted, inputs, upstream), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-11)


def test_few_bins_are_pooled_first_and_many_from_the_dense_map() -> None:
    conv = convolution(2)
    ran: list[nn.Module] = []
    conv.register_forward_hook(lambda module, *_: ran.append(module))
    features = torch.randn(2, 2, 16, 16, dtype=torch.float64)
    for num, dense in ((2, False), (60, True)):
        rois = boxes(num, 16, 16)
        ran.clear()
        found = pool(features, rois, 3, 1 / STRIDE, 2, conv)
        assert bool(ran) == dense
        assert torch.allclose(found, roi_align(conv(features), rois, 3, 1 / STRIDE, 2, aligned=True), atol=1e-12)


def test_no_boxes_give_no_rows_and_gradients_of_zero() -> None:
    conv = convolution(2)
    features = torch.randn(1, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    found = pool(features, torch.zeros(0, 5, dtype=torch.float64), 3, 1 / STRIDE, 2, conv)
    assert found.shape == (0, 3, 3, 3)
    found.sum().backward()
    for tensor in (features, conv.weight, conv.bias):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_training_is_the_same_with_the_dense_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(
        backbone=BackboneConfig(name="resnet18", width=8),
        pyramid=PyramidConfig(channels=8, max_level=5),
        refinement=RefinementConfig(num_samples=16, num_proposals=40),
        student=StudentConfig(head_width=8, offset_channels=(4, 4), num_samples=12),
        teacher=TeacherConfig(num_rois=10, num_convs=1, pooled_size=3),
    )
    torch.manual_seed(0)
    model = MimicDet(config, 3).double().train()
    image = torch.randint(256, (3, 96, 128), dtype=torch.uint8)
    target = {"boxes": torch.tensor([[5.0, 4, 36, 37]]), "labels": torch.tensor([1]), "key": torch.tensor(3)}
    convolved: list[nn.Module] = []
    model.pyramid.output["2"].register_forward_hook(lambda module, *_: convolved.append(module))

    answers = []
    for cells_per_bin in (pooling.CELLS_PER_BIN, math.inf):
        monkeypatch.setattr(pooling, "CELLS_PER_BIN", cells_per_bin)
        model.zero_grad()
        losses = model.loss_terms([image], [target]).losses
        sum(losses.values()).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        answers.append((len(convolved), losses, gradients))

    (never, sparse, ours), (once, dense, theirs) = answers
    assert (never, once) == (0, 1)
    assert all(torch.allclose(sparse[name], value, rtol=1e-10) for name, value in dense.items())
    assert ours.keys() == theirs.keys()
    assert theirs["pyramid.output.2.weight"].any()
    assert all(torch.allclose(ours[name], value, rtol=1e-8, atol=1e-12) for name, value in theirs.items())
