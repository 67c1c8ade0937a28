"""A step is a function of the global batch, not of the number of workers, nor of restarts.

Run as a program, this file is one of the workers that the tests compare.
"""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mimicdet import MimicDet, ModelConfig
from mimicdet.config import AnchorConfig, BackboneConfig, PyramidConfig, StudentConfig, TeacherConfig
from mimicdet.interface import Detector, LossTerms
from mimiclab import checkpoint
from mimiclab.data.coco import CocoDataset, read_coco
from mimiclab.data.dataset import EvalBatches, TrainBatches
from mimiclab.data.order import Order, rank_slice
from mimiclab.data.scenes import CLASSES, generate_scenes
from mimiclab.engine import Batch, Engine, NonFiniteLossError, build_optimizer, evaluate_pass, learning_rate
from mimiclab.errors import UserError
from mimiclab.optim import OptimConfig

TINY = ModelConfig(
    backbone=BackboneConfig(name="resnet18", width=16),
    pyramid=PyramidConfig(channels=16, max_level=5),
    anchors=AnchorConfig(scale=2),
    student=StudentConfig(head_width=32, offset_channels=(8, 8)),
    teacher=TeacherConfig(num_rois=16, num_convs=1),
)
# Plain SGD: its weights differ by as much as gradients do, where Adam's differ by their signs.
SGD = OptimConfig(
    name="sgd", lr=0.01, momentum=0.9, global_batch=3, warmup_steps=0, schedule="constant", clip_norm=None
)
WORLD = 2
NUM_STEPS = 2


def scenes(root: Path) -> CocoDataset:
    paths = generate_scenes(root, seed=0, num_train=4, num_val=1, size=64)
    return read_coco(paths.train_annotations, paths.train_images)


def batches(dataset: CocoDataset, global_batch: int, rank: int = 0, world: int = 1, flip: float = 0.5) -> TrainBatches:
    order = Order(len(dataset.images), global_batch, seed=1)
    return TrainBatches(dataset, order, short=64, long=64, flip=flip, rank=rank, world=world)


def engine(config: OptimConfig, num_steps: int = 8, micro_batch: int | None = None) -> Engine:
    torch.set_num_threads(1)  # sums in one order, whatever the machine
    torch.manual_seed(0)
    detector = MimicDet(TINY, len(CLASSES))
    return Engine(detector, config, num_steps=num_steps, steps_per_epoch=2, micro_batch=micro_batch)


def train_and_record(root: Path, rank: int, world: int) -> dict[str, object]:
    """What a rank sees: the means of every step, the gradients of the first and the weights after the last."""
    trained = engine(SGD)
    items = batches(scenes(root), SGD.global_batch, rank, world)
    means = [trained.train_step(items[0])]
    gradients = {name: p.grad.clone() for name, p in trained.detector.named_parameters() if p.grad is not None}
    means += [trained.train_step(items[step]) for step in range(1, NUM_STEPS)]
    return {
        "num_images": len(items[0].images),
        "means": means,
        "gradients": gradients,
        "weights": trained.detector.state_dict(),
        "branch": train_branch(rank, world),
        "branch in parts": train_branch(rank, world, micro_batch=1),
    }


def train_branch(rank: int, world: int, micro_batch: int | None = None) -> list[float]:
    """The weights of a detector of which one weight is read by bright images only: on one rank, on none, on all.

    Where a rank has it, it is the first of the rank's two.
    """
    config = OptimConfig(lr=0.1, weight_decay=0.1, global_batch=4, warmup_steps=0, schedule="constant")
    trained = Engine(Branch(), config, num_steps=10, steps_per_epoch=1, micro_batch=micro_batch)
    for colours in ((10, 20, 200, 30), (10, 20, 30, 40), (210, 20, 200, 220)):
        trained.train_step(plain_batch(*colours[rank_slice(len(colours), rank, world)]))
    return [weight.item() for weight in trained.detector.parameters()]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    return scenes(tmp_path_factory.mktemp("scenes"))


