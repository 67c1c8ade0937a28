import math

import pytest
import torch

from mimiclab.drill.compare import Difference, compare_histories, compare_metrics, compare_tensors

HISTORY = {"train/loss": [(1, 3.0), (2, math.nan), (3, 2.0)], "student/AP": [(3, 0.5)]}


def changed(series: str, rows: list[tuple[int, float]]) -> list[Difference]:
    return compare_histories(HISTORY, {**HISTORY, series: rows}, lambda _: True)


def test_equal_histories_do_not_differ_in_whatever_order_their_rows_come() -> None:
    assert changed("train/loss", [(3, 2.0), (1, 3.0), (2, math.nan)]) == []


def test_a_hole_is_found() -> None:
    [found] = changed("train/loss", [(1, 3.0), (3, 2.0)])
    assert found == Difference("train/loss", missing=(2,))
    assert str(found) == "train/loss: step 2 missing"


def test_a_duplicate_is_found_whether_or_not_it_has_the_same_value() -> None:
    [found] = changed("train/loss", [(1, 3.0), (2, math.nan), (2, math.nan), (3, 2.0)])
    assert found == Difference("train/loss", duplicate=(2,))
    [found] = changed("train/loss", [(1, 3.0), (1, 3.1), (2, math.nan), (3, 2.0)])
    assert found == Difference("train/loss", duplicate=(1,), differing=(1,))


def test_steps_and_series_that_should_not_be_there_are_found() -> None:
    assert changed("train/loss", [*HISTORY["train/loss"], (4, 1.0)]) == [Difference("train/loss", extra=(4,))]
    assert changed("teacher/AP", [(3, 0.5)]) == [Difference("teacher/AP", extra=(3,))]
    found = compare_histories(HISTORY, {"student/AP": [(3, 0.5)]}, lambda _: True)
    assert found == [Difference("train/loss", missing=(1, 2, 3))]
    assert str(found[0]) == "train/loss: steps 1, 2, 3 missing"


@pytest.mark.parametrize("value", [math.nextafter(2.0, 3.0), math.nan])
def test_a_differing_value_is_found_where_values_are_compared(value: float) -> None:
    rows = [(1, 3.0), (2, math.nan), (3, value)]
    assert changed("train/loss", rows) == [Difference("train/loss", differing=(3,))]
    only_ap = compare_histories(HISTORY, {**HISTORY, "train/loss": rows}, lambda series: series == "student/AP")
    assert only_ap == []


def test_of_many_steps_some_are_named_and_the_rest_is_counted() -> None:
    assert str(Difference("a", missing=tuple(range(1, 9)))) == "a: steps 1, 2, 3, 4, 5 and 3 more missing"
    assert str(Difference("a", missing=(1,), differing=(2, 3))) == "a: step 1 missing; steps 2, 3 differing"


def state() -> dict:
    return {
        "step": 7,
        "optimizer": {"state": {0: {"exp_avg": torch.arange(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
        "nan": torch.tensor([math.nan, 1.0]),
        "none": None,
    }


def test_equal_states_do_not_differ() -> None:
    found = compare_tensors(state(), state())
    assert (found.differing, found.largest) == ((), 0.0)


def test_a_differing_weight_is_found_and_measured() -> None:
    other = state()
    other["optimizer"]["state"][0]["exp_avg"][1] += 0.25
    found = compare_tensors(state(), other)
    assert found.differing == ("optimizer.state.0.exp_avg",)
    assert found.largest == 0.25


def test_bits_are_compared_and_not_numbers() -> None:
    assert compare_tensors({"w": torch.tensor([0.0])}, {"w": torch.tensor([-0.0])}).differing == ("w",)
    assert compare_tensors({"w": torch.zeros(2)}, {"w": torch.zeros(2, dtype=torch.float64)}).differing == ("w",)
    assert compare_tensors({"w": torch.zeros(2)}, {"w": torch.zeros(1, 2)}).differing == ("w",)
    assert math.isnan(compare_tensors({"w": torch.zeros(1)}, {"w": torch.tensor([math.nan])}).largest)
    assert compare_tensors({"w": torch.tensor(1.0)}, {"w": torch.tensor(1.0)}).differing == ()


def test_a_value_and_a_name_that_differ_are_found() -> None:
    other = state()
    other["optimizer"]["param_groups"][0]["lr"] = 0.2
    del other["none"]
    found = compare_tensors(state(), other)
    assert found.differing == ("none", "optimizer.param_groups.0.lr")
    assert found.largest == pytest.approx(0.1)


def test_the_ap_of_each_head_is_compared() -> None:
    found = compare_metrics(
        {"student/AP": 0.5, "student/AP50": 0.7, "student/AP/disk": 0.1, "teacher/AP": 0.6, "gap/AP": 0.1},
        {"student/AP": 0.25, "student/AP50": 0.0, "student/AP/disk": 0.9, "gap/AP": 0.9},
    )
    assert found["student/AP"] == -0.25
    assert math.isnan(found.pop("teacher/AP"))
    assert found.keys() == {"student/AP"}
