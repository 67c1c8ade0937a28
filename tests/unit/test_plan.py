"""Plans: the simulation against the closed formula, and both against what must hold for any fleet."""

import math
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from mimiclab.cli import main
from mimiclab.experiment import load_experiment
from mimiclab.plan.expected import expected_s
from mimiclab.plan.fleet import Fleet
from mimiclab.plan.job import Job
from mimiclab.plan.quote import quote, sizes
from mimiclab.plan.simulate import Outcome, average, best_every_s, simulate
from mimiclab.plan.training import job_of

JOB = Job(num_steps=20_000, global_batch=16, images_per_s=25.0, checkpoint_s=2.0, restart_s=90.0)
FLEET = Fleet(workers=8, mtbf_s=8 * 3600.0, notice_share=0.0, replace_s=180.0)


def mean(job: Job, fleet: Fleet, every_s: float, *, elastic: bool = False, runs: int = 300) -> Outcome:
    return average([simulate(job, fleet, every_s=every_s, elastic=elastic, seed=seed) for seed in range(runs)])


def test_nothing_is_lost_where_no_machine_goes() -> None:
    calm = simulate(JOB, replace(FLEET, mtbf_s=math.inf), every_s=100.0)

    assert calm.useful_s == pytest.approx(20_000 * 2 / 25)
    assert calm.checkpoint_s == 2.0 * 15  # none at the end
    assert calm.restart_s == 90.0 + 6 * 0.05
    assert calm.total_s == pytest.approx(1600 + 30 + 90.3)
    assert calm.machine_s == pytest.approx(8 * calm.total_s)
    assert (calm.losses, calm.repeated_s, calm.waiting_s) == (0, 0.0, 0.0)


@pytest.mark.parametrize("notice", [0.0, 0.5])
@pytest.mark.parametrize("every_s", [30.0, 120.0, 500.0])
def test_the_simulation_agrees_with_the_formula(every_s: float, notice: float) -> None:
    job = replace(JOB, num_steps=100_000, checkpoint_s=1.0)
    fleet = replace(FLEET, notice_share=notice, mtbf_s=2 * 3600.0)
    simulated = mean(job, fleet, every_s, runs=100).total_s
    expected = expected_s(job, fleet, every_s)

    # What losses add to the work and the checkpoints.
    calm = simulate(job, replace(fleet, mtbf_s=math.inf), every_s=every_s).total_s
    assert simulated - calm == pytest.approx(expected - calm, rel=0.06)
    assert expected > 1.2 * calm


def test_what_is_announced_costs_no_work() -> None:
    assert mean(JOB, replace(FLEET, notice_share=1.0), 600.0).repeated_s == 0.0
    assert mean(JOB, FLEET, 600.0).repeated_s > 0.0


def test_dalys_interval_is_near_the_best() -> None:
    best = best_every_s(JOB, FLEET)

    assert expected_s(JOB, FLEET, best) < min(expected_s(JOB, FLEET, factor * best) for factor in (0.5, 2.0))
    assert expected_s(JOB, FLEET, best) == pytest.approx(
        min(expected_s(JOB, FLEET, factor * best) for factor in np.linspace(0.5, 2, 61)), rel=1e-3
    )


def test_going_on_with_fewer_pays_where_machines_are_slow_to_come() -> None:
    slow = replace(FLEET, replace_s=3600.0)
    fast = replace(FLEET, replace_s=1.0)

    assert mean(JOB, slow, 120.0, elastic=True).total_s < mean(JOB, slow, 120.0).total_s
    assert mean(JOB, fast, 120.0, elastic=True).total_s > mean(JOB, fast, 120.0).total_s  # one restart more


@pytest.mark.parametrize("burst", [0.0, 0.1, 0.5, 1.0])
def test_a_machine_lives_as_long_in_bursts_as_alone(burst: float) -> None:
    fleet = Fleet(workers=60, mtbf_s=3600.0, zones=3, burst=burst)
    drawn = list(islice(fleet.losses(np.random.default_rng(0)), 20_000))

    hours = sum(wait for wait, _, _ in drawn) / 3600
    lost = sum(taken for _, taken, _ in drawn)
    assert 60 * hours / lost == pytest.approx(1.0, rel=0.03)
    if burst:
        assert max(taken for _, taken, _ in drawn) > 1


def test_bursts_interrupt_less_often_for_the_same_life_of_a_machine() -> None:
    alone, together = replace(FLEET, workers=100), replace(FLEET, workers=100, zones=2, burst=0.3)

    assert together.mtbi_s == pytest.approx(15 * alone.mtbi_s, rel=0.01)  # 30 % of 50 machines
    assert mean(JOB, together, 60.0).total_s < mean(JOB, alone, 60.0).total_s


