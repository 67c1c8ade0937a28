"""What is refused before a cluster is started."""

import sys
from pathlib import Path

import pytest

from mimiclab import runs
from mimiclab.cli import main
from mimiclab.drill.drill import plan
from mimiclab.drill.stage import Driver
from mimiclab.experiment import load_experiment

SMALL = """
name: small
data:
  scenes: {train: 8, val: 4, size: 64}
  resize: {short: 64, long: 64}
model:
  backbone: {name: resnet18, width: 16}
  pyramid: {channels: 16, max_level: 5}
optim: {global_batch: 2, epochs: 2}
scale: {workers: {min: 1, max: 2}, label_selector: {zone: a}, placement: STRICT_PACK, accelerator_type: A10G}
"""
NUM_STEPS = 8

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    Path("x.yaml").write_text(SMALL)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *args: str, verb: tuple[str, ...] = ("drill",)) -> str:
    """The message of a drill that is not begun."""
    with pytest.raises(SystemExit) as caught:
        main([*verb, "x.yaml", *args])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert "starting a head" not in out
    assert not list(Path("runs").glob("small-*/run.json"))
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ")


# Submitted, before a cluster is looked for.
@pytest.mark.parametrize("verb", [("drill",), ("submit", "drill")], ids=" ".join)
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "found neither --events and --random; expected one of them"),
        (["--events", "kill-node@3", "--random", "2"], "found both --events and --random; expected one of them"),
        (["--events", "kill-node"], "--events: found 'kill-node', expected KIND@STEP"),
        (["--events", "kill-node@3", "--set", "scale.gpu=true"], "x.yaml: scale.gpu: found true, expected false"),
        (
            ["--random", "1", "--set", "checkpoint.every_steps=auto", "--set", "scale.mtbf_minutes=10"],
            "x.yaml: checkpoint.every_steps: found auto, expected a number of steps",
        ),
        (
            ["--random", "1", "--set", "where.storage=s3://bucket/runs?region=eu-west-1"],
            "x.yaml: where.storage: found s3://bucket/runs?region=eu-west-1, expected a folder of this machine",
        ),
        (["--random", "1", "--set", f"name={'n' * 90}"], "name: expected 1 to 100 letters"),
    ],
)
def test_a_mistake_is_named(
    capsys: pytest.CaptureFixture[str], args: list[str], message: str, verb: tuple[str, ...]
) -> None:
    assert refused(capsys, *args, verb=verb).startswith(message)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--events", "kill-node@9"], f"--events: kill-node@9: expected a step from 1 to {NUM_STEPS}"),
        (["--random", "8"], "--random: found 8, expected at most one event for each of 7 steps"),
        (["--events", "kill-node@2,kill-node@3", "--elastic"], "--events: kill-node@3: with --elastic no node"),
    ],
)
def test_what_the_data_decides_is_refused_before_a_cluster_starts(
    capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert refused(capsys, *args).startswith(message)


def test_a_run_that_no_drill_made_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    kept = Path("runs/small-drill/experiment.yaml")
    kept.parent.mkdir(parents=True)
    kept.write_text(SMALL)
    for verb in (("drill",), ("submit", "drill")):
        assert "it was not made by a drill, which would remove it" in refused(capsys, "--random", "1", verb=verb)
    assert kept.read_text() == SMALL


def test_both_runs_are_the_experiment_on_nodes_of_this_machine() -> None:
    loaded = load_experiment("x.yaml")
    for elastic in (False, True):
        undisturbed, disturbed = plan(loaded, elastic=elastic)
        assert (undisturbed.name, disturbed.name) == ("small-undisturbed", "small-drill")
        for experiment in (undisturbed, disturbed):
            assert experiment.data == loaded.experiment.data
            assert experiment.optim == loaded.experiment.optim
            assert experiment.scale.label_selector == {}
            assert experiment.scale.accelerator_type is None
            assert experiment.scale.placement == "PACK"
        assert (undisturbed.scale.workers.min, undisturbed.scale.workers.max) == (2, 2)
        assert (disturbed.scale.workers.min, disturbed.scale.workers.max) == (1 if elastic else 2, 2)


def test_a_driver_is_not_tied_to_the_cluster_that_the_drill_is_a_job_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nenv\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    ties = ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_OVERRIDE_RESOURCES", "RAY_OVERRIDE_LABELS")
    for name in (*ties, "RAY_AUTH_MODE", "PYTHONPATH"):
        monkeypatch.setenv(name, f"of {name}")
    experiment, said = load_experiment("x.yaml").experiment, list[str]()
    runs.prepare(experiment, fresh=False)

    code = Driver(experiment, "127.0.0.1:1", said.append, verbose=False).run()

    assert code == 0
    assert {"RAY_AUTH_MODE=of RAY_AUTH_MODE", "PYTHONPATH=of PYTHONPATH"} <= set(said)
    assert not [line for line in said if line.startswith(ties)]
