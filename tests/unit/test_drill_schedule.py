from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mimiclab.drill.schedule import Event, check, draw, parse
from mimiclab.errors import UserError


def test_events_are_read_in_the_order_of_their_steps() -> None:
    assert parse("drain@70:20s, kill-worker@20,add-node@90,kill-driver@95,kill-node@45,drain@5:0.5s") == [
        Event("drain", 5, 0.5),
        Event("kill-worker", 20),
        Event("kill-node", 45),
        Event("drain", 70, 20.0),
        Event("add-node", 90),
        Event("kill-driver", 95),
    ]


@pytest.mark.parametrize(
    "text",
    [
        *("", "kill-worker", "kill-worker@", "kill-worker@x", "kill-worker@-3", "kill-worker@1.5", "stop@3"),
        *("drain@7", "drain@7:20", "drain@7:0s", "drain@7:-1s", "kill-node@7:20s", "kill-node@7@8", "kill-node 7"),
    ],
)
def test_what_is_no_event_is_named_with_what_was_expected(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(f"kill-node@3,{text}")
    message = str(caught.value)
    assert message.startswith(f"--events: found {text!r}, expected KIND@STEP, as kill-worker@20")
    assert "kill-worker, kill-node, kill-driver, drain, add-node" in message


@pytest.mark.parametrize("step", [0, 31])
def test_an_event_outside_of_the_run_is_refused(step: int) -> None:
    with pytest.raises(UserError, match=rf"drain@{step}:20s: expected a step from 1 to 30"):
        check([Event("drain", step, 20.0)], 30, 2, elastic=False)
    check([Event("kill-node", 1), Event("drain", 30, 20.0)], 30, 1, elastic=False)


def test_without_replacement_a_node_must_be_left() -> None:
    lost = parse("kill-node@2,drain@5:9s,kill-worker@6")
    check(lost, 30, 3, elastic=True)
    check(lost, 30, 1, elastic=False)
    with pytest.raises(UserError, match=r"drain@5:9s: with --elastic no node would be left"):
        check(lost, 30, 2, elastic=True)
    check(parse("kill-node@2,add-node@3,drain@5:9s"), 30, 2, elastic=True)


sizes = {"num_steps": st.integers(2, 400), "num_nodes": st.integers(1, 5), "elastic": st.booleans()}


@given(num=st.integers(1, 30), seed=st.integers(), **sizes)
def test_drawn_events_can_happen_and_are_spread_over_the_run(
    num: int, seed: int, num_steps: int, num_nodes: int, elastic: bool
) -> None:
    assume(num < num_steps)
    events = draw(num, seed, num_steps, num_nodes, elastic=elastic)

    assert events == draw(num, seed, num_steps, num_nodes, elastic=elastic)
    check(events, num_steps, num_nodes, elastic=elastic)
    assert parse(",".join(map(str, events))) == events
    steps = [event.step for event in events]
    assert steps == sorted(set(steps))
    parts = [Fraction(number * (num_steps - 1), num) for number in range(num + 1)]
    assert all(low < step <= high for low, step, high in zip(parts, steps, parts[1:], strict=False))
    assert elastic or "add-node" not in {event.kind for event in events}


def test_another_seed_draws_other_events_and_every_kind_is_drawn() -> None:
    schedules = [tuple(draw(4, seed, 200, 3, elastic=True)) for seed in range(40)]
    assert len(set(schedules)) == 40
    kinds = {event.kind for schedule in schedules for event in schedule}
    assert kinds == {"kill-worker", "kill-node", "kill-driver", "drain", "add-node"}


def test_more_events_than_steps_are_refused() -> None:
    with pytest.raises(UserError, match="--random: found 10, expected at most one event for each of 9 steps"):
        draw(10, 0, 10, 2, elastic=False)
    assert [event.step for event in draw(9, 0, 10, 2, elastic=False)] == list(range(1, 10))
