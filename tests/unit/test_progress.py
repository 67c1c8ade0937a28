"""The driver shows what its workers tell, and keeps it, line by whole line."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from mimiclab.progress import PROGRESS, ProgressLog, ProgressReader, ProgressView
from mimiclab.storage import Storage

METRICS = {"student/AP": 0.25, "student/AP50": 0.5, "teacher/AP": 0.375, "teacher/AP50": 0.625}


def step(number: int, num_steps: int = 100) -> dict:
    return {"kind": "step", "step": number, "num_steps": num_steps, "loss": 1.5, "images_per_s": 12.25}


def text(words: str) -> dict:
    return {"kind": "text", "time": 1.0, "text": words}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / PROGRESS


@pytest.fixture
def log(tmp_path) -> ProgressLog:
    return ProgressLog(Storage(tmp_path))


# ---- the file ----


def test_events_arrive_in_order_and_once(path, log):
    reader = ProgressReader(path)
    assert list(reader.new_events()) == []
    events = [step(1), text("größe\nand a second line")]

    for event in events:
        log.write(event)

    assert list(reader.new_events()) == events
    assert list(reader.new_events()) == []
    log.write(text("later"))
    assert list(reader.new_events()) == [text("later")]


def test_a_reader_starts_at_the_present_end_and_a_log_goes_on(path, tmp_path, log):
    log.write(text("of an earlier driver"))
    log.close()
    reader = ProgressReader(path)

    ProgressLog(Storage(tmp_path)).write(text("new"))

    assert list(reader.new_events()) == [text("new")]
    assert len(path.read_text().splitlines()) == 2


def test_a_line_that_is_being_written_is_read_when_it_is_whole(path):
    reader = ProgressReader(path)
    line = json.dumps({"kind": "text", "text": "one"}) + "\n"

    with path.open("a") as file:
        for part in (line[:10], line[10:-1]):
            file.write(part)
            file.flush()
            assert list(reader.new_events()) == []
        file.write("\n" + line[:5])
        file.flush()
        assert [event["text"] for event in reader.new_events()] == ["one"]
        assert list(reader.new_events()) == []
        file.write(line[5:])
        file.flush()
    assert [event["text"] for event in reader.new_events()] == ["one"]


def test_a_line_that_a_killed_driver_left_half_is_passed_over(path, tmp_path):
    reader = ProgressReader(path)
    with path.open("a") as file:
        file.write('{"kind": "step", "st')
    assert list(reader.new_events()) == []

    log = ProgressLog(Storage(tmp_path))
    log.write(text("runs into the half line"))
    log.write(text("whole"))

    assert list(reader.new_events()) == [text("whole")]


# ---- the view ----


def shown(events: list[dict], **console) -> str:
    output = io.StringIO()
    with ProgressView(Console(file=output, width=120, **console)) as view:
        for event in events:
            view.show(event)
    return output.getvalue()


def test_elsewhere_than_on_a_terminal_there_are_plain_lines():
    output = shown(
        [
            {"kind": "text", "text": "training from the start"},
            {"kind": "evaluation", "epoch": 3, "metrics": METRICS},
            step(100),
        ]
    )

    assert output.splitlines() == [
        "training from the start",
        "epoch 3: student AP 0.250 AP50 0.500, teacher AP 0.375 AP50 0.625",
        "step 100/100  loss 1.500  12.2 images/s",
    ]


def test_steps_fill_no_screen_but_the_first_and_last_show():
    lines = shown([step(number) for number in range(1, 101)]).splitlines()

    assert [line.split()[1] for line in lines] == ["1/100", "100/100"]


def test_brackets_in_a_text_are_no_markup():
    output = shown([{"kind": "text", "text": "warning: /data/[old]/x [/]"}], markup=False)

    assert output == "warning: /data/[old]/x [/]\n"


def test_on_a_terminal_there_is_a_bar():
    output = shown([step(1), step(50), step(100)], force_terminal=True)

    assert "step 100/100  loss 1.500" in output
    assert "━" in output