class Line(Detector):
    """The smallest detector: an image's loss is the sum of |matrix @ mean colour + bias| to a power."""

    def __init__(self, power: float) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(2, 3))
        self.bias = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.power = power

    def loss_terms(self, images, targets, *, pad_to=None):
        colours = torch.stack([image.float().mean((1, 2)) for image in images])
        values = ((colours @ self.matrix.T + self.bias).abs() ** self.power).sum(1)
        return LossTerms({"cls": 0.25 * values, "box": 0.75 * values}, {"colour": colours.mean(1)})

    def detect_heads(self, images, *, topk, pad_to=None):
        raise NotImplementedError


class Branch(Detector):
    """Dark images read one weight, bright ones both."""

    def __init__(self) -> None:
        super().__init__()
        self.always = nn.Parameter(torch.ones(1, 1))
        self.bright = nn.Parameter(torch.ones(1, 1))

    def loss_terms(self, images, targets, *, pad_to=None):
        values = []
        for image in images:
            colour = image.float().mean() / 255
            value = colour * self.always
            values.append((value + self.bright if colour > 0.5 else value).square().sum())
        return LossTerms({"cls": torch.stack(values)}, {})

    def detect_heads(self, images, *, topk, pad_to=None):
        raise NotImplementedError


def plain_batch(*colours: int) -> Batch:
    images = [torch.full((3, 4, 4), colour, dtype=torch.uint8) for colour in colours]
    return Batch(images, [{} for _ in colours], (4, 4), [100 + colour for colour in colours])


def line_engine(config: OptimConfig, power: float = 2) -> Engine:
    return Engine(Line(power), config, num_steps=10, steps_per_epoch=1)


# ---- learning rate ----


def test_the_learning_rate_rises_linearly_to_its_peak():
    config = replace(SGD, lr=2.0, warmup_steps=4)

    rates = [learning_rate(step, config, 100, 10) for step in range(7)]

    assert rates == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0, 2.0])


def test_a_cosine_schedule_ends_near_zero():
    config = replace(SGD, lr=2.0, schedule="cosine")

    rates = [learning_rate(step, config, 100, 10) for step in range(101)]

    assert rates[0] == 2.0
    assert rates[25] == pytest.approx(1 + math.sqrt(0.5))
    assert rates[50] == pytest.approx(1.0)
    assert 0 < rates[99] < 1e-3
    assert rates[100] == 0.0
    assert rates == sorted(rates, reverse=True)


def test_a_cosine_schedule_is_warmed_up_too():
    config = replace(SGD, lr=1.0, schedule="cosine", warmup_steps=9)
    unwarmed = replace(config, warmup_steps=0)

    assert learning_rate(4, config, 100, 10) == pytest.approx(0.5 * learning_rate(4, unwarmed, 100, 10))


def test_step_milestones_count_epochs_of_uneven_length():
    config = replace(SGD, lr=1.0, schedule="step", milestones=(2, 3), gamma=0.1)

    rates = [learning_rate(step, config, 100, 2.5) for step in range(10)]

    # Epoch 2 ends within step 4 (from 0), epoch 3 within step 7.
    assert rates == pytest.approx([1.0] * 5 + [0.1] * 3 + [0.01] * 2)


# ---- one step ----


