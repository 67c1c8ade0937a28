"""Values that Optuna proposes: from the record alone, within the space, and better ones the longer it goes on."""

import math
import statistics
from pathlib import Path
from typing import Any, Literal

import pytest
from searches import FILE, Driver, objective

from mimiclab.errors import UserError
from mimiclab.experiment import load_experiment
from mimiclab.schema import SearchConfig
from mimiclab.search.proposals import MAX_DRAWS, propose
from mimiclab.search.record import Record
from mimiclab.search.trials import Trial
from mimiclab.storage import Storage

OPTUNA = "search.algorithm=optuna"
SPACE = {
    "model.student.offsets": {"choice": ["none", "analytic_learned"]},
    "optim.clip_norm": {"when": {"model.student.offsets": ["none"]}, "uniform": [1, 2]},
    "optim.lr": {"loguniform": [1e-4, 1e-2]},
    "optim.momentum": {"normal": [0.8, 0.05]},
    "seed": {"int": [3, 5]},
    "optim.milestones": {"choice": [[3], [6, 8], []]},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "small"


def proposals(space: dict[str, Any], num: int, mode: str = "max") -> list[Trial]:
    """Trials that are proposed one after the other; each is finished with a value that falls with the learning rate."""
    Path("x.yaml").write_text(FILE)
    base = load_experiment("x.yaml").experiment
    config = SearchConfig(algorithm="optuna", space=space, mode=mode)
    trials: list[Trial] = []
    for number in range(num):
        found: list[dict[str, Any]] = []
        propose(config, 0, number, trials, found.append)
        value = -abs(found[0].get("optim.lr", 0) - 0.003)
        trials.append(Trial(number, found[0], base, "finished", [(1, value)]))
    return trials


def test_proposals_are_within_the_space_and_its_conditions() -> None:
    found = [trial.values for trial in proposals(SPACE, 25)]

    for values in found:
        assert list(values) == [key for key in SPACE if key in values]
        assert ("optim.clip_norm" in values) == (values["model.student.offsets"] == "none")
        assert 1 <= values.get("optim.clip_norm", 1) <= 2
        assert 1e-4 <= values["optim.lr"] <= 1e-2
        assert 0.65 <= values["optim.momentum"] <= 0.95
        assert values["optim.milestones"] in ([3], [6, 8], [])
    assert {values["seed"] for values in found} == {3, 4, 5}
    assert len({values["optim.lr"] for values in found}) > 20
    assert all(f"{values['optim.momentum']:.4g}" == f"{values['optim.momentum']:g}" for values in found)
    # Most of a normal distribution is near its mean.
    assert sum(abs(values["optim.momentum"] - 0.8) < 0.1 for values in found) > 17


@pytest.mark.parametrize(("mode", "better"), [("max", True), ("min", False)])
def test_proposals_become_better_with_what_is_known(mode: str, better: bool) -> None:
    values = [trial.evaluations[0][1] for trial in proposals({"optim.lr": {"loguniform": [1e-4, 1e-2]}}, 30, mode)]

    first, last = statistics.fmean(values[:10]), statistics.fmean(values[-10:])
    assert (last > first + 0.001) == better
    assert (last < first - 0.001) != better


def test_nothing_near_what_runs_is_proposed() -> None:
    space = {"optim.lr": {"loguniform": [1e-4, 1e-2]}}
    known = proposals(space, 12)
    best = max(known, key=lambda trial: trial.evaluations[0][1])
    config = SearchConfig(algorithm="optuna", space=space)

    def distance(outcome: Literal["running", "failed"]) -> float:
        """How far new proposals are from several trials that are at the best value."""
        others = [Trial(100 + n, best.values, best.experiment, outcome) for n in range(10)]
        found: list[dict[str, Any]] = []
        for number in range(12, 32):
            propose(config, 0, number, [*known, *others], found.append)
        return statistics.fmean(abs(math.log(values["optim.lr"] / best.values["optim.lr"])) for values in found)

    assert distance("running") > 1.5 * distance("failed")


def test_values_that_do_not_fit_are_drawn_again() -> None:
    Path("x.yaml").write_text(FILE)
    config = SearchConfig(algorithm="optuna", space={"seed": {"int": [0, 9]}})
    seen: list[int] = []

    def fits(values: dict[str, Any]) -> None:
        seen.append(values["seed"])
        if values["seed"] != 7:
            raise UserError("not 7")

    propose(config, 0, 0, [], fits)

    assert seen[-1] == 7
    assert 1 < len(seen) < MAX_DRAWS


def test_a_space_in_which_nothing_fits_is_named() -> None:
    config = SearchConfig(algorithm="optuna", space={"seed": {"choice": [4]}})

    def fits(_: dict[str, Any]) -> None:
        raise UserError("seed: found 4")

    with pytest.raises(UserError) as caught:
        propose(config, 0, 0, [], fits)
    assert str(caught.value) == (
        "search.space: 50 proposals in a row do not fit together, the last one seed = 4: seed: found 4; expected a "
        "space in which most values do, or conditions (when)"
    )


def test_a_search_goes_on_with_the_proposals_that_it_would_have_made(folder: Path) -> None:
    """Half of the trials by one driver, half by another; against all by one."""
    values = []
    for num_drivers in (1, 2):
        (folder / "record.jsonl").unlink(missing_ok=True)
        driver = Driver(OPTUNA, "search.trials=14")
        for number in range(14):
            if number == 7 and num_drivers == 2:
                driver = Driver(OPTUNA, "search.trials=14")
            run = driver.begin()
            for epoch in range(1, 10):
                if not driver.result(run, epoch, objective(run, epoch)):
                    break
            driver.course.complete(run)
        values.append([trial.values for trial in driver.trials])

    assert values[0] == values[1]
    assert {trial.outcome for trial in driver.trials} == {"finished", "pruned"}
    told = [event["values"] for event in Record(Storage(folder)).events if event["event"] == "started"]
    assert told == values[0]


def test_values_of_a_search_by_optuna_are_taken_from_the_record(folder: Path) -> None:
    driver = Driver(OPTUNA)
    run = driver.begin()
    file = folder / "record.jsonl"
    file.write_text(file.read_text().replace(str(run.values["optim.lr"]), "0.005"))

    again = Driver(OPTUNA)

    assert again.trials[0].values["optim.lr"] == again.trials[0].experiment.optim.lr == 0.005
    assert again.trials[1].values == {}


def test_trials_that_run_side_by_side_have_different_values() -> None:
    driver = Driver(OPTUNA)
    runs = [driver.begin() for _ in range(4)]

    assert len({run.values["optim.lr"] for run in runs}) == 4