@pytest.mark.slow
def test_a_fleet_that_dies_faster_than_it_starts_never_ends() -> None:
    hopeless = replace(FLEET, workers=1000, mtbf_s=3600.0)
    outcome = simulate(replace(JOB, num_steps=10**9), hopeless, every_s=3600.0)

    assert not outcome.done


@pytest.mark.parametrize(
    ("change", "limit"),
    [({}, "compute"), ({"loader_images_per_s": 20.0}, "loader"), ({"store_images_per_s": 100.0}, "store")],
)
def test_the_slowest_part_of_a_step_is_named(change: dict[str, float], limit: str) -> None:
    job = replace(JOB, num_steps=100, **change)
    found = quote(job, FLEET, elastic=False, runs=2)

    assert found.limit == limit
    assert found.step_s == pytest.approx({"compute": 2 / 25, "loader": 2 / 20, "store": 16 / 100}[limit])


def test_more_workers_than_the_batch_has_images_gain_nothing() -> None:
    assert JOB.step_s(16) == JOB.step_s(64)
    assert JOB.step_s(16) < JOB.step_s(15)


def test_sizes_double_up_to_the_most() -> None:
    assert sizes(1) == [1]
    assert sizes(8) == [1, 2, 4, 8]
    assert sizes(1000) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000]


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    output, errors = capsys.readouterr()
    assert caught.value.code == 0, errors
    return output


def test_a_plan_of_a_recipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMICLAB_DATA", "/data")
    monkeypatch.setenv("MIMICLAB_WEIGHTS", "/weights")
    arguments = ["plan", "experiments/coco/r50-1x.yaml", "--gpus", "4", "--images-per-s", "25"]
    known = [*arguments, "--images", "118287"]
    output = planned(capsys, *known, "--price", "0.35", "--on-demand-price", "1", "--val-images", "0")

    assert "left out" not in output
    assert "88716 steps of 16 images" in output
    assert [line.split()[0] for line in output.splitlines()[2:]] == ["1", "2", "4"]
    alone = output.splitlines()[2].split()
    # 118,287 images, 12 epochs, 25 a second, and one start.
    assert float(alone[4]) == pytest.approx((118287 * 12 / 25 + 60) / 3600, abs=0.03)
    assert float(alone[-1]) == pytest.approx(float(alone[4]), abs=0.02)

    output = planned(capsys, *known, "--val-images", "5000")
    # 5,000 images after each of 12 epochs, three times as fast.
    assert float(output.splitlines()[2].split()[4]) - float(alone[4]) == pytest.approx(12 * 5000 / 75 / 3600, abs=0.02)
    output = planned(capsys, *known, "--val-images", "5000", "--eval-images-per-s", "5", "--set", "eval.every_epochs=5")
    assert float(output.splitlines()[2].split()[4]) - float(alone[4]) == pytest.approx(3 * 5000 / 5 / 3600, abs=0.02)
    output = planned(capsys, *known)
    assert output.splitlines()[1].startswith("evaluations are left out")
    assert output.splitlines()[3].split()[4] == alone[4]

    with pytest.raises(SystemExit) as missing:
        main(arguments)
    assert missing.value.code == 2
    assert "expected --images N" in capsys.readouterr().err


def test_a_plan_counts_the_images_that_are_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text("name: x\ndata: {scenes: {train: 12, val: 6, size: 32}}\noptim: {epochs: 2}\n")
    experiment = load_experiment("x.yaml", ["optim.global_batch=3"]).experiment
    measured = dict.fromkeys(("checkpoint_s", "restart_s", "exchange_s"), 0.0)

    def job(**given: float | None) -> Job:
        given = {**dict.fromkeys(("images", "val_images", "eval_images_per_s")), **given}
        return job_of(
            experiment,
            images_per_s=10.0,
            loader_images_per_s=None,
            store_mb_per_s=None,
            image_kb=160.0,
            **measured,
            **given,
        )

    assert (job().num_steps, job().evaluation_s) == (8, pytest.approx(2 * 6 / 30))
    assert job(eval_images_per_s=4.0).evaluation_s == pytest.approx(2 * 6 / 4)
    assert (job(val_images=9).num_steps, job(val_images=9).evaluation_s) == (8, pytest.approx(2 * 9 / 30))
    assert (job(images=30).num_steps, job(images=30).evaluation_s) == (20, 0)


@pytest.mark.parametrize(
    "option",
    ["images=-3", "images=0", "val-images=-1", "eval-images-per-s=0", "loader-images-per-s=-1", "store-mb-per-s=-2"],
)
def test_what_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str], option: str) -> None:
    name, value = option.split("=")
    arguments = ["plan", "experiments/scenes.yaml", "--gpus", "1", "--images-per-s", "25", "--images", "9"]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, f"--{name}", value])
    assert caught.value.code == 2
    assert f"--{name}" in capsys.readouterr().err
