"""What a drill concludes from made-up events and differences."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from mimiclab.drill.compare import Difference, TensorDifference, compare_tensors
from mimiclab.drill.figure import draw_timeline
from mimiclab.drill.report import Findings, Outcome, show
from mimiclab.drill.schedule import parse
from mimiclab.drill.story import Story, tell


def step(time: float, number: int) -> dict[str, Any]:
    return {"kind": "step", "time": time, "step": number}


def attempt(time: float, number: int, world: int = 2, started: float | None = None) -> dict[str, Any]:
    return {"kind": "attempt", "time": time, "step": number, "world": world, "processes_started": started}


def blow(time: float, text: str, *, done: bool = True) -> dict[str, Any]:
    [event] = parse(text)
    return {"kind": "blow", "time": time, "event": event, "step": event.step, "target": "node-1", "done": done}


def failure(time: float, why: str) -> dict[str, Any]:
    return {"kind": "failure", "time": time, "why": why, "reason": f"because of {why}"}


# A worker is killed at 24, a machine announced to go at 40; checkpoints every 10 steps.
EVENTS = [
    attempt(100, 0, started=90),
    *(step(101 + n, n) for n in range(1, 25)),
    blow(125.5, "kill-worker@24"),
    step(126, 25),
    failure(127, "crash"),
    attempt(140, 20, started=131),
    *(step(141 + n - 20, n) for n in range(21, 41)),
    blow(162, "drain@40:20s"),
    step(163, 41),
    {"kind": "notice", "time": 163.5, "step": 41, "nodes": ["a"], "deadline": 182},
    step(164, 42),
    failure(165, "preemption"),
    attempt(175, 42, started=168),
    *(step(176 + n - 42, n) for n in range(43, 51)),
]


def findings(story: Story, **changes: Any) -> Findings:
    same = TensorDifference((), 0.0)
    found = Findings(
        undisturbed=Outcome("x-undisturbed", 0, 50, 0, 0.8, 60.0),
        disturbed=Outcome("x-drill", 0, 50, 2, 0.5, 100.0),
        num_steps=50,
        num_workers=2,
        every_steps=10,
        tolerance=0.05,
        story=story,
        weights=same,
        state=same,
        ap={"student/AP": 0.0},
    )
    return dataclasses.replace(found, **changes)


def broken(found: Findings) -> list[str]:
    return [f"{check.contract}: {check.broken}" for check in found.checks() if check.broken]


def test_every_event_is_told_with_the_restart_that_it_led_to() -> None:
    story = tell(EVENTS)
    killed, drained = story.blows

    assert killed.restart is story.restarts[0]
    assert (killed.restart.reached, killed.restart.from_step, killed.restart.repeated) == (25, 20, 5)
    assert (killed.detection_s, killed.waiting_s, killed.start_s, killed.first_step_s) == (1.5, 4, 9, 2)
    assert killed.down_s == 16.5

    assert drained.restart is story.restarts[1]
    assert drained.restart.repeated == 0
    assert (drained.detection_s, drained.waiting_s, drained.start_s, drained.first_step_s) == (1.5, 3, 7, 2)
    assert drained.down_s == 13  # from the last step before they left
    assert story.unplanned == []
    assert story.worlds == [2, 2, 2]
    assert story.steps[-1] == (184, 50)


def test_two_kills_that_meet_share_a_restart_and_an_end_that_is_near_waits_for_its_own() -> None:
    story = tell(
        [
            attempt(0, 0),
            step(1, 1),
            blow(1.1, "drain@1:20s"),
            blow(1.2, "kill-worker@1"),
            blow(1.3, "kill-node@1"),
            failure(2, "preemption"),
            failure(3, "crash"),
            attempt(9, 0),
            step(10, 1),
            failure(11, "preemption"),
            attempt(12, 1),
            step(13, 2),
        ]
    )
    drained, worker, node = story.blows
    assert worker.restart is node.restart is story.restarts[0]
    assert drained.restart is not None
    assert [restart.repeated for restart in story.restarts] == [1, 0, 0]
    assert worker.restart is not None
    assert worker.restart.first_step == 10
    # A notice that nobody killed before explains the next failure.
    assert drained.restart is story.restarts[1]
    assert story.unplanned == [story.restarts[2]]


def test_a_step_that_is_heard_after_the_kill_belongs_to_what_was_killed() -> None:
    story = tell(
        [
            *(attempt(0, 0), step(1, 1), blow(1.1, "kill-driver@1"), failure(1.1, "driver"), step(1.05, 2)),
            *(attempt(9, 0), step(10, 1)),
        ]
    )
    [restart] = story.restarts
    assert (restart.reached, restart.last_step, restart.repeated) == (2, 1.05, 2)
    assert story.blows[0].down_s == pytest.approx(8.9)


def test_an_event_that_hit_nothing_explains_nothing() -> None:
    story = tell([attempt(0, 0), step(1, 1), blow(1, "kill-node@1", done=False), failure(2, "crash"), attempt(3, 0)])
    assert story.blows[0].restart is None
    assert [restart.why for restart in story.unplanned] == ["crash"]


def test_workers_that_end_without_a_word_and_growth_are_told() -> None:
    story = tell(
        [
            attempt(0, 0, world=1),
            step(1, 1),
            blow(1, "add-node@1"),
            failure(60, "growth"),
            attempt(70, 1),
            step(71, 2),
            attempt(80, 0),
            step(81, 1),
        ]
    )
    assert story.blows[0].restart is story.restarts[0]
    assert story.restarts[0].repeated == 0
    assert [(restart.why, restart.repeated) for restart in story.unplanned] == [("unknown", 2)]
    assert story.worlds == [1, 2, 2]


def test_all_contracts_hold_where_nothing_differs() -> None:
    found = findings(tell(EVENTS))
    assert found.hold
    assert broken(found) == []
    assert [check.contract.partition(":")[0] for check in found.checks()][-2:] == ["weights", "optimizer"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"histories": [Difference("train/loss", missing=(7,))]},
            "history: no step missing, none twice: train/loss: step 7 missing",
        ),
        (
            {"histories": [Difference("student/AP", duplicate=(5, 9))]},
            "history: no step missing, none twice: student/AP: steps 5, 9 twice",
        ),
        (
            {"histories": [Difference("train/loss", differing=(8,))]},
            "history: the same values: train/loss: step 8 differing",
        ),
        (
            {"weights": compare_tensors({"w": torch.zeros(2)}, {"w": torch.tensor([0.0, 0.5])})},
            "weights: the same bits: 1 differ, by up to 0.5: w",
        ),
        (
            {"state": TensorDifference(("optimizer.step",), 1.0)},
            "optimizer: the same bits: 1 differ, by up to 1: optimizer.step",
        ),
        ({"weights": None}, "weights: the same bits: there is no checkpoint to compare"),
        (
            {"disturbed": Outcome("x-drill", 0, 42, 2, 0.5, 9.0)},
            "the disturbed run is trained to its end: x-drill: it ended at step 42 of 50",
        ),
        (
            {"disturbed": Outcome("x-drill", 1, 50, 2, 0.5, 9.0)},
            "the disturbed run is trained to its end: x-drill: its driver ended with exit code 1",
        ),
        (
            {"undisturbed": Outcome("x-undisturbed", 0, 50, 2, 0.8, 60.0)},
            "the undisturbed run is trained to its end without a restart: 2 restarts",
        ),
        ({"every_steps": 4}, "at most 4 steps repeated after a kill: 5 after kill-worker@24"),
    ],
)
def test_what_breaks_a_contract_is_named(changes: dict[str, Any], expected: str) -> None:
    found = findings(tell(EVENTS), **changes)
    assert broken(found) == [expected]
    assert not found.hold
    assert found.as_json()["holds"] is False


def test_two_steps_repeated_after_a_notice_break_its_contract() -> None:
    back = [{**event, "step": 40} if event["kind"] == "attempt" and event["step"] == 42 else event for event in EVENTS]
    assert broken(findings(tell(back))) == ["at most 1 step repeated after a notice: 2 after drain@40:20s"]


def test_a_crash_that_nobody_planned_is_held_to_the_contract_of_a_kill() -> None:
    alone = [event for event in EVENTS if event["kind"] != "blow"]
    assert broken(findings(tell(alone), every_steps=4)) == [
        "at most 4 steps repeated after a kill: 5 after because of crash"
    ]


def test_where_the_size_changed_ap_is_compared_in_place_of_bits() -> None:
    smaller = tell([{**event, "world": 1} if event["kind"] == "attempt" else event for event in EVENTS])
    weights = TensorDifference(("w",), 0.1)
    assert broken(findings(smaller, weights=weights, ap={"student/AP": -0.05})) == []
    assert broken(findings(smaller, ap={"student/AP": -0.051, "teacher/AP": 0.01})) == [
        "AP: within 0.05: student/AP -0.0510"
    ]
    assert broken(findings(smaller, ap={"student/AP": float("nan")})) == ["AP: within 0.05: student/AP +nan"]
    assert broken(findings(smaller, ap=None)) == ["AP: within 0.05: there is no evaluation to compare"]


def test_the_report_shows_events_differences_and_what_is_broken() -> None:
    console = Console(file=io.StringIO(), width=200)
    found = findings(
        tell([*EVENTS[:-1], blow(190, "kill-node@49", done=False), EVENTS[-1]]),
        histories=[Difference("train/loss", missing=(7, 8), duplicate=(9,))],
        weights=TensorDifference(("w",), 0.125),
        ap={"student/AP": -0.01},
    )
    show(found, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in text.splitlines() if line.startswith("│")}
    cells = {name: [cell.strip() for cell in row] for name, row in rows.items()}
    assert cells["kill-worker@24"] == ["node-1", "1.5", "4.0", "9.0", "2.0", "16.5", "5"]
    assert cells["drain@40:20s"] == ["node-1", "1.5", "3.0", "7.0", "2.0", "13.0", "0"]
    assert cells["kill-node@49"] == ["node-1", "", "", "", "", "-", "-"]
    for line in (
        "x-drill: 100 s, 2 restarts, goodput 50.0 %",
        "steps repeated: 5 of 50",
        "largest difference of final weights: 0.125",
        "difference of final student/AP: -0.0100",
        "holes in the MLflow history: 2",
        "duplicates in the MLflow history: 1",
        "BROKEN  history: no step missing, none twice: train/loss: steps 7, 8 missing; step 9 twice",
        "BROKEN  weights: the same bits: 1 differ, by up to 0.125: w",
        "holds   optimizer: the same bits",
    ):
        assert line in text.splitlines()


def test_the_same_facts_are_written_as_json() -> None:
    record = json.loads(json.dumps(findings(tell(EVENTS), ap={"teacher/AP": float("nan")}).as_json(), allow_nan=False))
    assert record["holds"] is True
    assert [event["event"] for event in record["events"]] == ["kill-worker@24", "drain@40:20s"]
    assert record["events"][0]["restart"]["repeated"] == record["steps_repeated"] == 5
    assert record["events"][1]["detection_s"] == 1.5
    assert record["ap"] == {"teacher/AP": None}


def test_the_timeline_shows_both_runs_and_every_event(tmp_path: Path) -> None:
    path = tmp_path / "timeline.png"
    story = tell(EVENTS)
    draw_timeline(path, "x", [(float(n), n) for n in range(1, 51)], story)
    with Image.open(path) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    # Blue steps, a red kill, an orange notice.
    assert {(31, 119, 180), (214, 39, 40), (255, 127, 14)} <= colours
    draw_timeline(path, "nothing was done", [], Story())
