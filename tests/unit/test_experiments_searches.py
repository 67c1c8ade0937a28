"""The searches that come with the project: what each looks for, and that all of its trials are experiments."""

from pathlib import Path

import pytest

from mimiclab.experiment import LoadedExperiment, differences, load_experiment
from mimiclab.search.asha import Asha
from mimiclab.search.trials import Trial, plan

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
MIMIC = {"model.mimic.cls_weight", "model.mimic.reg_weight"}
# Of every file: what it extends, the keys that it searches, how many trials, the rungs.
SEARCHES: dict[str, tuple[str, set[str], int, tuple[int, ...]]] = {
    "small": ("scenes", {*MIMIC, "model.pyramid.stagger"}, 4, (2, 4)),
    "mimic-stagger": ("scenes", {*MIMIC, "model.pyramid.stagger"}, 16, (2, 6)),
    "detach-paths": (
        "scenes",
        {
            *MIMIC,
            "model.mimic.centered_logits",
            "model.mimic.reg_positives_only",
            "model.mimic.before_relu",
            "model.mimic.detach_teacher",
            "model.student.detach_offsets",
            "model.refinement.detach_boxes",
        },
        24,
        (2, 6),
    ),
    "thresholds": ("scenes", {"model.student.iou_threshold", "model.teacher.iou_threshold"}, 16, (2, 6)),
    "learning-rate": (
        "scenes",
        {"optim.lr", "optim.schedule", "optim.warmup_steps", "optim.weight_decay"},
        16,
        (4, 8, 16),
    ),
    "coco-mimic-stagger": ("coco/r50-1x", {*MIMIC, "model.pyramid.stagger"}, 16, (1, 3, 9)),
}


def load(name: str) -> LoadedExperiment:
    return load_experiment(EXPERIMENTS / f"{name}.yaml", environ={"MIMICLAB_DATA": "/data"})


def trials(name: str) -> list[Trial]:
    return plan(load(f"search/{name}"))


def test_every_file_is_known_here() -> None:
    assert {path.stem for path in (EXPERIMENTS / "search").iterdir()} == set(SEARCHES)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_is_over_what_it_claims(name: str) -> None:
    _, keys, num, rungs = SEARCHES[name]
    experiment, found = load(f"search/{name}").experiment, trials(name)
    config = experiment.search
    assert config is not None
    assert (experiment.name, config.metric, config.mode) == (name, "student/AP", "max")
    assert set(config.space) == keys
    assert len(found) == num
    # Every key takes several values, or the search is over less than it says.
    assert all(len({str(trial.values.get(key)) for trial in found}) > 1 for key in keys)
    asha = Asha(
        max_t=experiment.optim.epochs,
        grace_period=config.grace_period,
        reduction_factor=config.reduction_factor,
        mode=config.mode,
    )
    assert asha.rungs == rungs
    # Trials are compared at a rung when they reach it, and not an epoch later.
    assert all(rung % experiment.eval.every_epochs == 0 for rung in rungs)
    assert experiment.optim.epochs % experiment.eval.every_epochs == 0


@pytest.mark.parametrize("name", SEARCHES)
def test_a_trial_differs_from_what_is_extended_by_its_values_alone(name: str) -> None:
    base, keys, *_ = SEARCHES[name]
    search = load(f"search/{name}").experiment
    before, own = load(base).experiment, set()
    for trial in trials(name):
        changed = {line.partition(": ")[0] for line in differences(search, trial.experiment)}
        assert changed <= {"name", *keys}
        own |= changed
    assert own == {"name", *keys}
    if name != "small":
        shorter = {"name", "eval.every_epochs", "optim.schedule", "optim.milestones"}
        assert {line.partition(": ")[0] for line in differences(before, search)} <= shorter
        assert search.optim.epochs == before.optim.epochs
    assert (EXPERIMENTS / "search" / f"{name}.yaml").read_text().startswith("# ")


def test_each_way_to_mimic_counts_only_where_its_path_is_mimicked() -> None:
    for trial in trials("detach-paths"):
        values = trial.values
        assert ("model.mimic.centered_logits" in values) == (values["model.mimic.cls_weight"] == 1)
        assert ("model.mimic.before_relu" in values) == (values["model.mimic.reg_weight"] == 1)


def test_the_cost_of_the_search_on_coco_is_what_its_assumptions_make() -> None:
    text = (EXPERIMENTS / "search" / "coco-mimic-stagger.yaml").read_text()
    experiment = load("search/coco-mimic-stagger").experiment
    epoch = (118287 / 10 + 5000 / 30) / 3600
    trial = experiment.optim.epochs * epoch
    whole = len(trials("coco-mimic-stagger")) * trial
    for number in (f"{epoch:.1f}", f"{round(trial)}", f"{round(whole)}", f"{round(0.25 * whole, -1):.0f}"):
        assert f" {number} GPU-hours" in text
    assert experiment.search is not None
    assert experiment.search.budget is not None
    assert 0.32 * whole < experiment.search.budget < whole / 2
