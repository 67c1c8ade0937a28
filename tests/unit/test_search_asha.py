"""Successive halving: decisions with what they were based on; without second comparisons, those of Ray's scheduler."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.schedulers import ASHAScheduler

from mimiclab.search.asha import Asha, Decision

VALUES = st.one_of(st.floats(-1, 1), st.sampled_from([0.0, 0.25, 0.5, math.nan]))


def asha(
    max_t: int = 9, grace_period: int = 1, reduction_factor: int = 3, mode: str = "max", again: bool = True
) -> Asha:
    return Asha(max_t=max_t, grace_period=grace_period, reduction_factor=reduction_factor, mode=mode, again=again)


@pytest.mark.parametrize(
    ("max_t", "grace_period", "reduction_factor", "rungs"),
    [(9, 1, 3, (1, 3)), (10, 1, 3, (1, 3, 9)), (12, 2, 2, (2, 4, 8)), (3, 3, 2, ()), (1, 1, 2, ()), (7, 5, 4, (5,))],
)
def test_rungs_rise_by_the_reduction_factor_and_stay_below_the_last_epoch(
    max_t: int, grace_period: int, reduction_factor: int, rungs: tuple[int, ...]
) -> None:
    assert asha(max_t, grace_period, reduction_factor).rungs == rungs


def test_a_decision_tells_what_it_was_based_on() -> None:
    halving = asha()

    assert halving.decide("a", 1, 0.1) == Decision(True, 1)
    assert halving.decide("b", 1, 0.4) == Decision(True, 1, (0.1,), 0.1)
    # The best third of 0.1 and 0.4 begins two thirds of the way between them.
    assert halving.decide("c", 1, 0.2) == Decision(False, 1, (0.1, 0.4), pytest.approx(0.3), "rung")
    assert halving.decide("b", 2, 0.0) == Decision(True, 1, (0.1, 0.2), pytest.approx(1 / 6))
    assert halving.decide("b", 3, 0.2) == Decision(True, 3)


def test_who_came_first_is_compared_with_those_who_came_later_by_what_it_had_then() -> None:
    halving = asha()
    halving.decide("a", 1, 0.1)
    halving.decide("b", 1, 0.4)

    assert halving.decide("a", 2, 0.9) == Decision(False, 1, (0.4,), 0.4, "rung")


def test_a_trial_is_compared_with_those_at_its_own_rung_alone() -> None:
    halving = asha()
    halving.decide("a", 1, 0.1)
    halving.decide("a", 3, 0.2)
    halving.decide("b", 1, 0.4)

    assert halving.decide("a", 4, 0.2) == Decision(True, 3)
    halving.decide("b", 3, 0.3)
    assert halving.decide("a", 5, 0.9) == Decision(False, 3, (0.3,), 0.3, "rung")


def test_a_trial_that_skips_a_rung_is_never_held_to_it() -> None:
    halving = asha()
    halving.decide("a", 1, 0.9)

    assert halving.decide("b", 4, 0.1) == Decision(True, 3)
    assert halving.decide("b", 5, 0.1) == Decision(True, 3)
    assert halving.decide("c", 1, 0.95).values == (0.9,)


def test_once_means_that_nobody_is_compared_twice() -> None:
    halving = asha(again=False)
    halving.decide("a", 1, 0.1)
    halving.decide("b", 1, 0.4)

    assert halving.decide("a", 2, 0.0) == Decision(True)


def test_low_values_are_the_better_ones_of_a_minimum() -> None:
    halving = asha(mode="min")

    assert halving.decide("a", 1, 0.4).go_on
    assert halving.decide("b", 1, 0.1).go_on
    worse = halving.decide("c", 1, 0.3)
    assert (worse.go_on, worse.values, worse.cutoff) == (False, (0.4, 0.1), pytest.approx(0.2))


def test_a_trial_that_reaches_the_last_epoch_is_left_to_end_by_itself() -> None:
    halving = asha()
    halving.decide("a", 9, 1.0)

    assert halving.decide("b", 9, 0.0) == Decision(True)


def test_nan_stops_no_trial_and_counts_for_none() -> None:
    halving = asha(reduction_factor=2)

    assert halving.decide("a", 1, math.nan).go_on
    assert halving.decide("b", 1, -5.0).cutoff is None
    assert halving.decide("c", 1, math.nan) == Decision(True, 1, (pytest.approx(math.nan, nan_ok=True), -5.0), -5.0)


@st.composite
def searches(draw: st.DrawFn) -> tuple[dict[str, int], str, list[tuple[str, int, float]]]:
    """Rules, and the results of some trials in a random order; each trial's own come in the order of its epochs."""
    max_t = draw(st.integers(1, 20))
    rules = {
        "max_t": max_t,
        "grace_period": draw(st.integers(1, min(3, max_t))),
        "reduction_factor": draw(st.integers(2, 4)),
    }
    left = {
        f"trial-{n}": sorted(draw(st.sets(st.integers(1, max_t), min_size=1, max_size=6)), reverse=True)
        for n in range(draw(st.integers(2, 8)))
    }
    results = []
    while any(left.values()):
        trial = draw(st.sampled_from([name for name, epochs in left.items() if epochs]))
        results.append((trial, left[trial].pop(), draw(VALUES)))
    return rules, draw(st.sampled_from(["max", "min"])), results


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@settings(max_examples=300, deadline=None)
@given(searches())
@pytest.mark.slow
def test_decisions_made_once_are_those_of_rays_scheduler(
    search: tuple[dict[str, int], str, list[tuple[str, int, float]]],
) -> None:
    rules, mode, results = search
    theirs = ASHAScheduler(time_attr="epoch", metric="value", mode=mode, **rules)
    ours = asha(mode=mode, again=False, **rules)
    trials = {name: SimpleNamespace(trial_id=name) for name, _, _ in results}
    for trial in trials.values():
        theirs.on_trial_add(None, trial)
    over = set()
    for name, epoch, value in results:
        if name in over:
            continue
        expected = theirs.on_trial_result(None, trials[name], {"epoch": epoch, "value": value})
        decision = ours.decide(name, epoch, value)
        if epoch == rules["max_t"]:  # Ray's way to end a trial that is over
            assert (expected, decision.go_on) == (ASHAScheduler.STOP, True)
            over.add(name)
            continue
        assert decision.go_on == (expected == ASHAScheduler.CONTINUE)
        if not decision.go_on:
            over.add(name)


@settings(max_examples=300, deadline=None)
@given(searches())
@pytest.mark.slow
def test_the_best_at_the_highest_rung_is_never_stopped(
    search: tuple[dict[str, int], str, list[tuple[str, int, float]]],
) -> None:
    rules, mode, results = search
    halving, sign = asha(mode=mode, **rules), 1 if mode == "max" else -1
    there: dict[int, dict[str, float]] = {rung: {} for rung in halving.rungs}
    stopped: set[str] = set()
    for name, epoch, value in results:
        if name in stopped or epoch >= rules["max_t"] or epoch < rules["grace_period"]:
            continue
        there[max(rung for rung in there if rung <= epoch)].setdefault(name, value)
        if not halving.decide(name, epoch, value).go_on:
            stopped.add(name)
        highest = max(rung for rung in there if there[rung])
        values = [sign * each for each in there[highest].values() if not math.isnan(each)]
        best = {each for each, its in there[highest].items() if values and sign * its == max(values)}
        assert not best & stopped
