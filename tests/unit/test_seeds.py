"""Several seeds of one experiment: which runs they are, what is refused, and what is made of their metrics."""

import io
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mimiclab import checkpoint, runs
from mimiclab.cli import main
from mimiclab.experiment import LoadedExperiment, identity, load_experiment
from mimiclab.schema import Experiment
from mimiclab.seeds import MAX_SEEDS, Statistic, plan, seeds_table, summarize
from mimiclab.tracking import runs as tracking
from mimiclab.tracking.client import connect

# 4 images in batches of 2, twice: 4 steps.
SMALL = """
name: small
seed: 7
data: {scenes: {train: 4, val: 2, size: 32}, resize: {short: 32, long: 32}}
model:
  backbone: {name: resnet18, width: 16}
  pyramid: {channels: 16, max_level: 5}
  student: {head_width: 32, offset_channels: [8, 8]}
  teacher: {num_convs: 1}
optim: {global_batch: 2, epochs: 2}
"""
NUM_STEPS = 4

Mistake = Callable[..., str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Should Ray be asked for where it must not be, it still does not start.
    monkeypatch.setenv("RAY_ADDRESS", "no-address")
    Path("x.yaml").write_text(SMALL)


def load(*overrides: str) -> LoadedExperiment:
    return load_experiment("x.yaml", overrides)


def mimiclab(*args: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def trained(experiment: Experiment, ap: float, step: int = NUM_STEPS, *, tracked: bool = False) -> None:
    """A run as training leaves it at its end, with this AP in its last evaluation and a higher one before."""
    folder = runs.prepare(experiment, fresh=False)
    uri, mine = "sqlite:///mlflow.db", identity(experiment)
    # Tracked where it is to be concluded, by its id; else by one that nobody has.
    mlflow_run_id = tracking.open_run(uri, "mimiclab", experiment.name, mine, {}, {}) if tracked else "0" * 32
    runs.Run(folder, mine, uri, mlflow_run_id, ("disk",), "finished").write()
    for at, value in ((1, 0.9), (step, ap)):
        metrics = {f"student/{name}": value for name in ("AP", "AP50", "AP75", "AP_small", "AP/disk")}
        meta = {"step": at, "classes": ["disk"], "best": {"step": 1, "value": 0.9}, "metrics": metrics, "unsent": []}
        meta["experiment"] = experiment.model_dump(mode="json")
        checkpoint.save(folder / runs.CHECKPOINTS, {"w": torch.zeros(1)}, {}, meta)


# ---- statistics ----


@pytest.mark.parametrize(("n", "quantile"), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262)])
def test_the_interval_is_students(n: int, quantile: float) -> None:
    # 0, 1, ..., n - 1 have the sample variance n (n + 1) / 12: half of the interval is t sqrt((n + 1) / 12).
    statistic = Statistic("student/AP", tuple(map(float, range(n))))

    assert statistic.mean == pytest.approx((n - 1) / 2)
    assert statistic.half_width == pytest.approx(quantile * math.sqrt((n + 1) / 12), rel=2e-4)


def test_of_two_seeds_by_hand() -> None:
    # s = 0.1 / sqrt 2, so that t s / sqrt n = 12.7062 * 0.05.
    assert Statistic("student/AP", (0.3, 0.4)).half_width == pytest.approx(0.63531, abs=1e-5)


def test_one_seed_has_a_mean_and_no_interval() -> None:
    statistic = Statistic("student/AP", (0.25,))

    assert statistic.mean == 0.25
    assert math.isnan(statistic.half_width)


def test_equal_values_have_an_interval_of_nothing() -> None:
    assert Statistic("student/AP", (0.1, 0.1, 0.1)).half_width == 0


def evaluation(student: float, teacher: float | None = None) -> dict[str, float]:
    heads = {"student": student} if teacher is None else {"student": student, "teacher": teacher}
    names = ("AP", "AP50", "AP75", "AP_small", "AR100", "AP/AP")
    metrics = {f"{head}/{name}": ap for head, ap in heads.items() for name in names}
    return metrics if teacher is None else {**metrics, "gap/AP": teacher - student}


def test_both_heads_and_their_gap_are_summarized() -> None:
    found = summarize([evaluation(0.25, 0.5), evaluation(0.5, 0.625)])

    assert [each.metric for each in found] == [
        *("student/AP", "student/AP50", "student/AP75"),
        *("teacher/AP", "teacher/AP50", "teacher/AP75"),
        "gap/AP",
    ]
    assert found[0].values == (0.25, 0.5)
    assert found[3].values == (0.5, 0.625)
    assert found[-1].values == (0.25, 0.125)


def test_a_detector_without_a_teacher_has_no_gap() -> None:
    found = summarize([evaluation(0.25)])

    assert [each.metric for each in found] == ["student/AP", "student/AP50", "student/AP75"]


