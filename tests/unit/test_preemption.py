"""What rank 0 knows of its machines without asking within a step."""

import pickle
import time
from collections.abc import Callable

import pytest

from mimiclab.preemption import LeavingError, Machines, Notice

EVERY_S = 0.01


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(EVERY_S)


def test_a_notice_for_a_node_of_the_run_is_known_with_its_first_deadline() -> None:
    draining: dict[str, int] = {}
    machines = Machines(lambda: dict(draining), ["a", "b"], every_s=EVERY_S)
    assert machines.notice() is None
    draining |= {"b": 5_000, "other": 1_000}
    eventually(lambda: machines.notice() == Notice(("b",), 5.0))
    draining |= {"a": 4_000}
    eventually(lambda: machines.notice() == Notice(("a", "b"), 4.0))
    draining.clear()  # taken back
    eventually(lambda: machines.notice() is None)
    machines.close()


def test_a_notice_without_a_deadline_has_none() -> None:
    machines = Machines(lambda: {"a": 0}, ["a"], every_s=EVERY_S)
    eventually(lambda: machines.notice() == Notice(("a",), None))
    machines.close()


def test_a_head_that_does_not_answer_takes_nothing_back() -> None:
    answers = [{"a": 7_000}, None, None, None]
    asked: list[int] = []

    def draining() -> dict[str, int]:
        asked.append(1)
        answer = answers[min(len(asked), len(answers)) - 1]
        if answer is None:
            raise ConnectionError
        return answer

    machines = Machines(draining, ["a"], every_s=EVERY_S)
    eventually(lambda: len(asked) > 3)
    assert machines.notice() == Notice(("a",), 7.0)
    machines.close()


def test_reading_what_is_known_asks_nobody() -> None:
    def slow() -> dict[str, int]:
        time.sleep(1)
        return {}

    machines = Machines(slow, ["a"], every_s=EVERY_S)
    started = time.perf_counter()
    for _ in range(1000):
        machines.notice()
        machines.room()
    assert time.perf_counter() - started < 0.1
    machines.close()


def test_room_is_asked_for_now_and_then_and_not_at_once() -> None:
    asked: list[float] = []

    def room() -> int:
        asked.append(time.monotonic())
        return 2

    started = time.monotonic()
    machines = Machines(dict, ["a"], room=room, room_every_s=0.2, every_s=EVERY_S)
    assert machines.room() == 0
    eventually(lambda: len(asked) >= 2)
    assert machines.room() == 2
    assert asked[0] - started >= 0.2
    assert asked[1] - asked[0] >= 0.2
    machines.close()


@pytest.mark.parametrize("why", ["preemption", "growth"])
def test_why_workers_left_survives_the_way_to_the_controller(why: str) -> None:
    arrived = pickle.loads(pickle.dumps(LeavingError(why, "node 12 announced")))
    assert (arrived.why, arrived.reason, str(arrived)) == (
        why,
        "node 12 announced",
        "node 12 announced",
    )
