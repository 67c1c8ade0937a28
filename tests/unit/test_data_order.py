"""Contract 1: the order is a function of (seed, step, slot) alone."""

import dataclasses
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimiclab.data.order import Order, Slot, Stream, rank_slice, repeat_factors, sample_key, tile_key, uniform


@st.composite
def any_order(draw: st.DrawFn, repeats: bool = False) -> Order:
    """An order with any of the options; with factors for repeats where these are asked for."""
    num_images = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return Order(
        num_images,
        global_batch=draw(st.integers(1, 17)),
        seed=draw(st.integers(0, 2**63 - 1)),
        block=draw(st.none() | st.integers(1, 9)),
        window=draw(st.integers(1, 4)),
        portrait=rng.random(num_images) < draw(st.floats(0, 1)) if draw(st.booleans()) else None,
        repeats=1 + rng.exponential(0.6, num_images) if repeats else None,
    )


orders = any_order()
repeating = any_order(repeats=True)


def epoch_of(order: Order, epoch: int) -> list[Slot]:
    """The samples of an epoch, in order."""
    first = order.epoch_end_step(epoch) - 1 if epoch else 0
    steps = range(first, order.epoch_end_step(epoch + 1))
    return [slot for step in steps for slot in order.slots(step) if slot.epoch == epoch]


@settings(deadline=None)
@given(orders | repeating, st.sampled_from([1, 2, 3, 5]), st.integers(0, 30))
def test_ranks_together_are_the_global_batch(order: Order, world: int, step: int) -> None:
    slots = order.slots(step)
    parts = [slots[rank_slice(order.global_batch, rank, world)] for rank in range(world)]
    assert [slot for part in parts for slot in part] == slots
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(orders, st.integers(1, 4))
def test_every_epoch_shows_every_image_once(order: Order, epochs: int) -> None:
    seen = Counter((slot.epoch, slot.index) for step in range(order.num_steps(epochs)) for slot in order.slots(step))
    assert max(seen.values()) == 1
    complete = {(epoch, index) for epoch in range(epochs) for index in range(order.num_images)}
    assert complete <= seen.keys()