def lines_of(found: list[Statistic], width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(seeds_table(found, "small, last evaluation of each run", "seeds 0 to 1"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_the_table_shows_mean_interval_and_every_value() -> None:
    lines = lines_of([Statistic("student/AP", (0.3, 0.4)), Statistic("gap/AP", (0.02, -0.01))])

    assert lines[0].strip() == "small, last evaluation of each run"
    assert [cell.strip() for cell in lines[2].split("┃")[1:-1]] == ["", "mean", "± 95 %", "seeds 0 to 1"]
    assert [cell.strip() for cell in lines[4].split("│")[1:-1]] == ["student/AP", "0.350", "0.635", "0.300 0.400"]
    assert [cell.strip() for cell in lines[5].split("│")[1:-1]] == ["gap/AP", "+0.005", "0.191", "+0.020 -0.010"]


def test_the_table_of_one_seed_has_no_interval() -> None:
    assert [cell.strip() for cell in lines_of([Statistic("student/AP", (0.3,))])[4].split("│")[2:4]] == ["0.300", "-"]


def test_many_values_take_several_lines_and_stay_whole() -> None:
    values = [f"0.{number:03d}" for number in range(100)]
    lines = lines_of([Statistic("student/AP", tuple(map(float, values)))])

    assert all(len(line) <= 80 for line in lines)
    assert " ".join(line.split("│")[-2].strip() for line in lines[4:-1]) == " ".join(values)


# ---- which runs ----


def test_seeds_count_up_from_the_experiments_and_name_the_runs() -> None:
    loaded = load("optim.lr=0.5")
    experiments = plan(loaded, 3)

    assert [(each.name, each.seed) for each in experiments] == [
        ("small-seed-7", 7),
        ("small-seed-8", 8),
        ("small-seed-9", 9),
    ]
    same = {"name": "small", "seed": 7}
    assert {each.model_copy(update=same).model_dump_json() for each in experiments} == {
        loaded.experiment.model_dump_json()
    }
    assert len({identity(each) for each in experiments}) == 3


def test_as_many_seeds_as_are_allowed() -> None:
    assert len(plan(load(), MAX_SEEDS)) == MAX_SEEDS
    assert len(plan(load(), 1)) == 1


# ---- what is refused ----


@pytest.fixture
def mistake(capsys: pytest.CaptureFixture[str]) -> Mistake:
    """Give `train x.yaml` arguments that it is to refuse before anything is made; its message."""

    def run(*args: str) -> str:
        assert mimiclab("train", "x.yaml", *args) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert not Path("mlflow.db").exists()
        return error.removeprefix("error: ").removesuffix("\n")

    return run


@pytest.mark.parametrize("num", ["0", "-3", "101"])
def test_a_number_of_seeds_that_is_none(mistake: Mistake, num: str) -> None:
    assert mistake("--seeds", num) == f"--seeds: found {num}, expected 1 to 100"
    assert not Path("runs").exists()


def test_a_seed_that_is_too_large(mistake: Mistake) -> None:
    message = mistake("--seeds", "2", "--set", f"seed={2**32 - 1}")

    assert message.startswith("x.yaml: --seeds 2, seed 4294967296: seed: found 4294967296")


def test_a_name_that_is_too_long_with_its_seed(mistake: Mistake) -> None:
    message = mistake("--seeds", "2", "--set", f"name={'n' * 95}")

    assert message.startswith("x.yaml: --seeds 2, seed 7: name: expected 1 to 100 letters")


def test_a_name_that_a_later_seed_finds_taken(mistake: Mistake) -> None:
    runs.prepare(plan(load("optim.lr=0.5"), 2)[1], fresh=False)

    assert "  optim.lr: 0.5 -> 0.0003" in mistake("--seeds", "2").splitlines()
    assert not Path("runs/small-seed-7").exists()


def test_runs_of_another_length_are_not_averaged(mistake: Mistake) -> None:
    trained(plan(load(), 2)[1], 0.5, step=NUM_STEPS + 2)

    message = mistake("--seeds", "2")
    assert message.startswith(f"run {Path.cwd()}/runs/small-seed-8: it was trained to step 6 already, expected at most")
    assert "4 (optim.epochs: 2)" in message


def test_a_mistake_in_the_data_is_found_before_anything_is_made(mistake: Mistake) -> None:
    message = mistake("--seeds", "2", "--set", "model.weights=no.safetensors")

    assert message.startswith(f"weights {Path.cwd()}/no.safetensors: ")
    assert not list(Path("runs").glob("small*"))


# ---- where all is done already ----


@pytest.mark.slow
def test_complete_runs_are_averaged_without_ray(capsys: pytest.CaptureFixture[str]) -> None:
    for experiment, ap in zip(plan(load(), 2), (0.3, 0.4), strict=True):
        trained(experiment, ap, tracked=True)
    ray_before = "ray" in sys.modules and sys.modules["ray"].is_initialized()

    assert mimiclab("train", "x.yaml", "--seeds", "2") == 0

    output = capsys.readouterr().out
    assert "│ student/AP   │ 0.350 │  0.635 │ 0.300 0.400  │" in output
    assert "small, last evaluation of each run\n" in output
    assert "small-seed-8, 2 of 2" in output
    assert "starting" not in output
    assert ("ray" in sys.modules and sys.modules["ray"].is_initialized()) == ray_before
    client = connect("sqlite:///mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("mimiclab").experiment_id])
    assert {run.info.status for run in found} == {"FINISHED"}
    (parent,) = (run for run in found if "seed" not in run.info.run_name)
    assert (parent.info.run_name, parent.info.status) == ("small", "FINISHED")
    assert parent.data.metrics["mean/student/AP75"] == pytest.approx(0.35)
    assert parent.data.metrics["interval/student/AP75"] == pytest.approx(0.63531, abs=1e-5)
    assert "seed" not in parent.data.params
