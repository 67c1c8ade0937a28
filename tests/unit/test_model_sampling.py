"""Random samples are a function of (key, stream, candidate); mining takes the highest losses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimicdet.sampling import REFINEMENT, STUDENT, TEACHER, mine, priority, sample

MASK = (1 << 64) - 1


def splitmix(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def reference(key: int, stream: int, candidate: int) -> int:
    """The documented hash in Python's unbounded integers, as a signed 64-bit number."""
    golden = 0x9E3779B97F4A7C15
    start = splitmix((key + stream * golden) & MASK)
    value = splitmix((start + (candidate + 1) * golden) & MASK)
    return value - (1 << 64) if value >> 63 else value


def ranks(key: int, stream: int, candidates: Tensor) -> Tensor:
    return priority(torch.tensor(key), stream, candidates)


def masks(states: str) -> tuple[Tensor, Tensor]:
    """Positive and negative masks of a string of +, - and ignored ones."""
    return torch.tensor([s == "+" for s in states]), torch.tensor([s == "-" for s in states])


states = st.text("+-.", min_size=1, max_size=40)
keys = st.integers(-(2**63), 2**63 - 1)
fractions = st.sampled_from([0.25, 0.5, 1.0])


@settings(deadline=None, max_examples=30)
@given(keys, st.sampled_from([REFINEMENT, TEACHER, STUDENT]), st.lists(st.integers(0, 2**40), min_size=1, max_size=5))
def test_priority_is_the_documented_hash(key: int, stream: int, candidates: list[int]) -> None:
    expected = [reference(key, stream, candidate) for candidate in candidates]
    assert ranks(key, stream, torch.tensor(candidates)).tolist() == expected


@settings(deadline=None, max_examples=50)
@given(states, keys, st.integers(1, 20), fractions)
def test_sample_keeps_its_quota_and_fills_with_negatives(state: str, key: int, num: int, fraction: float) -> None:
    positive, negative = masks(state)
    rank = ranks(key, TEACHER, torch.arange(len(state)))
    chosen = sample(positive, negative, num, fraction, rank).tolist()
    num_positive = min(state.count("+"), max(1, round(num * fraction)))
    num_negative = min(state.count("-"), num - num_positive)
    assert len(chosen) == len(set(chosen))
    assert [state[i] for i in chosen] == ["+"] * num_positive + ["-"] * num_negative
    for kind in "+-":
        taken = [int(rank[i]) for i in chosen if state[i] == kind]
        left = [int(rank[i]) for i in range(len(state)) if state[i] == kind and i not in chosen]
        assert not taken or not left or min(taken) > max(left)


@settings(deadline=None, max_examples=100)
@given(states, keys, st.integers(1, 20), st.integers(1, 20), st.one_of(fractions, st.floats(0.01, 1)))
def test_a_smaller_sample_is_part_of_a_larger_one(state: str, key: int, one: int, other: int, fraction: float) -> None:
    rank = ranks(key, TEACHER, torch.arange(len(state)))
    few, many = (set(sample(*masks(state), num, fraction, rank).tolist()) for num in sorted((one, other)))
    assert few <= many


def test_a_small_share_of_positives_is_one_at_least() -> None:
    positive, negative = masks("+" * 10 + "-" * 10)
    for num, fraction in ((1, 0.25), (2, 0.25), (10, 0.01)):
        chosen = sample(positive, negative, num, fraction, ranks(0, TEACHER, torch.arange(20)))
        assert int(positive[chosen].sum()) == 1
        assert len(chosen) == num


@settings(deadline=None, max_examples=30)
@given(states, keys, st.integers(1, 8), st.randoms(use_true_random=False))
def test_the_same_candidates_are_sampled_whatever_stands_around_them(state: str, key: int, num: int, random) -> None:
    names = [7 * i + 3 for i in range(len(state))]

    def drawn(order: list[int], ignored_before: int) -> set[int]:
        around = "." * ignored_before + "".join(state[i] for i in order)
        candidates = torch.tensor([-1 - i for i in range(ignored_before)] + [names[i] for i in order])
        chosen = sample(*masks(around), num, 0.5, ranks(key, TEACHER, candidates))
        return set(candidates[chosen].tolist())

    order = list(range(len(state)))
    plain = drawn(order, 0)
    random.shuffle(order)
    assert drawn(order, random.randrange(10)) == plain


def test_every_candidate_is_drawn_about_equally_often() -> None:
    counts = torch.zeros(20)
    everyone = torch.ones(20, dtype=torch.bool)
    for key in range(800):  # keys that follow each other are the hardest case
        counts[sample(~everyone, everyone, 5, 0.5, ranks(key, TEACHER, torch.arange(20)))] += 1
    expected = 800 * 5 / 20
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert 2 < chi_square < 50  # 19 degrees of freedom; suspiciously even is wrong as well


def test_streams_and_keys_draw_independently() -> None:
    candidates = torch.arange(4000)

    def normal(key: int, stream: int) -> Tensor:
        rank = ranks(key, stream, candidates).double()
        return (rank - rank.mean()) / rank.std()

    draws = [normal(key, stream) for key in (5, 6, -9) for stream in (REFINEMENT, TEACHER, STUDENT)]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert abs(float((a * b).mean())) < 5 / len(candidates) ** 0.5


@pytest.mark.parametrize("fraction", [None, 0.25, 1.0])
@settings(deadline=None, max_examples=30)
@given(st.data())
def test_mining_takes_exactly_the_highest_losses(fraction: float | None, data: st.DataObject) -> None:
    state = data.draw(states)
    losses = [float(x) for x in data.draw(st.permutations(range(len(state))))]
    num = data.draw(st.integers(1, 20))
    chosen = mine(*masks(state), num, fraction, torch.tensor(losses)).tolist()

    def hardest(kinds: str, count: int) -> list[int]:
        pool = [i for i in range(len(state)) if state[i] in kinds]
        return sorted(pool, key=lambda i: -losses[i])[:count]

    if fraction is None:
        assert chosen == hardest("+-", num)
    else:
        positives = hardest("+", max(1, round(num * fraction)))
        assert chosen == positives + hardest("-", num - len(positives))
