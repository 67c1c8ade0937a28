"""Contract 1: the order is a function of (seed, step, slot) alone."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimiclab.data.order import FLIP, SHORT, Order, rank_slice, sample_key, uniform

orders = st.builds(
    Order,
    num_images=st.integers(1, 40),
    global_batch=st.integers(1, 17),
    seed=st.integers(0, 2**63 - 1),
)


@given(orders, st.sampled_from([1, 2, 3, 5]), st.integers(0, 30))
def test_ranks_together_are_the_global_batch(order: Order, world: int, step: int) -> None:
    slots = order.slots(step)
    parts = [slots[rank_slice(order.global_batch, rank, world)] for rank in range(world)]
    assert [slot for part in parts for slot in part] == slots
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@given(orders, st.integers(1, 4))
def test_every_epoch_shows_every_image_once(order: Order, epochs: int) -> None:
    seen = Counter((slot.epoch, slot.index) for step in range(order.num_steps(epochs)) for slot in order.slots(step))
    assert max(seen.values()) == 1
    complete = {(epoch, index) for epoch in range(epochs) for index in range(order.num_images)}
    assert complete <= seen.keys()


@given(orders, st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_a_step_does_not_depend_on_what_was_asked_before(order: Order, steps: list[int]) -> None:
    sequential = [order.slots(step) for step in range(max(steps) + 1)]
    assert [order.slots(step) for step in steps] == [sequential[step] for step in steps]


@given(orders, st.integers(1, 5))
def test_an_epoch_ends_with_the_step_that_shows_its_last_image(order: Order, epoch: int) -> None:
    end = order.epoch_end_step(epoch)
    samples = epoch * order.num_images
    assert (end - 1) * order.global_batch < samples <= end * order.global_batch
    assert order.num_steps(epoch) == end


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    def indices(seed: int, epoch: int) -> list[int]:
        return [slot.index for slot in Order(100, 100, seed).slots(epoch)]

    orders = [indices(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert list(range(100)) not in orders


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    # A run that goes on after an update must go on in the same order: these values never change.
    assert [slot.index for slot in Order(8, 8, 3).slots(0)] == [6, 1, 5, 2, 7, 4, 3, 0]
    assert sample_key(3, 5, 7) == 4626660290447415421


def test_every_sample_of_a_run_has_its_own_key() -> None:
    order = Order(num_images=10, global_batch=4, seed=0)
    keys = [slot.key for step in range(50) for slot in order.slots(step)]
    assert len(set(keys)) == 200


def test_keys_are_distinct_and_fit_a_signed_tensor() -> None:
    keys = {sample_key(seed, step, slot) for seed in range(3) for step in range(300) for slot in range(16)}
    assert len(keys) == 3 * 300 * 16
    assert all(0 <= key < 2**63 for key in keys)


def test_uniform_draws_are_even_and_independent_between_streams() -> None:
    keys = [sample_key(0, step, slot) for step in range(500) for slot in range(4)]
    first = [uniform(key, FLIP) for key in keys]
    second = [uniform(key, SHORT) for key in keys]
    assert all(0 <= value < 1 for value in first)
    tenths = Counter(int(value * 10) for value in first)
    assert all(140 <= tenths[tenth] <= 260 for tenth in range(10))
    both = sum(a < 0.5 and b < 0.5 for a, b in zip(first, second, strict=True))
    assert 420 <= both <= 580


def test_a_world_larger_than_the_batch_leaves_ranks_without_images() -> None:
    slices = [rank_slice(2, rank, 5) for rank in range(5)]
    assert [index for part in slices for index in range(2)[part]] == [0, 1]


@pytest.mark.parametrize(("num_images", "global_batch"), [(0, 4), (4, 0)])
def test_an_empty_order_is_refused(num_images: int, global_batch: int) -> None:
    with pytest.raises(ValueError, match="must be 1 or more"):
        Order(num_images, global_batch, seed=0)
