"""The driver shows what rank 0 wrote, line by whole line."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from mimiclab.progress import ProgressReader, ProgressView, ProgressWriter

METRICS = {"student/AP": 0.25, "student/AP50": 0.5, "teacher/AP": 0.375, "teacher/AP50": 0.625}


def step(number: int, num_steps: int = 100) -> dict:
    return {"kind": "step", "step": number, "num_steps": num_steps, "loss": 1.5, "images_per_s": 12.25}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "progress.jsonl"


# ---- the file ----


def test_events_arrive_in_order_and_once(path):
    reader, writer = ProgressReader(path), ProgressWriter(path)
    assert list(reader.new_events()) == []

    writer.write("step", step=1, loss=0.5)
    writer.write("text", text="größe\nand a second line")

    first, second = reader.new_events()
    assert {key: first[key] for key in ("kind", "step", "loss")} == {"kind": "step", "step": 1, "loss": 0.5}
    assert second["text"] == "größe\nand a second line"
    assert first["time"] <= second["time"]
    assert list(reader.new_events()) == []
    writer.write("text", text="later")
    assert [event["text"] for event in reader.new_events()] == ["later"]


def test_a_reader_starts_at_the_present_end_and_a_writer_appends(path):
    ProgressWriter(path).write("text", text="of an earlier life")
    reader = ProgressReader(path)

    ProgressWriter(path).write("text", text="new")

    assert [event["text"] for event in reader.new_events()] == ["new"]
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


def test_a_line_that_a_killed_writer_left_half_is_passed_over(path):
    reader = ProgressReader(path)
    with path.open("a") as file:
        file.write('{"kind": "step", "st')
    assert list(reader.new_events()) == []

    writer = ProgressWriter(path)
    writer.write("text", text="runs into the half line")
    writer.write("text", text="whole")

    assert [event["text"] for event in reader.new_events()] == ["whole"]


# ---- the view ----


def shown(events: list[dict], **console) -> str:
    output = io.StringIO()
    with ProgressView(Console(file=output, width=120, **console)) as view:
        for event in events:
            view.show(event)
    return output.getvalue()


def test_elsewhere_than_on_a_terminal_there_are_plain_lines():
    text = shown(
        [
            {"kind": "text", "text": "training from the start"},
            {"kind": "evaluation", "epoch": 3, "metrics": METRICS},
            step(100),
        ]
    )

    assert text.splitlines() == [
        "training from the start",
        "epoch 3: student AP 0.250 AP50 0.500, teacher AP 0.375 AP50 0.625",
        "step 100/100  loss 1.500  12.2 images/s",
    ]


def test_steps_fill_no_screen_but_the_first_and_last_show():
    lines = shown([step(number) for number in range(1, 101)]).splitlines()

    assert [line.split()[1] for line in lines] == ["1/100", "100/100"]


def test_brackets_in_a_text_are_no_markup():
    text = shown([{"kind": "text", "text": "warning: /data/[old]/x [/]"}], markup=False)

    assert text == "warning: /data/[old]/x [/]\n"


def test_on_a_terminal_there_is_a_bar():
    text = shown([step(1), step(50), step(100)], force_terminal=True)

    assert "step 100/100  loss 1.500" in text
    assert "━" in text
