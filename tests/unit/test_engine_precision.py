"""Half precisions: finite from the first step on, close to fp32, and a loss scale that mends itself."""

import copy
import math

import pytest
import torch
from torch import Tensor

from mimicdet import MimicDet, ModelConfig
from mimicdet.config import AnchorConfig, BackboneConfig, PyramidConfig, StudentConfig, TeacherConfig
from mimiclab.engine import Batch, Engine, NonFiniteLossError
from mimiclab.optim import OptimConfig

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ModelConfig(
    backbone=BackboneConfig(name="resnet18", width=16),
    pyramid=PyramidConfig(channels=16, max_level=5),
    anchors=AnchorConfig(scale=2),
    student=StudentConfig(head_width=32, offset_channels=(8, 8), offsets="analytic_learned"),
    teacher=TeacherConfig(num_rois=16, num_convs=1),
)


def engine(precision: str) -> Engine:
    torch.manual_seed(0)
    config = OptimConfig(
        name="sgd", lr=1e-3, global_batch=2, warmup_steps=0, schedule="constant", precision=precision, clip_norm=None
    )
    return Engine(MimicDet(TINY, 3), config, num_steps=10, steps_per_epoch=5)


def set_scale(trained: Engine, scale: float) -> None:
    state = trained.state_dict()
    trained.load_state_dict({**state, "scaler": {**state["scaler"], "scale": scale}})


def batch(step: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(step)
    images = [torch.randint(256, (3, 64, 96), generator=generator, dtype=torch.uint8) for _ in range(2)]
    targets = [
        {"boxes": torch.tensor([[8.0, 8, 40, 44]]), "labels": torch.tensor([1]), "key": torch.tensor(10 * step)},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "key": torch.tensor(10 * step + 1)},
    ]
    return Batch(images, targets, (64, 96), [7, 8])


def dtypes(model: MimicDet) -> dict[str, torch.dtype]:
    """What every convolution and matrix product answers in, during the next pass."""
    seen: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.dtype}))
    return seen


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_networks_run_in_half_precision_and_losses_do_not(precision: str, dtype: torch.dtype) -> None:
    trained = engine(precision)
    assert isinstance(trained.detector, MimicDet)
    seen = dtypes(trained.detector)
    answers: list[Tensor] = []
    losses = trained.detector.loss_terms
    trained.detector.loss_terms = lambda *a, **k: answers.append(terms := losses(*a, **k)) or terms  # type: ignore
    trained.train_step(batch())
    # Boxes and the order of proposals come from these two.
    assert {seen.pop("refinement.objectness"), seen.pop("refinement.deltas")} == {torch.float32}
    assert set(seen.values()) == {dtype}
    assert {"backbone.stages.0.0", "pyramid.output.3", "refinement.conv", "student.logits", "teacher.deltas"} <= set(
        seen
    )
    (terms,) = answers
    assert {values.dtype for values in {**terms.losses, **terms.metrics}.values()} == {torch.float32}
    assert {p.dtype for p in trained.detector.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_losses_are_finite_from_the_first_step_on_and_the_weights_move(precision: str) -> None:
    trained = engine(precision)
    before = {name: value.clone() for name, value in trained.detector.named_parameters()}
    for step in range(6):
        means = trained.train_step(batch(step))
        assert all(value.isfinite() for value in means.values()), (step, means)
    moved = [name for name, value in trained.detector.named_parameters() if not torch.equal(value, before[name])]
    assert len(moved) > 0.9 * len(before)
    assert ("loss_scale" in means) == (precision == "fp16")


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.03), ("fp16", 0.005)])
def test_half_precision_gives_about_the_same_losses(precision: str, tolerance: float) -> None:
    exact, half = (engine(p).train_step(batch()) for p in ("fp32", precision))
    # The sampled boxes are the same as long as no discrete choice flips; those of the teacher are random by key.
    for name in ("refine_cls", "refine_box", "teacher_cls", "loss"):
        assert float(half[name]) == pytest.approx(float(exact[name]), rel=tolerance), name


@pytest.mark.slow
def test_an_overflow_of_the_scale_costs_a_step_and_not_the_weights() -> None:
    trained = engine("fp16")
    set_scale(trained, 2.0**20)
    before = {name: value.clone() for name, value in trained.detector.named_parameters()}
    means = trained.train_step(batch())
    assert "grad_norm" not in means
    assert trained.step == 1
    assert all(torch.equal(value, before[name]) for name, value in trained.detector.named_parameters())
    assert float(means["loss_scale"]) == 2.0**20
    assert float(trained.train_step(batch(1))["loss_scale"]) == 2.0**19
    last = {}
    for step in range(2, 20):
        last = trained.train_step(batch(step))
    assert "grad_norm" in last  # small enough at last, and nothing that was skipped left a trace
    assert all(value.isfinite().all() for value in trained.detector.parameters())


def test_the_scale_goes_on_after_a_restart() -> None:
    trained = engine("fp16")
    set_scale(trained, 2.0**12)
    trained.train_step(batch())
    again = engine("fp16")
    again.load_state_dict(copy.deepcopy(trained.state_dict()))  # torch would share the momentum
    again.detector.load_state_dict(trained.detector.state_dict())
    for step in (1, 2):
        ours, theirs = again.train_step(batch(step)), trained.train_step(batch(step))
        assert {k: float(v) for k, v in ours.items()} == {k: float(v) for k, v in theirs.items()}
    assert float(ours["loss_scale"]) == 2.0**11  # halved by the first step


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_broken_weights_stop_training_in_any_precision(precision: str) -> None:
    trained = engine(precision)
    trained.detector.student.deltas.bias.data[0] = math.nan  # type: ignore[union-attr]
    with pytest.raises(NonFiniteLossError, match=r"step 1: loss is nan, student_box is nan over the global batch; the"):
        trained.train_step(batch())
