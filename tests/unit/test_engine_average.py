"""The exponential moving average of the weights: what is evaluated, saved and deployed."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from mimicdet.interface import Detector, LossTerms
from mimiclab.engine import Batch, Engine
from mimiclab.optim import OptimConfig

pytestmark = pytest.mark.usefixtures("one_thread")

AVERAGED = OptimConfig(lr=0.1, global_batch=2, warmup_steps=0, schedule="constant", ema_decay=0.6)


class Norm(Detector):
    """A batch norm over colours, so that there are buffers, of integers too, and a weight that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.matrix = nn.Parameter(torch.ones(3, 2))
        self.frozen = nn.Parameter(torch.tensor([0.1, 0.7]), requires_grad=False)

    def loss_terms(self, images, targets, *, pad_to=None):
        colours = torch.stack([image.float().mean((1, 2)) for image in images]) / 255
        return LossTerms({"cls": (self.norm(colours) @ self.matrix - self.frozen).square().sum(1)}, {})

    def detect(self, images, *, pad_to=None):
        raise NotImplementedError

    def detect_heads(self, images, *, topk, pad_to=None):
        raise NotImplementedError


def engine(config: OptimConfig = AVERAGED) -> Engine:
    return Engine(Norm(), config, num_steps=20, steps_per_epoch=1)


def batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    images = [torch.randint(256, (3, 4, 4), generator=generator, dtype=torch.uint8) for _ in range(2)]
    return Batch(images, [{}, {}], (4, 4), [0, 1])


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_without_a_decay_the_detector_itself_is_evaluated() -> None:
    trained = engine(replace(AVERAGED, ema_decay=None))
    trained.train_step(batch(0))
    assert trained.evaluated is trained.detector
    assert_equal(trained.weights(), trained.detector.state_dict())
    assert trained.state_dict().keys() == {"step", "optimizer", "scaler"}


def test_the_average_follows_the_weights_at_its_decay_and_faster_at_first() -> None:
    trained = engine()
    expected = trained.detector.matrix.detach().clone()
    for step in range(20):  # from the 14th on the decay is its own
        trained.train_step(batch(step))
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * trained.detector.matrix.detach()
        torch.testing.assert_close(trained.evaluated.matrix.detach(), expected, rtol=1e-5, atol=0)
    assert not torch.allclose(trained.evaluated.matrix, trained.detector.matrix)


def test_averaging_leaves_training_as_it_is() -> None:
    plain, averaged = engine(replace(AVERAGED, ema_decay=None)), engine()
    for step in range(4):
        assert_equal(plain.train_step(batch(step)), averaged.train_step(batch(step)))
    assert_equal(plain.detector.state_dict(), averaged.detector.state_dict())


def test_statistics_and_frozen_weights_are_the_detector_s() -> None:
    trained = engine()
    for step in range(3):
        trained.train_step(batch(step))
    ours, theirs = trained.weights(), trained.detector.state_dict()
    assert int(ours["norm.num_batches_tracked"]) == 3
    for name in ("norm.num_batches_tracked", "norm.running_mean", "norm.running_var", "frozen"):
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("given", ["to the engine", "to the detector"])
def test_an_average_goes_on_with_the_same_bits(given: str) -> None:
    whole = engine()
    for step in range(3):
        whole.train_step(batch(step))
    weights, state = copy.deepcopy((whole.weights(), whole.state_dict()))
    again = engine()
    for value in (*again.detector.parameters(), *again.evaluated.parameters()):
        value.data.uniform_()
    if given == "to the engine":
        again.load_state_dict(state, weights)
    else:
        again.detector.load_state_dict(weights)
        again.load_state_dict(state)
    for step in range(3, 6):
        assert_equal(again.train_step(batch(step)), whole.train_step(batch(step)))
    assert_equal(again.weights(), whole.weights())
    assert_equal(again.detector.state_dict(), whole.detector.state_dict())


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, float("nan")])
def test_a_decay_that_averages_nothing_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=f"ema_decay must be between 0 and 1, or null for no average, found {decay}"):
        OptimConfig(ema_decay=decay)
