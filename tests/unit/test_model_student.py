"""The S-head at chosen positions equals torchvision's dense deformable convolution at these positions."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from mimicdet.anchors import Grid, decode, make_grid
from mimicdet.config import ModelConfig, PyramidConfig, StudentConfig
from mimicdet.student import AdaptiveConv, Features, HeadOutput, Student

LEVELS = (3, 4, 5, 6, 7)
SHAPES = ((5, 7), (3, 4), (2, 2), (1, 1), (1, 1))
UNIT = (1.0, 1.0, 1.0, 1.0)
NUM_IMAGES, CHANNELS = 2, 3
NUM_POSITIONS = sum(height * width for height, width in SHAPES)


class PlacedConv(AdaptiveConv):
    """Takes the taps' offsets from plain convolution as given, rather than from the micro-network."""

    def points(self, deltas: Tensor, grid: Grid, position: Tensor) -> Tensor:
        cell = grid.cell[position].flip(1).to(deltas.dtype)
        return cell[:, None] + self.taps + deltas.unflatten(1, (-1, 2))


def random_maps(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(NUM_IMAGES, CHANNELS, *shape, generator=generator, dtype=dtype).requires_grad_() for shape in SHAPES
    ]


def chosen_positions(num: int) -> tuple[Tensor, Tensor]:
    """Images and positions in any order, some of them twice."""
    generator = torch.Generator().manual_seed(1)
    everything = torch.cartesian_prod(torch.arange(NUM_IMAGES), torch.arange(NUM_POSITIONS))
    drawn = everything[torch.randint(len(everything), (num,), generator=generator)]
    return drawn[:, 0], drawn[:, 1]


def per_level(rows: Tensor) -> list[Tensor]:
    """Split (N, P, D) into maps (N, D, H, W)."""
    parts = rows.split([height * width for height, width in SHAPES], 1)
    return [part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, SHAPES, strict=True)]


def flat(maps: list[Tensor]) -> Tensor:
    return torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)


