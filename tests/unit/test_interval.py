"""The interval between checkpoints: the formulas against simulated training that is interrupted at random."""

import math

import numpy as np
import pytest

from mimiclab.interval import Interval, best_interval


def simulated_loss(interval: Interval, num: int = 400_000) -> float:
    """Share of the time that was lost in `num` intervals, each repeated until no failure comes before its end."""
    work = interval.steps * interval.step_s
    rng = np.random.default_rng(0)
    spent, left = 0.0, num
    while left:
        until_failure = rng.exponential(interval.mtbf_s, left)
        failed = until_failure < work + interval.checkpoint_s
        spent += until_failure[failed].sum() + (left - failed.sum()) * (work + interval.checkpoint_s)
        left = int(failed.sum())
    return 1 - num * work / spent


@pytest.mark.parametrize(("checkpoint_s", "mtbf_s"), [(0.5, 1800.0), (20.0, 1800.0), (60.0, 200.0), (100.0, 100.0)])
def test_the_interval_is_where_simulated_training_loses_least(checkpoint_s: float, mtbf_s: float) -> None:
    best = best_interval(0.01, checkpoint_s, mtbf_s)
    factors = [0.5, 0.7, 0.85, 1.0, 1.2, 1.45, 2.0]
    losses = [
        simulated_loss(Interval(round(best.steps * factor), 0.01, checkpoint_s, mtbf_s), 1_000_000)
        for factor in factors
    ]
    # The valley is flat: neighbours may differ by less than the formula claims to know.
    assert factors[int(np.argmin(losses))] in (0.85, 1.0, 1.2)
    assert losses[3] - min(losses) < 0.002
    assert losses[0] > losses[1] > losses[3] < losses[5] < losses[6]


@pytest.mark.parametrize("steps", [1, 30, 300, 3000])
def test_the_expected_loss_is_that_of_the_simulation(steps: int) -> None:
    interval = Interval(steps, 0.7, 3.0, 900.0)
    assert interval.loss == pytest.approx(simulated_loss(interval), abs=0.003)


def test_it_is_youngs_interval_where_checkpoints_are_cheap() -> None:
    # C / M = 1e-6: the higher orders vanish.
    assert best_interval(0.001, 0.1, 1e5).steps == pytest.approx(math.sqrt(2 * 0.1 * 1e5) / 0.001, rel=0.001)


def test_it_is_dalys_interval_where_they_are_not() -> None:
    # By hand: C = M / 2 gives sqrt(1) (1 + 1/6 + 1/36) - 1/2 of M.
    assert best_interval(0.001, 50.0, 100.0).steps == round((1 + 1 / 6 + 1 / 36 - 0.5) * 100 / 0.001)


def test_when_nothing_helps_it_is_the_time_between_failures() -> None:
    for checkpoint_s in (200.0, 5000.0):
        assert best_interval(1.0, checkpoint_s, 100.0).steps == 100
    assert best_interval(1.0, 1e6, 100.0).loss == 1.0


def test_at_least_one_step_lies_between_checkpoints() -> None:
    assert best_interval(1.0, 0.0, 1800.0).steps == 1
    assert best_interval(600.0, 0.1, 1800.0).steps == 1


def test_it_is_no_shorter_than_it_takes_to_write_a_checkpoint() -> None:
    assert best_interval(0.5, 0.05, 3600.0).steps == 38
    assert best_interval(0.5, 0.05, 3600.0, written_s=18.9).steps == 38
    assert best_interval(0.5, 0.05, 3600.0, written_s=30.2).steps == 61


def test_it_says_what_it_costs() -> None:
    assert str(best_interval(0.5, 1.0, 1800.0)) == (
        "every 119 steps: checkpoints cost 1.7 %, expected loss 3.3 % at one preemption per 30 min"
    )
    assert str(Interval(1, 1.0, 9.0, 90.0)) == (
        "every step: checkpoints cost 90 %, expected loss 91 % at one preemption per 90 s"
    )
    assert str(Interval(10, 1.0, 0.0, 86400.0)).endswith(
        "checkpoints cost 0 %, expected loss 0.0058 % at one preemption per 24 h"
    )


@pytest.mark.parametrize("times", [(0.0, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, 1.0, 0.0), (1.0, math.nan, 1.0)])
def test_times_that_make_no_sense_are_refused(times: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="expected finite times"):
        best_interval(*times)