def test_weights_without_a_second_dimension_are_not_decayed_and_frozen_ones_are_left_out():
    detector = MimicDet(replace(TINY, backbone=replace(TINY.backbone)), len(CLASSES))
    detector.backbone.stages[0].requires_grad_(False)

    decayed, undecayed = build_optimizer(detector, replace(SGD, weight_decay=0.25)).param_groups

    assert decayed["weight_decay"] == 0.25
    assert undecayed["weight_decay"] == 0
    frozen = {id(p) for p in detector.backbone.stages[0].parameters()}
    of_group = {id(p): group is decayed for group in (decayed, undecayed) for p in group["params"]}
    assert not frozen & of_group.keys()
    assert len(frozen) + len(of_group) == len(list(detector.parameters()))
    for name, p in detector.named_parameters():
        if id(p) in of_group:
            assert of_group[id(p)] == (p.ndim > 1), name
    assert any("bias" in name for name, p in detector.named_parameters() if not of_group.get(id(p), True))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_decay_shrinks_a_matrix_only(name):
    config = replace(SGD, name=name, momentum=0.0, lr=0.5, weight_decay=0.1, global_batch=1)
    trained = line_engine(config)

    trained.train_step(plain_batch(0))  # black: no gradient for the matrix, and none for the bias of zero

    torch.testing.assert_close(trained.detector.matrix.detach(), torch.full((2, 3), 1 - 0.5 * 0.1))
    assert torch.equal(trained.detector.bias, torch.zeros(2))
    assert torch.equal(trained.detector.frozen, torch.ones(2, 2))


def test_a_step_reports_means_over_the_global_batch():
    trained = line_engine(replace(SGD, global_batch=2, lr=1e-5))

    means = trained.train_step(plain_batch(1, 3))

    # Per image 2 rows of (3 c)^2; the gradient of a matrix entry is the mean of 2 (3 c) c, of the bias 2 (3 c).
    assert float(means["loss"]) == pytest.approx((18 + 162) / 2)
    assert float(means["cls"]) == pytest.approx(0.25 * 90)
    assert float(means["box"]) == pytest.approx(0.75 * 90)
    assert float(means["colour"]) == pytest.approx(2)
    assert float(means["lr"]) == pytest.approx(1e-5)
    assert float(means["grad_norm"]) == pytest.approx(math.sqrt(6 * 30**2 + 2 * 12**2))
    assert trained.step == 1
    assert not any(value.requires_grad for value in means.values())