def offsets_of(kind: str, kernel_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    offsets = 3 * torch.randn(NUM_IMAGES, NUM_POSITIONS, 2 * kernel_size**2, generator=generator, dtype=torch.float64)
    if kind == "whole":  # on the borders between cells, where gradients are one-sided
        return offsets.round()
    return {"zero": torch.zeros_like(offsets), "random": offsets, "far": 100 * offsets}[kind]


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("kind", ["zero", "random", "whole", "far"])
def test_adaptive_conv_equals_dense_deformable_convolution(kernel_size: int, kind: str) -> None:
    torch.manual_seed(0)
    conv = PlacedConv(CHANNELS, kernel_size, StudentConfig(offsets="none"), UNIT).double()
    nn.init.normal_(conv.bias)
    maps = random_maps(torch.float64)
    offsets = offsets_of(kind, kernel_size).requires_grad_()
    grid = make_grid(LEVELS, maps, 4)
    image, position = chosen_positions(100)
    cotangent = torch.randn(100, CHANNELS, dtype=torch.float64)
    inputs = [*maps, offsets, conv.weight, conv.bias]

    ours = conv(Features.pack(maps), offsets[image, position], grid, image, position)
    dense = [
        deform_conv2d(m, o, conv.weight, conv.bias, padding=kernel_size // 2)
        for m, o in zip(maps, per_level(offsets), strict=True)
    ]
    theirs = flat(dense)[image, position]
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-9)
    gradients = torch.autograd.grad(ours, inputs, cotangent), torch.autograd.grad(theirs, inputs, cotangent)
    for mine, wanted in zip(*gradients, strict=True):
        assert torch.allclose(mine, wanted, rtol=0, atol=1e-9)


def model(**options: Any) -> ModelConfig:
    return ModelConfig(pyramid=PyramidConfig(channels=CHANNELS), student=StudentConfig(**options))


def random_student(**options: Any) -> Student:
    torch.manual_seed(0)
    student = Student(model(head_width=6, offset_channels=(5, 7), **options), 4)
    for sampler in student.samplers:
        if len(sampler.micro):
            nn.init.normal_(sampler.micro[-1].weight)
            nn.init.normal_(sampler.micro[-1].bias)
        nn.init.normal_(sampler.bias)
    nn.init.normal_(student.logits.weight)
    nn.init.normal_(student.deltas.weight)
    return student


def conv1x1(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)


def test_student_equals_the_dense_head_of_the_paper() -> None:
    student = random_student().double()
    maps = random_maps(torch.float64)
    refine = torch.randn(NUM_IMAGES, NUM_POSITIONS, 4, dtype=torch.float64)
    image, position = chosen_positions(60)
    output = student(Features.pack(maps), refine, make_grid(LEVELS, maps, 4), image, position)
    logits, deltas, features = [], [], []
    for number, (level, regression) in enumerate(zip(maps, per_level(refine), strict=True)):
        kernel_size = 3 if number == 0 else 5
        sampler = student.samplers[min(number, 1)]
        x = F.relu(conv1x1(regression, sampler.micro[0]))
        offsets = conv1x1(F.relu(conv1x1(x, sampler.micro[2])), sampler.micro[4])
        assert offsets.shape[1] == 2 * kernel_size**2
        hidden = F.relu(deform_conv2d(level, offsets, sampler.weight, sampler.bias, padding=kernel_size // 2))
        features.append(conv1x1(hidden, student.reg_hidden))
        deltas.append(conv1x1(F.relu(features[-1]), student.deltas))
        logits.append(conv1x1(F.relu(conv1x1(hidden, student.cls_hidden)), student.logits))
    for ours, dense in ((output.logits, logits), (output.deltas, deltas), (output.feature, features)):
        theirs = flat(dense)[image, position]
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)
        cotangent = torch.randn_like(ours)
        inputs = [*maps, *(p for p in student.parameters() if p.requires_grad)]
        gradients = (
            torch.autograd.grad(x, inputs, cotangent, retain_graph=True, allow_unused=True) for x in (ours, theirs)
        )
        for mine, wanted in zip(*gradients, strict=True):
            # A head that an output does not use has no gradient in one form and none in the other.
            assert (mine is None) == (wanted is None)
            assert mine is None or torch.allclose(mine, wanted, rtol=1e-9, atol=1e-9)
    assert output.logits.shape == (60, 5)


@pytest.mark.parametrize("offsets", ["learned", "analytic", "analytic_learned", "none"])
@pytest.mark.parametrize("kernel_sizes", [(3, 5), (5,), (3, 3, 5, 5, 3)])
def test_chosen_positions_equal_the_dense_mode(offsets: str, kernel_sizes: tuple[int, ...]) -> None:
    student = random_student(offsets=offsets, kernel_sizes=kernel_sizes, detach_offsets=False).double()
    maps = random_maps(torch.float64)
    grid = make_grid(LEVELS, maps, 4)
    refine = torch.randn(NUM_IMAGES, NUM_POSITIONS, 4, dtype=torch.float64).requires_grad_()
    image, position = chosen_positions(60)
    ours = student(Features.pack(maps), refine, grid, image, position)
    dense = student.dense(maps, refine, grid)
    theirs = HeadOutput(
        *(rows[image * NUM_POSITIONS + position] for rows in (dense.logits, dense.deltas, dense.feature))
    )
    inputs = [*maps, refine, *student.parameters()]
    gradients = []
    for output in (ours, theirs):
        total = output.logits.square().sum() + output.deltas.square().sum() + output.feature.square().sum()
        gradients.append(torch.autograd.grad(total, inputs, allow_unused=True))
    for mine, wanted in [(ours.logits, theirs.logits), (ours.deltas, theirs.deltas), (ours.feature, theirs.feature)]:
        assert torch.allclose(mine, wanted, rtol=1e-9, atol=1e-9)
    for mine, wanted in zip(*gradients, strict=True):
        if mine is None or wanted is None:
            assert mine is wanted
        else:
            assert torch.allclose(mine, wanted, rtol=1e-9, atol=1e-9)


def test_training_starts_from_a_plain_convolution() -> None:
    torch.manual_seed(0)
    conv = AdaptiveConv(CHANNELS, 3, StudentConfig(), UNIT)
    maps = random_maps(torch.float32)
    grid = make_grid(LEVELS, maps, 4)
    image, position = chosen_positions(40)
    ours = conv(Features.pack(maps), torch.randn(40, 4), grid, image, position)
    plain = flat([F.conv2d(m, conv.weight, conv.bias, padding=1) for m in maps])[image, position]
    assert torch.allclose(ours, plain, atol=1e-5)


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_analytic_taps_span_the_refined_box(kernel_size: int) -> None:
    conv = AdaptiveConv(CHANNELS, kernel_size, StudentConfig(offsets="analytic"), UNIT)
    grid = make_grid(LEVELS, random_maps(torch.float32), 4)
    position = torch.tensor([0, 10, 34, 36, NUM_POSITIONS - 1])
    deltas = torch.randn(len(position), 4) * 0.3
    points = conv.points(deltas, grid, position)
    for i, p in enumerate(position.tolist()):
        x1, y1, x2, y2 = decode(deltas[i], grid.anchors[p]).tolist()
        stride = float(grid.stride[p])
        for row in range(kernel_size):
            for column in range(kernel_size):
                x = x1 + (x2 - x1) * column / (kernel_size - 1)
                y = y1 + (y2 - y1) * row / (kernel_size - 1)
                # A cell's centre lies half a cell inside of it.
                expected = [y / stride - 0.5, x / stride - 0.5]
                assert points[i, row * kernel_size + column].tolist() == pytest.approx(expected, abs=1e-4)


def test_analytic_residual_starts_at_zero_and_adds() -> None:
    grid = make_grid(LEVELS, random_maps(torch.float32), 4)
    position, deltas = torch.arange(10), torch.randn(10, 4)
    analytic = AdaptiveConv(CHANNELS, 3, StudentConfig(offsets="analytic"), UNIT).points(deltas, grid, position)
    conv = AdaptiveConv(CHANNELS, 3, StudentConfig(offsets="analytic_learned"), UNIT)
    assert torch.equal(conv.points(deltas, grid, position), analytic)
    nn.init.constant_(conv.micro[-1].bias, 0.5)
    assert torch.allclose(conv.points(deltas, grid, position), analytic + 0.5)


@pytest.mark.parametrize("offsets", ["analytic", "none"])
def test_fixed_offsets_have_no_micro_network(offsets: str) -> None:
    student = Student(model(offsets=offsets), 4)
    assert not [name for name, _ in student.named_parameters() if "micro" in name]


@pytest.mark.parametrize("offsets", ["learned", "analytic", "analytic_learned"])
@pytest.mark.parametrize("detach", [True, False])
def test_gradient_into_the_refinement_is_an_option(offsets: str, detach: bool) -> None:
    student = random_student(offsets=offsets, detach_offsets=detach)
    maps = random_maps(torch.float32)
    refine = (torch.randn(NUM_IMAGES, NUM_POSITIONS, 4) * 0.1).requires_grad_()
    output = student(Features.pack(maps), refine, make_grid(LEVELS, maps, 1), *chosen_positions(40))
    (gradient,) = torch.autograd.grad(output.logits.square().sum(), [refine], allow_unused=True)
    assert (gradient is None) if detach else bool(gradient.abs().sum() > 0)


@pytest.mark.parametrize("levels", [[], [0], [1, 2]])
def test_every_parameter_has_a_gradient_whatever_levels_are_read(levels: list[int]) -> None:
    student = random_student()
    maps = random_maps(torch.float32)
    grid = make_grid(LEVELS, maps, 4)
    position = torch.cat([torch.arange(0), *((grid.level == level).nonzero().flatten() for level in levels)])
    output = student(
        Features.pack(maps), torch.randn(NUM_IMAGES, NUM_POSITIONS, 4), grid, torch.zeros_like(position), position
    )
    assert output.feature.shape == (len(position), 6)
    (output.logits.sum() + output.deltas.sum()).backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_broken_deltas_show_in_the_output_rather_than_as_a_crash() -> None:
    student = random_student()
    maps = random_maps(torch.float32)
    image, position = chosen_positions(20)
    refine = torch.full((NUM_IMAGES, NUM_POSITIONS, 4), torch.nan)
    output = student(Features.pack(maps), refine, make_grid(LEVELS, maps, 4), image, position)
    assert output.logits.isnan().all()