@settings(deadline=None)
@given(orders | repeating, st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_a_step_does_not_depend_on_what_was_asked_before(order: Order, steps: list[int]) -> None:
    sequential = [order.slots(step) for step in range(max(steps) + 1)]
    for step in steps:
        restarted = dataclasses.replace(order)  # another process, with nothing remembered
        assert restarted.slots(step) == order.slots(step) == sequential[step]


@settings(deadline=None)
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
    assert [slot.index for slot in Order(8, 8, 3, block=2, window=2).slots(0)] == [6, 2, 7, 3, 1, 5, 4, 0]
    portrait = np.arange(8) % 3 == 0
    assert [slot.index for slot in Order(8, 3, 3, portrait=portrait).slots(1)] == [6, 3, 0]
    assert [slot.index for slot in Order(4, 8, 3, repeats=np.array([1, 1.5, 2.5, 1])).slots(0)] == [
        1,
        3,
        2,
        2,
        2,
        0,
        2,
        3,
    ]
    assert sample_key(3, 5, 7) == 4626660290447415421
    assert tile_key(4626660290447415421, 2) == 5943064887091603932


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
    first = [uniform(key, Stream.FLIP) for key in keys]
    second = [uniform(key, Stream.SHORT) for key in keys]
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


def test_options_of_another_data_set_are_refused() -> None:
    with pytest.raises(ValueError, match="portrait of an order must have a value for each of 4 images"):
        Order(4, 2, seed=0, portrait=np.zeros(3, dtype=np.bool_))
    for factor in (0.5, np.inf, np.nan):
        with pytest.raises(ValueError, match="repeats of an order must be finite and 1 or more"):
            Order(4, 2, seed=0, repeats=np.array([1, factor, 1, 1]))


@settings(deadline=None)
@given(orders | repeating, st.integers(0, 3))
def test_positions_count_the_samples_of_an_epoch(order: Order, epoch: int) -> None:
    samples = epoch_of(order, epoch)
    assert [slot.position for slot in samples] == list(range(len(samples)))


@settings(deadline=None)
@given(any_order(), st.integers(0, 3), st.integers(1, 60))
def test_a_stretch_of_an_epoch_reads_few_blocks(order: Order, epoch: int, length: int) -> None:
    order = dataclasses.replace(order, block=order.block or 3, portrait=None)
    assert order.block is not None
    indices = [slot.index for slot in epoch_of(order, epoch)]
    # As many windows as a stretch may touch; the last block of the set may be short, once.
    bound = order.window * (2 + length // max(1, order.window * order.block - order.block + 1))
    for start in range(len(indices)):
        assert len({index // order.block for index in indices[start : start + length]}) <= bound
    # An image never is farther from its block's others than a window.
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(index // order.block, []).append(place)
    assert all(max(block) - min(block) < order.window * order.block for block in places.values())


def test_blocks_change_their_company_and_their_inner_order_from_epoch_to_epoch() -> None:
    order = Order(64, 64, seed=0, block=4, window=2)
    epochs = [[slot.index for slot in order.slots(epoch)] for epoch in range(50)]
    company = [frozenset(index // 4 for index in epoch[:8]) for epoch in epochs]
    assert len(set(company)) > 30
    assert all(len(blocks) == 2 for blocks in company)
    # Every image comes early as often as late.
    early = Counter(index for epoch in epochs for index in epoch[:32])
    assert all(10 <= early[index] <= 40 for index in range(64))
    inner = Counter(tuple(index % 4 for index in epoch if index // 4 == 3) for epoch in epochs)
    assert len(inner) > 15


def test_a_window_over_all_blocks_shuffles_every_image_with_every_other() -> None:
    full, blocks = Order(100, 100, seed=1), Order(100, 100, seed=1, block=10, window=10)
    assert [slot.index for slot in full.slots(0)] == [slot.index for slot in blocks.slots(0)]


def mixed_batches(order: Order, epoch: int) -> tuple[int, int]:
    """How many batches that lie inside of an epoch show both kinds of images, and how many there are."""
    assert order.portrait is not None
    batches: dict[int, set[bool]] = {}
    for step in range(order.epoch_end_step(epoch) if epoch else 0, order.epoch_end_step(epoch + 1)):
        slots = order.slots(step)
        if all(slot.epoch == epoch for slot in slots):
            batches[step] = {bool(order.portrait[slot.index]) for slot in slots}
    return sum(len(kinds) == 2 for kinds in batches.values()), len(batches)


@settings(deadline=None)
@given(orders | repeating, st.floats(0, 1), st.integers(0, 4))
def test_batches_inside_of_an_epoch_are_of_one_kind_but_for_one(order: Order, share: float, epoch: int) -> None:
    portrait = np.random.default_rng(0).random(order.num_images) < share
    order = dataclasses.replace(order, portrait=portrait)
    mixed, num = mixed_batches(order, epoch)
    assert mixed <= min(1, num)


@settings(deadline=None)
@given(orders | repeating, st.integers(0, 3))
def test_grouping_lets_few_images_wait(order: Order, epoch: int) -> None:
    grouped = dataclasses.replace(order, portrait=np.random.default_rng(1).random(order.num_images) < 0.3)
    plain = dataclasses.replace(order, portrait=None)
    before, after = ([slot.index for slot in epoch_of(each, epoch)] for each in (plain, grouped))
    assert Counter(before) == Counter(after)
    for end in range(len(after)):
        shown = Counter(after[:end])
        assert (Counter(before[:end]) - shown).total() < 2 * order.global_batch


def test_grouping_is_what_makes_batches_pure() -> None:
    portrait = np.arange(200) % 3 == 0
    plain = Order(200, 8, seed=0)
    grouped = Order(200, 8, seed=0, portrait=portrait)
    pure = [
        sum(len({bool(portrait[slot.index]) for slot in order.slots(step)}) == 1 for step in range(100))
        for order in (plain, grouped)
    ]
    assert pure[0] < 20
    assert pure[1] >= 90


@settings(deadline=None)
@given(repeating, st.integers(0, 4))
def test_an_epoch_shows_an_image_as_often_as_its_factor_says(order: Order, epoch: int) -> None:
    assert order.repeats is not None
    times = Counter(slot.index for slot in epoch_of(order, epoch))
    for index, factor in enumerate(order.repeats):
        assert int(factor) <= times[index] <= int(factor) + 1


@settings(deadline=None)
@given(repeating, st.integers(1, 5))
def test_an_epoch_of_repeats_ends_with_its_last_sample(order: Order, epochs: int) -> None:
    seen = Counter(slot.epoch for step in range(order.num_steps(epochs)) for slot in order.slots(step))
    samples = sum(seen[epoch] for epoch in range(epochs))
    assert all(len(epoch_of(order, epoch)) == seen[epoch] for epoch in range(epochs))
    assert order.num_steps(epochs) == order.epoch_end_step(epochs) == -(-samples // order.global_batch)


def test_fractions_of_repeats_are_drawn_evenly_and_apart() -> None:
    order = Order(3, 1, seed=0, repeats=np.array([1.25, 1.75, 2.0]))
    num = 400
    times = [Counter(slot.index for slot in epoch_of(order, epoch)) for epoch in range(num)]
    assert sum(epoch[0] for epoch in times) / num == pytest.approx(1.25, abs=0.07)
    assert sum(epoch[1] for epoch in times) / num == pytest.approx(1.75, abs=0.07)
    assert all(epoch[2] == 2 for epoch in times)
    both = sum(epoch[0] == epoch[1] == 2 for epoch in times) / num
    assert both == pytest.approx(0.25 * 0.75, abs=0.06)
    assert order.steps_per_epoch == 5
    assert order.num_steps(num) == pytest.approx(5 * num, rel=0.02)


def test_factors_of_one_change_nothing() -> None:
    plain, once = Order(30, 4, seed=2), Order(30, 4, seed=2, repeats=np.ones(30))
    assert [once.slots(step) for step in range(40)] == [plain.slots(step) for step in range(40)]
    assert once.steps_per_epoch == plain.steps_per_epoch == 7.5


def test_repeat_factors_are_those_of_the_lvis_paper() -> None:
    # Class 0 in all of 100 images but the last, twice in the first, class 1 in four, class 3 in one; none has class 2.
    objects = [(image, 0) for image in range(99)] + [(0, 0), (95, 1), (95, 1), (96, 1), (97, 1), (98, 3), (98, 1)]
    images, labels = np.array(objects).T
    factors = repeat_factors(100, images, labels, threshold=0.09)
    assert factors[:95].tolist() == [1.0] * 95
    assert factors[95:].tolist() == pytest.approx([1.5, 1.5, 1.5, 3.0, 1.0])
    assert repeat_factors(4, np.array([1]), np.array([1]), threshold=1.0).tolist() == [1.0, 2.0, 1.0, 1.0]
    none = np.zeros(0, dtype=np.int64)
    assert repeat_factors(2, none, none, threshold=1.0).tolist() == [1.0, 1.0]


@settings(deadline=None)
@given(orders | repeating, st.integers(0, 20), st.lists(st.floats(0, 1, exclude_max=True), min_size=1))
def test_a_companion_is_of_the_same_epoch_and_near(order: Order, step: int, draws: list[float]) -> None:
    slot = order.slots(step)[-1]
    epoch = [other.index for other in epoch_of(order, slot.epoch)]
    reach = len(epoch) if order.block is None else order.window * order.block
    near = epoch[max(0, slot.position - reach) : slot.position + reach + 1]
    assert {order.companion(slot, draw) for draw in draws} <= set(near)


def test_companions_are_drawn_evenly() -> None:
    order = Order(50, 5, seed=0)
    slot = order.slots(3)[2]
    found = Counter(order.companion(slot, (draw + 0.5) / 200) for draw in range(200))
    assert set(found.values()) == {4}
    assert len(found) == 50


def test_a_long_run_of_repeats_is_ordered_to_its_end() -> None:
    order = Order(3, 2, seed=0, repeats=np.array([1.5, 1.0, 1.0]))
    ends = [order.epoch_end_step(epoch) for epoch in range(1, 70)]
    assert all(1 <= b - a <= 3 for a, b in pairwise(ends))
    assert order.slots(ends[-1] - 1)[0].epoch >= 67