def test_a_gradient_above_clip_norm_is_scaled_down_to_it():
    config = replace(SGD, global_batch=2, lr=1.0, momentum=0.0, weight_decay=0.0, clip_norm=0.5)
    trained = line_engine(config)
    before = [p.detach().clone() for p in trained.detector.parameters()]

    means = trained.train_step(plain_batch(1, 3))

    moved = math.sqrt(
        sum(float((p.detach() - b).square().sum()) for p, b in zip(trained.detector.parameters(), before, strict=True))
    )
    assert float(means["grad_norm"]) > 50
    assert moved == pytest.approx(0.5, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_before_the_weights_move(dataset):
    trained = engine(replace(SGD, global_batch=2))
    items = batches(dataset, 2)
    trained.train_step(items[0])
    before = {name: value.clone() for name, value in trained.detector.state_dict().items()}
    broken = items[1]
    broken.images[1] = broken.images[1] * math.nan

    with pytest.raises(NonFiniteLossError) as caught:
        trained.train_step(broken)

    message = str(caught.value)
    assert message.startswith("step 2: ")
    assert "refine_box is nan" in message
    assert message.endswith(f"the images that broke: [{broken.image_ids[1]}]")
    assert trained.step == 1
    assert all(torch.equal(value, before[name]) for name, value in trained.detector.state_dict().items())


def test_a_gradient_that_is_not_finite_stops_before_the_weights_move():
    trained = line_engine(replace(SGD, global_batch=1, clip_norm=1.0), power=0.5)
    trained.detector.matrix.data.zero_()  # the square root's loss is 0 there, its slope infinite

    with pytest.raises(
        NonFiniteLossError,
        match=r"step 1: grad_norm is (nan|inf) over the global batch; the batch's images: \[105\]",
    ):
        trained.train_step(plain_batch(5))

    assert torch.equal(trained.detector.matrix, torch.zeros(2, 3))
    assert torch.equal(trained.detector.bias, torch.zeros(2))


def test_the_loss_falls(dataset):
    config = replace(SGD, name="adamw", lr=2e-3, global_batch=4, warmup_steps=3, clip_norm=20.0)
    trained = engine(config)
    items = batches(dataset, 4, flip=0.0)

    history = [trained.train_step(items[step]) for step in range(40)]

    def mean(name, part):
        return sum(float(means[name]) for means in part) / len(part)

    for name, share in (("loss", 0.6), ("refine_cls", 0.5), ("student_cls", 0.4), ("teacher_cls", 0.5)):
        assert mean(name, history[-5:]) < share * mean(name, history[:3]), name


# ---- in parts ----


def test_a_batch_in_parts_shares_its_images():
    whole = plain_batch(1, 2, 3, 4, 5)

    parts = whole.parts(2)

    assert [part.image_ids for part in parts] == [[101, 102], [103, 104], [105]]
    shared = [image for part in parts for image in part.images]
    assert all(ours is theirs for ours, theirs in zip(shared, whole.images, strict=True))
    assert [len(part.targets) for part in parts] == [2, 2, 1]
    assert {part.pad_to for part in parts} == {whole.pad_to}
    assert whole.parts(5) == whole.parts(9) == whole.parts(None) == [whole]


def test_a_step_in_parts_is_the_same_but_for_the_order_of_sums(dataset):
    items = batches(dataset, 4)
    config = replace(SGD, global_batch=4)
    whole, parts = engine(config), engine(config, micro_batch=3)

    expected, means = whole.train_step(items[0]), parts.train_step(items[0])

    assert means.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(means[name], value, rtol=1e-4, atol=1e-5, msg=name)
    for (name, weight), moved in zip(whole.detector.named_parameters(), parts.detector.parameters(), strict=True):
        torch.testing.assert_close(moved, weight, rtol=1e-4, atol=1e-5, msg=name)


def test_no_more_images_than_asked_for_are_put_through_at_once():
    seen = []
    trained = Engine(Line(2), replace(SGD, global_batch=5), num_steps=10, steps_per_epoch=1, micro_batch=2)
    losses = trained.detector.loss_terms
    trained.detector.loss_terms = lambda images, *args, **named: (
        seen.append((len(images), trained.detector.bias.grad is None)) or losses(images, *args, **named)
    )

    trained.train_step(plain_batch(1, 2, 3, 4, 5))

    # Each part's gradient is there, and its graph gone, before the next part's turn.
    assert seen == [(2, True), (2, False), (1, False)]


def test_a_part_that_is_not_finite_stops_before_the_weights_move_and_names_its_image():
    trained = Engine(Line(2), replace(SGD, global_batch=3), num_steps=10, steps_per_epoch=1, micro_batch=1)
    broken = plain_batch(1, 2, 3)
    broken.images[0] = broken.images[0] * math.nan

    with pytest.raises(NonFiniteLossError, match=r"step 1: loss is nan.*; the images that broke: \[101\]"):
        trained.train_step(broken)

    assert torch.equal(trained.detector.matrix, torch.ones(2, 3))


@pytest.mark.parametrize("micro_batch", [0, -2])
def test_parts_of_no_image_are_refused(micro_batch):
    with pytest.raises(UserError, match=f"micro_batch {micro_batch}: expected 1 image or more"):
        Engine(Line(2), SGD, num_steps=10, steps_per_epoch=1, micro_batch=micro_batch)


def test_parts_are_refused_where_norms_learn_from_the_batch():
    detector = MimicDet(replace(TINY, backbone=replace(TINY.backbone, norm="sync_bn")), len(CLASSES))

    Engine(detector, SGD, num_steps=10, steps_per_epoch=1)
    with pytest.raises(UserError, match=r"micro_batch 4: the detector's batch norms .* group_norm or frozen_bn"):
        Engine(detector, SGD, num_steps=10, steps_per_epoch=1, micro_batch=4)


# ---- any number of workers ----


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What two processes record that train together, one image of each step on one and two on the other."""
    root = tmp_path_factory.mktemp("ranks")
    scenes(root)  # made before both look for it
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(root), str(rank)], env=environment) for rank in range(WORLD)
    ]
    try:
        codes = [process.wait(120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * WORLD
    return [torch.load(root / f"rank-{rank}.pt") for rank in range(WORLD)]


def test_two_workers_with_uneven_slices_step_as_one_does(ranks, tmp_path):
    alone = train_and_record(tmp_path, 0, 1)

    assert [rank["num_images"] for rank in ranks] == [1, 2]
    for rank in ranks:
        assert rank["gradients"].keys() == alone["gradients"].keys()
        for name, gradient in alone["gradients"].items():
            torch.testing.assert_close(rank["gradients"][name], gradient, rtol=1e-4, atol=1e-5, msg=name)
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(rank["weights"][name], weight, rtol=1e-4, atol=1e-5, msg=name)
        for means, expected in zip(rank["means"], alone["means"], strict=True):
            assert means.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(means[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_weight_that_a_worker_s_images_do_not_read_is_no_hindrance(ranks):
    alone = train_branch(0, 1)

    assert all(weight != 1 for weight in alone)
    for rank in ranks:
        assert rank["branch"] == pytest.approx(alone, rel=1e-6)
        assert rank["branch in parts"] == pytest.approx(alone, rel=1e-6)


def test_all_workers_hold_the_same(ranks):
    first, second = ranks
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
    for means, others in zip(first["means"], second["means"], strict=True):
        assert all(torch.equal(value, others[name]) for name, value in means.items())


# ---- any restart ----


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(dataset, tmp_path, name):
    config = replace(SGD, name=name, lr=2e-3, schedule="cosine", warmup_steps=2, clip_norm=5.0)
    items = batches(dataset, config.global_batch)
    whole = engine(config)
    for step in range(6):
        whole.train_step(items[step])

    first = engine(config)
    for step in range(3):
        first.train_step(items[step])
    meta = {"step": first.step, "classes": list(CLASSES)}
    checkpoint.save(tmp_path, first.detector.state_dict(), first.state_dict(), meta)
    second = engine(config)
    for p in second.detector.parameters():
        p.data.uniform_()  # nothing of the start may be left
    newest = checkpoint.latest(tmp_path, warn=pytest.fail)
    second.detector.load_state_dict(newest.weights())
    second.load_state_dict(newest.state())
    assert second.step == 3
    for step in range(3, 6):
        second.train_step(items[step])

    assert second.step == whole.step == 6
    for key, weight in whole.detector.state_dict().items():
        assert torch.equal(second.detector.state_dict()[key], weight), key
    states = [e.optimizer.state_dict()["state"] for e in (whole, second)]
    for index, values in states[0].items():
        assert all(torch.equal(value, states[1][index][key]) for key, value in values.items())


# ---- evaluation ----


def test_evaluation_leaves_no_gradient_and_answers_per_head_and_image(dataset):
    detector = MimicDet(TINY, len(CLASSES))
    items = EvalBatches(dataset, short=64, long=64, batch_size=3)

    answers = list(evaluate_pass(detector, (items[i] for i in range(len(items))), topk=5))

    assert not detector.training
    assert torch.is_grad_enabled()
    for heads, num_images in zip(answers, (3, 1), strict=True):
        assert {"student", "teacher"} <= heads.keys()
        for found in heads.values():
            assert len(found) == num_images
            assert not any(value.requires_grad for one in found for value in one.values())


if __name__ == "__main__":
    folder, own_rank = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=own_rank, world_size=WORLD)
    torch.save(train_and_record(folder, own_rank, WORLD), folder / f"rank-{own_rank}.pt")
    dist.destroy_process_group()
