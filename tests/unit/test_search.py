"""A search before anything runs: its section of the file, its space, its trials, their ranking."""

import math
import sys
from pathlib import Path

import pytest

from mimiclab.data import splits
from mimiclab.data.order import Order
from mimiclab.errors import UserError
from mimiclab.experiment import differences, identity, load_experiment, resolved_yaml
from mimiclab.schema import SearchConfig
from mimiclab.search.driver import check_room, num_concurrent, search
from mimiclab.search.metric import name_of, value_of
from mimiclab.search.results import best_experiment, note, ranking_table, spent_text
from mimiclab.search.space import describe, draw, extremes, grid
from mimiclab.search.trials import Plan, Trial, plan, ranked, resources_of, with_repeats

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
PLAIN = "name: small\ndata: {scenes: {}}\n"
SPACE = """
search:
  trials: 3
  space:
    model.mimic.cls_weight: {loguniform: [0.1, 10]}
    model.pyramid.stagger: {choice: [0, 1]}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text=PLAIN + SPACE, *overrides, environ=None):
    Path("x.yaml").write_text(text)
    return load_experiment("x.yaml", overrides, environ or {})


def mistake(text, *overrides):
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    return str(caught.value)


# The section of the file


def test_a_search_has_defaults_for_all_but_its_space():
    config = load(PLAIN + "search: {space: {optim.lr: {uniform: [1e-4, 1]}}}\n").experiment.search

    assert config == SearchConfig(
        metric="student/AP",
        mode="max",
        algorithm="random",
        trials=None,
        seeds_per_trial=1,
        budget=None,
        unit="epochs",
        workers_per_trial=None,
        max_t=None,
        grace_period=1,
        reduction_factor=2,
        max_concurrent="auto",
        space={"optim.lr": {"uniform": [1e-4, 1]}},
    )


def test_a_search_is_no_part_of_what_a_run_computes():
    plain, searched = load(PLAIN).experiment, load().experiment

    assert plain != searched
    assert identity(plain) == identity(searched)
    assert differences(plain, searched) == []


def test_the_searches_that_come_with_the_project_can_be_planned():
    files = list((EXPERIMENTS / "search").glob("*.yaml"))

    assert files
    for file in files:
        assert plan(load_experiment(file, environ={"MIMICLAB_DATA": "/data", "MIMICLAB_WEIGHTS": "/weights"}))


def test_keys_of_a_space_know_where_they_were_written():
    loaded = load(PLAIN + SPACE, "search.space.optim.lr={uniform: [1e-4, 1]}")

    assert loaded.origins["search.space.model.pyramid.stagger.choice"] == "x.yaml:8"
    assert loaded.origins["search.space.optim.lr.uniform"] == "--set"


def test_an_override_replaces_the_distribution_of_a_key():
    loaded = load(PLAIN + SPACE, "search.space.model.mimic.cls_weight={choice: [3]}")

    assert loaded.experiment.search.space == {
        "model.mimic.cls_weight": {"choice": [3]},
        "model.pyramid.stagger": {"choice": [0, 1]},
    }


BAD_SPACES = {
    "nothing": ("{}", "search.space: found no keys, expected dotted keys, such as model.mimic.cls_weight: {uni"),
    "no mapping": ("[optim.lr]", 'search.space: found ["optim.lr"], expected dotted keys'),
    "null": ("", "search.space: found null, expected dotted keys"),
    "unknown key": (
        "{model.mimic.cls_wieght: {uniform: [0, 1]}}",
        "search.space.model.mimic.cls_wieght: unknown key model.mimic.cls_wieght; did you mean model.mimic.cls_weight?",
    ),
    "unknown kind": (
        "{optim.lr: {logunifrom: [0.1, 1]}}",
        'search.space.optim.lr: found {"logunifrom": [0.1, 1]}, expected one of uniform, loguniform, normal,',
    ),
    "two kinds": (
        "{optim.lr: {uniform: [0.1, 1], choice: [1]}}",
        'search.space.optim.lr: found {"uniform": [0.1, 1], "choice": [1]}, expected one of',
    ),
    "no spread": ("{optim.lr: {normal: [1, 0]}}", "normal: found [1, 0], expected a standard deviation above 0"),
    "one moment": ("{optim.lr: {normal: [1]}}", "normal: found [1], expected two numbers, [mean, sd]"),
    "a normal that leaves the schema": (
        "{optim.lr: {normal: [1, 0.5]}}",
        "search.space.optim.lr: -0.5 does not fit: optim: lr must be positive, found -0.5",
    ),
    "a condition only": ("{optim.lr: {when: {seed: [1]}}}", 'found {"when": {"seed": [1]}}, expected one of uniform'),
    "no condition": ("{optim.lr: {when: {}, choice: [1]}}", "when: found {}, expected other keys, each with a list"),
    "a condition of no list": (
        "{seed: {choice: [1]}, optim.lr: {when: {seed: 1}, choice: [1]}}",
        'search.space.optim.lr: when: found {"seed": 1}, expected other keys, each with a list of its values',
    ),
    "a condition on what is not searched": (
        "{optim.lr: {when: {seed: [1]}, choice: [1]}}",
        "search.space.optim.lr: when: found seed, expected a key that is searched too",
    ),
    "a condition that never holds": (
        "{seed: {int: [0, 2]}, optim.lr: {when: {seed: [1, 3]}, choice: [1]}}",
        "search.space.optim.lr: when: seed is never 3: found int [0, 2], expected one of its values",
    ),
    "a condition on a range": (
        "{optim.momentum: {uniform: [0, 1]}, optim.lr: {when: {optim.momentum: [0]}, choice: [1]}}",
        "search.space.optim.lr: when: optim.momentum is never 0: found uniform [0, 1], expected one of its values",
    ),
    "conditions in a circle": (
        "{optim.lr: {when: {seed: [1]}, choice: [1]}, seed: {when: {optim.lr: [1]}, choice: [1]}}",
        "search.space.optim.lr: when: found a circle, optim.lr -> seed -> optim.lr; expected conditions that end",
    ),
    "a condition on itself": (
        "{seed: {when: {seed: [1]}, choice: [1]}}",
        "search.space.seed: when: found a circle, seed -> seed; expected conditions that end",
    ),
    "a value": ("{optim.lr: 3}", "search.space.optim.lr: found 3, expected one of"),
    "one end": ("{optim.lr: {uniform: [1]}}", "uniform: found [1], expected two numbers, [low, high]"),
    "upside down": ("{optim.lr: {uniform: [2, 1]}}", "uniform: found [2, 1], expected two numbers, [low, high]"),
    "text": ("{optim.lr: {uniform: [a, b]}}", 'uniform: found ["a", "b"], expected two numbers, [low, high]'),
    "truth": ("{optim.lr: {uniform: [false, true]}}", "uniform: found [false, true], expected two numbers"),
    "parts": ("{seed: {int: [0.5, 1]}}", "int: found [0.5, 1], expected two whole numbers, [low, high]"),
    "log of 0": ("{optim.lr: {loguniform: [0, 1]}}", "loguniform: found [0, 1], expected a low end above 0"),
    "no choice": ("{optim.lr: {choice: []}}", "choice: found [], expected a list of values"),
    "below the schema": (
        "{optim.lr: {uniform: [-1, 1]}}",
        "search.space.optim.lr: -1.0 does not fit: optim: lr must be positive, found -1.0",
    ),
    "above the schema": (
        "{model.pyramid.stagger: {int: [0, 3]}}",
        "search.space.model.pyramid.stagger: 3 does not fit: model.pyramid: min_level - stagger must be at least 2",
    ),
    "a choice of another type": (
        "{optim.name: {choice: [sgd, adam]}}",
        "search.space.optim.name: \"adam\" does not fit: optim.name: found \"adam\", expected 'sgd' or 'adamw'",
    ),
    "a range for whole numbers": (
        "{optim.warmup_steps: {uniform: [2, 4]}}",
        "search.space.optim.warmup_steps: 2.0 does not fit: optim.warmup_steps: found 2.0, expected a whole number",
    ),
    "a section": (
        "{model.mimic: {choice: [1]}}",
        "search.space.model.mimic: 1 does not fit: model.mimic: found 1, expected a section of keys",
    ),
    "below a key": (
        "{seed.x: {choice: [1]}}",
        "search.space.seed.x: seed: found a section of keys, expected a whole number",
    ),
    "an unset variable": (
        "{model.weights: {choice: [$NOWHERE/a]}}",
        "\"$NOWHERE/a\" does not fit: model.weights: variable NOWHERE is unset or empty, found '$NOWHERE/a'",
    ),
    **{
        key: (
            f"{{{key}: {{choice: [1]}}}}",
            f"search.space.{key}: name, scale, where, search, checkpoint, optim.epochs",
        )
        for key in ("name", "scale.workers", "where.storage", "optim.epochs", "checkpoint.keep", "search.trials")
    },
}


@pytest.mark.parametrize(("space", "message"), BAD_SPACES.values(), ids=BAD_SPACES.keys())
def test_mistakes_in_a_space(space, message):
    found = mistake(PLAIN + f"search:\n  space: {space}\n")

    assert message in found
    assert found.startswith("x.yaml:4: search.space")
    assert "\n" not in found


BAD_SEARCHES = {
    "no space": ("{trials: 2}", "x.yaml:3: search.space: found nothing, expected a value"),
    "mode": ("{mode: best}", "search.mode: found \"best\", expected 'max' or 'min'"),
    "no metric": (
        '{metric: ""}',
        'search.metric: found "", expected a metric\'s name, or names with weights other than 0',
    ),
    "an empty sum": ("{metric: {}}", "search.metric: found {}, expected a metric's name, or names with weights"),
    "a list": ("{metric: [student/AP]}", 'search.metric: found ["student/AP"], expected a metric\'s name, or names'),
    "a weight of 0": (
        "{metric: {student/AP: 0}}",
        'search.metric: found {"student/AP": 0}, expected a metric\'s name, or names with weights other than 0, such '
        "as {student/AP: 1, student/latency_ms: -0.002}",
    ),
    "a weight of text": ("{metric: {student/AP: much}}", 'search.metric: found {"student/AP": "much"}, expected'),
    "a weight of truth": ("{metric: {student/AP: true}}", 'search.metric: found {"student/AP": true}, expected'),
    "no budget": ("{budget: 0}", "search.budget: found 0, expected more than 0"),
    "no workers": ("{workers_per_trial: 0}", "search.workers_per_trial: found 0, expected more than 0"),
    "more workers than images of a step": (
        "{workers_per_trial: 9}",
        "every worker needs an image of each step: optim.global_batch must be at least search.workers_per_trial, found "
        "optim.global_batch 8 and search.workers_per_trial 9",
    ),
    "no seed": ("{seeds_per_trial: 0}", "search.seeds_per_trial: found 0, expected 1 or more"),
    "a unit": ("{unit: hours}", "search.unit: found \"hours\", expected 'epochs' or 'steps'"),
    "too patient for its steps": (
        "{unit: steps, max_t: 100, grace_period: 101}",
        "search.grace_period must not be above search.max_t, found search.grace_period 101 and search.max_t 100",
    ),
    "no trials": ("{trials: 0}", "search.trials: found 0, expected more than 0"),
    "no reduction": ("{reduction_factor: 1}", "search.reduction_factor: found 1, expected 2 or more"),
    "none at a time": (
        "{max_concurrent: 0}",
        "search.max_concurrent: found 0, expected a whole number above 0, or auto",
    ),
    "some at a time": ("{max_concurrent: many}", 'search.max_concurrent: found "many", expected a whole number'),
    "unknown": ("{trails: 3}", "unknown key search.trails; did you mean search.trials?"),
    "algorithm": ("{algorithm: halton}", "search.algorithm: found \"halton\", expected 'random', 'grid' or 'optuna'"),
    "a larger grid": (
        "{algorithm: grid, trials: 3}",
        "x.yaml:3: search.trials: found 3, the grid has 1; expected 1 or fewer, or null",
    ),
    "no last epoch": ("{max_t: 0}", "search.max_t: found 0, expected more than 0"),
    "too long": (
        "{max_t: 13}",
        "search.max_t must not be above optim.epochs, found search.max_t 13 and optim.epochs 12",
    ),
    "too patient for its end": (
        "{max_t: 4, grace_period: 5}",
        "search.grace_period must not be above search.max_t, found search.grace_period 5 and search.max_t 4",
    ),
    "too patient": (
        "{grace_period: 13}",
        "search.grace_period must not be above optim.epochs, found search.grace_period 13 and optim.epochs 12",
    ),
}


@pytest.mark.parametrize(("section", "message"), BAD_SEARCHES.values(), ids=BAD_SEARCHES.keys())
def test_mistakes_in_a_search(section, message):
    space = "" if section == "{trials: 2}" else ", space: {optim.lr: {choice: [1]}}"

    assert message in mistake(PLAIN + f"search: {section[:-1]}{space}}}\n")


BAD_GRIDS = {
    "a range": (
        "optim.lr: {uniform: [0.1, 1]}",
        "optim.lr: uniform: found [0.1, 1] in a grid, expected choice, or int",
    ),
    "a normal": ("optim.lr: {normal: [1, 0.1]}", "optim.lr: normal: found [1, 0.1] in a grid, expected choice, or int"),
    "many numbers": (
        "seed: {int: [0, 10]}",
        "seed: int: found [0, 10] in a grid, expected choice, or int of at most 10",
    ),
    "too much": (
        "seed: {choice: [" + ", ".join(map(str, range(10_001))) + "]}",
        "seed: found a grid of 10001 combinations, expected at most 10000",
    ),
}


@pytest.mark.parametrize(("key", "message"), BAD_GRIDS.values(), ids=BAD_GRIDS.keys())
def test_mistakes_in_a_grid(key, message):
    found = mistake(PLAIN + f"search:\n  algorithm: grid\n  space:\n    {key}\n")

    assert found.startswith(f"x.yaml:6: search.space.{message}")
    assert "\n" not in found


SHALLOW = "model: {pyramid: {min_level: 2, stagger: 0}}\n"


def test_a_key_under_a_condition_is_tried_where_that_holds():
    """Staggering by 1 needs a pyramid that begins at level 3, and more levels for the condition on the condition."""
    stagger = "model.pyramid.stagger: {%schoice: [1]}"
    level = "model.pyramid.min_level: {%schoice: [2, 3]}"
    deep = "when: {model.pyramid.min_level: [3]}, "
    space = f"{{{level % ''}, {stagger % deep}}}"
    load(PLAIN + SHALLOW + f"search: {{space: {space}}}\n")

    unconditional = f"{{{level % ''}, {stagger % ''}}}"
    assert mistake(PLAIN + SHALLOW + f"search: {{space: {unconditional}}}\n").startswith(
        "x.yaml:4: search.space.model.pyramid.stagger: 1 does not fit: model.pyramid: min_level - stagger must be at"
    )


def test_a_key_is_tried_under_the_conditions_of_its_conditions():
    space = (
        "{model.pyramid.min_level: {choice: [2, 3]}, seed: {when: {model.pyramid.min_level: [3]}, int: [1, 2]}, "
        "model.pyramid.stagger: {when: {seed: [2]}, choice: [1]}}"
    )

    load(PLAIN + SHALLOW + f"search: {{space: {space}}}\n")


def test_mistakes_between_keys_are_told_together():
    space = "{optim.lr: {when: {seed: [1]}, choice: [1]}, optim.momentum: {when: {seed: [1]}, choice: [0]}}"

    assert mistake(PLAIN + f"search:\n  space: {space}\n").splitlines()[0] == "x.yaml: 2 mistakes"


def test_every_key_of_a_space_is_checked():
    found = mistake(PLAIN + "search:\n  space:\n    optim.lrr: {choice: [1]}\n    optim.lr: {choice: [1, -1]}\n")

    assert found.splitlines() == [
        "x.yaml: 2 mistakes",
        "  x.yaml:5: search.space.optim.lrr: unknown key optim.lrr; did you mean optim.lr?",
        "  x.yaml:6: search.space.optim.lr: -1 does not fit: optim: lr must be positive, found -1.0",
    ]


# Drawing


RANGES = {
    "a": {"uniform": [-1, 3]},
    "b": {"loguniform": [0.01, 100]},
    "c": {"int": [2, 4]},
    "d": {"choice": ["x", None, [1, 2]]},
    "e": {"normal": [10, 2]},
}


def test_draws_cover_their_ranges_and_nothing_else():
    drawn = [draw(RANGES, 0, number) for number in range(2000)]
    a, b = ([values[key] for values in drawn] for key in "ab")

    assert -1 <= min(a) < -0.98
    assert 2.98 < max(a) <= 3
    assert sum(a) / len(a) == pytest.approx(1, abs=0.1)
    assert 0.01 <= min(b) < 0.011
    assert 90 < max(b) <= 100
    assert sum(value < 1 for value in b) / len(b) == pytest.approx(0.5, abs=0.05)
    assert {values["c"] for values in drawn} == {2, 3, 4}
    e = [values["e"] for values in drawn]
    assert sum(e) / len(e) == pytest.approx(10, abs=0.2)
    assert sum(8 < value < 12 for value in e) / len(e) == pytest.approx(0.68, abs=0.04)
    assert 4 <= min(e) < 5
    assert 15 < max(e) <= 16
    assert {str(values["d"]) for values in drawn} == {"x", "None", "[1, 2]"}


def test_draws_stay_between_ends_of_many_digits():
    ends = [0.12345678, 0.12345679]

    assert ends[0] <= draw({"a": {"uniform": ends}}, 0, 0)["a"] <= ends[1]


def test_a_draw_depends_on_seed_number_and_key_alone():
    one = draw(RANGES, 7, 3)

    assert draw(RANGES, 7, 3) == one
    assert draw({"b": RANGES["b"]}, 7, 3)["b"] == one["b"]
    assert draw(RANGES, 8, 3)["b"] != one["b"]
    assert draw(RANGES, 7, 4)["b"] != one["b"]
    assert draw({"b": RANGES["b"], "e": RANGES["b"]}, 7, 3)["e"] != one["b"]


def test_draws_are_the_same_in_every_process_and_release():
    assert draw(RANGES, 0, 0) == {"a": -0.4392, "b": 16.27, "c": 2, "d": None, "e": 11.11}


def test_the_extremes_of_a_range_are_numbers_with_a_point():
    assert [type(value) for value in extremes({"uniform": [0, 1]})] == [float, float]
    assert extremes({"int": [0, 3]}) == [0, 3]
    assert extremes({"normal": [0, 1]}) == [-3.0, 3.0]
    assert extremes({"choice": [1, None, "a"]}) == [1, None, "a"]


CONDITIONAL = {
    "z": {"when": {"y": [3]}, "choice": ["deep"]},
    "y": {"when": {"x": ["a", "b"]}, "int": [3, 4]},
    "x": {"choice": ["a", "b", "c"]},
}


def test_a_key_has_a_value_only_where_its_condition_holds():
    drawn = [draw(CONDITIONAL, 0, number) for number in range(200)]

    assert {tuple(values) for values in drawn} == {("x",), ("y", "x"), ("z", "y", "x")}
    for values in drawn:
        assert ("y" in values) == (values["x"] != "c")
        assert ("z" in values) == (values.get("y") == 3)


def test_conditions_change_no_value_that_is_drawn():
    free = {key: {kind: v for kind, v in d.items() if kind != "when"} for key, d in CONDITIONAL.items()}

    for number in range(20):
        values = draw(CONDITIONAL, 0, number)
        assert values == {key: value for key, value in draw(free, 0, number).items() if key in values}


def test_a_grid_is_every_combination_once_the_last_key_in_turn_first():
    assert grid({"a": {"choice": [1, 2]}, "b": {"int": [3, 4]}, "c": {"choice": [None, None]}}) == [
        {"a": 1, "b": 3, "c": None},
        {"a": 1, "b": 4, "c": None},
        {"a": 2, "b": 3, "c": None},
        {"a": 2, "b": 4, "c": None},
    ]


def test_a_grid_has_no_combination_twice_that_differs_in_a_key_without_a_value():
    assert grid(CONDITIONAL) == [
        {"z": "deep", "y": 3, "x": "a"},
        {"z": "deep", "y": 3, "x": "b"},
        {"x": "c"},
        {"y": 4, "x": "a"},
        {"y": 4, "x": "b"},
    ]


def test_distributions_are_described_with_their_conditions():
    assert describe({"loguniform": [0.1, 10]}) == "loguniform [0.1, 10]"
    assert describe({"when": {"a": ["x", 2], "b": [None]}, "int": [1, 2]}) == (
        'int [1, 2] when a is "x" or 2 and b is null'
    )


# Trials


def test_a_condition_may_come_from_a_file_and_from_the_command_line():
    space = "{model.student.offsets: {choice: [none, analytic_learned]}}"
    loaded = load(
        PLAIN + f"search: {{space: {space}}}\n",
        "search.space.optim.clip_norm={when: {model.student.offsets: [none]}, uniform: [1, 2]}",
    )
    for trial in plan(loaded):
        assert ("optim.clip_norm" in trial.values) == (trial.values["model.student.offsets"] == "none")


def test_the_trials_of_a_grid_are_its_combinations_or_the_first_of_them():
    text = PLAIN + "search: {algorithm: grid, space: {seed: {int: [1, 3]}, model.pyramid.stagger: {choice: [0, 1]}}}\n"
    combinations = [{"seed": seed, "model.pyramid.stagger": s} for seed in (1, 2, 3) for s in (0, 1)]

    assert [trial.values for trial in plan(load(text))] == combinations
    assert [trial.values for trial in plan(load(text, "search.trials=4"))] == combinations[:4]


def test_a_random_search_that_does_not_say_has_sixteen_trials():
    assert len(plan(load(PLAIN + "search: {space: {optim.lr: {uniform: [1e-4, 1]}}}\n"))) == 16


def test_trials_train_for_max_t_epochs_where_it_is_given():
    trials = plan(load(PLAIN + SPACE, "search.max_t=4"))

    assert {trial.experiment.optim.epochs for trial in trials} == {4}
    assert trials[0].values.keys() == plan(load())[0].values.keys()


def test_the_same_file_gives_the_same_trials():
    first, second = plan(load()), plan(load(PLAIN + SPACE, "search.trials=5"))

    assert [trial.experiment for trial in first] == [trial.experiment for trial in second[:3]]
    assert [trial.name for trial in second] == ["trial-00", "trial-01", "trial-02", "trial-03", "trial-04"]
    assert len({trial.values["model.mimic.cls_weight"] for trial in second}) == 5


def test_a_trial_is_the_experiment_with_its_values_and_a_name_of_its_own():
    loaded = load()
    trial = plan(loaded)[1]

    assert trial.experiment.name == "small-trial-01"
    assert trial.experiment.search is None
    assert differences(loaded.experiment, trial.experiment) == [
        'name: "small" -> "small-trial-01"',
        f"model.pyramid.stagger: 1 -> {trial.values['model.pyramid.stagger']}",
        f"model.mimic.cls_weight: 1.0 -> {trial.values['model.mimic.cls_weight']}",
    ]


def test_what_a_file_leaves_out_follows_the_values_of_the_trial():
    """The norm of a backbone depends on whether there are weights: it is resolved for each trial anew."""
    text = PLAIN + "search: {trials: 8, space: {model.backbone.weights: {choice: [null, $FOLDER/a.safetensors]}}}\n"
    backbones = [trial.experiment.model.backbone for trial in plan(load(text, environ={"FOLDER": "/w$"}))]

    assert {(b.weights, b.norm) for b in backbones} == {(None, "group_norm"), ("/w$/a.safetensors", "frozen_bn")}


def test_the_variables_of_a_file_are_filled_in_once_for_each_trial():
    (one,) = plan(
        load(PLAIN + SPACE + "where: {storage: $FOLDER/runs}\n", "search.trials=1", environ={"FOLDER": "/w$"})
    )

    assert one.experiment.where.storage == "/w$/runs"


def test_values_that_do_not_fit_together_name_their_trial():
    space = "{model.pyramid.stagger: {choice: [1, 0]}, model.pyramid.min_level: {choice: [3, 2]}}"
    text = PLAIN + f"model: {{pyramid: {{stagger: 0}}}}\nsearch: {{trials: 30, space: {space}}}\n"

    with pytest.raises(
        UserError,
        match=r"x\.yaml: search: trial-\d\d with model.pyramid.stagger = 1, model.pyramid.min_level = 2: "
        r"model.pyramid: min_level - stagger must be at least 2",
    ):
        plan(load(text))


def test_a_search_needs_its_section():
    with pytest.raises(UserError, match=r"^x\.yaml: it has no search: section, expected one such as\n  search: {"):
        search(load(PLAIN), console=None)


@pytest.mark.parametrize(
    ("scale", "cluster", "most", "expected"),
    [
        ("{workers: 1}", {"CPU": 4.0}, "auto", 3),  # no more than there are trials
        ("{workers: 2}", {"CPU": 4.0}, "auto", 2),
        ("{workers: 2, threads: 2}", {"CPU": 7.0}, "auto", 1),
        ("{workers: 1, gpu: true}", {"CPU": 64.0, "GPU": 2.0}, "auto", 2),
        ("{workers: 1, gpu: true, threads: 32}", {"CPU": 64.0, "GPU": 8.0}, "auto", 2),
        ("{workers: 1}", {"CPU": 4.0}, "1", 1),
        ("{workers: 2}", {"CPU": 4.0}, "3", 2),
        ("{workers: 1}", {"CPU": 9.0}, "9", 3),
    ],
)
def test_as_many_trials_run_at_a_time_as_the_cluster_holds(scale, cluster, most, expected):
    experiment = load(PLAIN + SPACE, f"scale={scale}", f"search.max_concurrent={most}").experiment

    assert num_concurrent(experiment, cluster, num_trials=3) == expected


# Results


def trial(number, outcome, *values):
    own = plan(load())[number]
    return Trial(number, own.values, own.experiment, outcome, list(enumerate(values, start=1)))


def some_trials():
    return [trial(0, "finished", 0.1, 0.4, 0.3), trial(1, "pruned", 0.2), trial(2, "failed")]


def test_trials_rank_by_their_best_evaluation():
    a, b, c = some_trials()
    b.evaluations.insert(0, (0, float("nan")))

    assert ranked([c, b, a], "max") == [a, b, c]
    assert ranked([c, b, a], "min") == [a, b, c]
    assert ranked([trial(1, "pruned", 0.5), a], "max")[0].number == 1
    assert a.best("max") == (2, 0.4)
    assert a.best("min") == (1, 0.1)
    assert b.best("max") == (1, 0.2)
    assert c.best("max") is None


def test_equals_rank_by_number():
    assert [t.number for t in ranked([trial(1, "finished", 0.5), trial(0, "finished", 0.5)], "max")] == [0, 1]


def test_the_table_shows_each_trial_with_its_values():
    table = ranking_table(some_trials(), load().experiment.search, "small")

    assert [column.header for column in table.columns] == [
        *("trial", "outcome", "student/AP", "epochs", "cls_weight", "stagger")
    ]
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    assert [row[:4] for row in cells] == [
        ("trial-00", "finished", "0.4000", "3"),
        ("trial-01", "pruned", "0.2000", "1"),
        ("trial-02", "failed", "-", "0"),
    ]
    assert [float(row[4]) for row in cells] == [t.values["model.mimic.cls_weight"] for t in some_trials()]


def test_a_key_without_a_value_leaves_its_cell_empty():
    one = some_trials()[0]
    one.values = {"model.pyramid.stagger": 0}

    assert list(ranking_table([one], load().experiment.search, "small").columns[4].cells) == ["-"]
    assert note(load().experiment, 1, [one]).endswith("| trial-00 | finished | 0.4000 | 3 | - | 0 |")


def test_keys_that_end_alike_are_told_apart():
    space = "{model.student.loss_weight: {choice: [1]}, model.teacher.loss_weight: {choice: [1]}}"
    table = ranking_table([], load(PLAIN + f"search: {{space: {space}}}\n").experiment.search, "small")

    assert [column.header for column in table.columns][-2:] == [
        "model.student.loss_weight",
        "model.teacher.loss_weight",
    ]


def test_the_best_trial_becomes_a_file_that_says_where_it_comes_from():
    best = some_trials()[0]
    text = best_experiment(Plan(load()), best, 3)
    Path("best.yaml").write_text(text)

    assert text.splitlines()[:4] == [
        "# The best of 3 trials of the search small: trial-00 (finished), student/AP 0.4000 at epoch 2.",
        "# What the search chose:",
        f"#   model.mimic.cls_weight: {best.values['model.mimic.cls_weight']}",
        f"#   model.pyramid.stagger: {best.values['model.pyramid.stagger']}",
    ]
    loaded = load_experiment("best.yaml").experiment
    assert loaded.name == "small-best"
    assert loaded.model_copy(update={"name": "small-trial-00"}) == best.experiment


def test_the_note_tells_the_space_and_then_the_ranking():
    experiment = load().experiment

    before, after = note(experiment, 3), note(experiment, 3, some_trials())

    assert before.splitlines() == [
        "ASHA search of 3 trials (random) for the max of `student/AP`, 1 to 12 epochs each, over",
        "- `model.mimic.cls_weight`: loguniform [0.1, 10]",
        "- `model.pyramid.stagger`: choice [0, 1]",
    ]
    assert after.startswith(before)
    assert "| trial | outcome | student/AP | epochs | cls_weight | stagger |" in after
    assert "| trial-01 | pruned | 0.2000 | 1 | " in after


# Metrics


EVALUATION = {"student/AP": 0.5, "student/latency_ms": 40.0, "teacher/AP": 0.6, "gap/AP": 0.1, "epoch": 3}


def test_a_metric_is_a_name_or_a_weighted_sum():
    assert value_of("gap/AP", EVALUATION) == 0.1
    assert value_of({"student/AP": 1, "student/latency_ms": -0.002}, EVALUATION) == pytest.approx(0.42)
    assert math.isnan(value_of({"student/AP": 1, "gap/AP": 2}, {"student/AP": 0.5, "gap/AP": math.nan}))


def test_a_sum_has_a_name_that_people_can_read():
    assert name_of("student/AP") == "student/AP"
    assert name_of({"student/AP": 1.0, "student/latency_ms": -0.002}) == "student/AP - 0.002 student/latency_ms"
    assert name_of({"gap/AP": -1.0, "teacher/AP": 2.0}) == "-gap/AP + 2 teacher/AP"


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("student/ap", "evaluations do not report student/ap; did you mean student/AP?"),
        ({"student/AP": 1, "student/latency": -1}, "report student/latency; did you mean student/latency_ms?"),
        ({"student/Ap": 1, "gap/Ap": -1}, "report student/Ap and gap/Ap; did you mean student/AP and gap/AP?"),
        ("loss", "report loss; expected one of gap/AP, student/AP, student/latency_ms, teacher/AP"),
    ],
)
def test_what_evaluations_do_not_report_is_named(metric, message):
    with pytest.raises(UserError, match=r"^search\.metric: evaluations do not ") as caught:
        value_of(metric, EVALUATION)

    assert str(caught.value).endswith(message)


def test_a_sum_may_be_written_in_a_file_and_comes_back_from_the_resolved_one():
    loaded = load(PLAIN + SPACE + "  metric: {student/AP: 1, student/latency_ms: -0.002}\n")
    assert loaded.experiment.search.metric == {"student/AP": 1.0, "student/latency_ms": -0.002}

    Path("again.yaml").write_text(resolved_yaml(loaded.experiment))

    assert load_experiment("again.yaml").experiment == loaded.experiment
    assert "for the max of `student/AP - 0.002 student/latency_ms`, " in note(loaded.experiment, 3)


# Steps, workers, seeds


def steps(*overrides):
    """A plan in steps, of 10 images in batches of 4: epochs end at 3, 5, 8, 10, 13 ... 30."""
    loaded = load(PLAIN + SPACE, "search.unit=steps", "optim.global_batch=4", *overrides)
    return Plan(loaded, lambda experiment: Order(10, experiment.optim.global_batch, experiment.seed))


@pytest.mark.parametrize(("max_t", "epochs"), [(1, 1), (3, 1), (4, 2), (10, 4), (11, 5), (30, 12)])
def test_trials_in_steps_end_with_the_first_epoch_that_reaches_max_t(max_t, epochs):
    plan = steps(f"search.max_t={max_t}")

    assert plan.max_t == max_t
    assert {trial.experiment.optim.epochs for trial in plan.trials()} == {epochs}


def test_trials_in_steps_train_for_all_epochs_where_nothing_else_is_said():
    plan = steps()

    assert plan.max_t == 30
    assert {trial.experiment.optim.epochs for trial in plan.trials()} == {12}
    assert "1 steps to 12 epochs each" in note(plan.experiment, 3)
    assert "1 steps to 5 steps each" in note(steps("search.max_t=5").experiment, 3)


def test_the_data_tells_how_many_steps_there_are_and_is_read_once(monkeypatch):
    scenes = "{root: scenes, train: 5, val: 2, size: 32}"
    text = f"name: small\ndata: {{scenes: {scenes}}}\noptim: {{global_batch: 2, epochs: 4}}\n" + SPACE
    found = plan(load(text, "search.unit=steps", "search.max_t=6"))
    monkeypatch.setattr(splits, "_read", None)
    again = plan(load(text, "search.unit=steps", "search.max_t=5", "data.flip=0"))

    # Of 5 images in batches of 2 epochs end at 2, 5, 7 and 10.
    assert {trial.experiment.optim.epochs for trial in found} == {3}
    assert {trial.experiment.optim.epochs for trial in again} == {2}


def test_steps_are_those_of_each_trials_own_batches():
    plan = steps("search.max_t=10", "search.space={optim.global_batch: {choice: [4, 2]}}", "search.trials=8")

    found = {(trial.values["optim.global_batch"], trial.experiment.optim.epochs) for trial in plan.trials()}
    assert found == {(4, 4), (2, 2)}


@pytest.mark.parametrize("key", ["max_t", "grace_period"])
def test_more_steps_than_there_are_in_all_epochs_are_refused(key):
    with pytest.raises(UserError) as caught:
        steps(f"search.{key}=31")

    assert str(caught.value) == (
        f"search.{key} must not be above the steps of optim.epochs, found search.{key} 31 and 30 steps in 12 epochs"
    )


def test_trials_have_the_workers_that_the_search_gives_them():
    loaded = load(PLAIN + SPACE, "search.workers_per_trial=2", "scale={workers: {min: 1, max: 8}, threads: 3}")

    assert {str(trial.experiment.scale.workers) for trial in plan(loaded)} == {"2"}
    assert resources_of(loaded.experiment) == {"CPU": 6}
    assert num_concurrent(loaded.experiment, {"CPU": 13.0}, num_trials=3) == 2
    check_room(loaded.experiment, {"CPU": 6.0})
    with pytest.raises(UserError) as caught:
        check_room(loaded.experiment, {"CPU": 5.0})
    assert str(caught.value) == (
        "search.workers_per_trial: 2 workers of 3 CPU each need 6, found 5 in the cluster; expected fewer workers per "
        "trial or a larger cluster"
    )


def test_trials_have_the_workers_of_the_file_where_the_search_says_nothing():
    loaded = load(PLAIN + SPACE, "scale={workers: {min: 1, max: 8}}")

    assert {str(trial.experiment.scale.workers) for trial in plan(loaded)} == {"1 to 8"}
    check_room(loaded.experiment, {"CPU": 1.0})


def test_a_trial_is_repeated_with_the_seeds_that_follow():
    trials = plan(load(PLAIN + SPACE, "search.seeds_per_trial=3", "seed=7"))
    one = trials[1]

    assert [(run.name, run.experiment.name, run.experiment.seed) for run in with_repeats([one])] == [
        ("trial-01", "small-trial-01", 7),
        ("trial-01-seed-8", "small-trial-01-seed-8", 8),
        ("trial-01-seed-9", "small-trial-01-seed-9", 9),
    ]
    same = {"name": "small-trial-01", "seed": 7}
    assert {run.experiment.model_copy(update=same).model_dump_json() for run in one.repeats} == {
        one.experiment.model_dump_json()
    }
    assert one.values == one.repeats[0].values


def test_the_seeds_of_a_searched_seed_follow_that_one():
    (one,) = plan(load(PLAIN + "search: {trials: 1, seeds_per_trial: 2, space: {seed: {choice: [5]}}}\n"))

    assert [run.experiment.seed for run in with_repeats([one])] == [5, 6]


def repeated(number, *bests):
    """A trial whose first run and repeats have these best values; only finished repeats count."""
    one = trial(number, "finished", bests[0], bests[0] / 2)
    for seed, best in enumerate(bests[1:], start=1):
        one.repeats.append(Trial(number, one.values, one.experiment, "finished", [(1, best)], seed=seed))
    return one


def test_trials_rank_by_the_mean_over_seeds():
    lucky, steady = repeated(0, 0.9, 0.1), repeated(1, 0.6, 0.6)

    assert lucky.scores("max") == (0.9, 0.1)
    assert ranked([lucky, steady], "max") == [steady, lucky]
    lucky.repeats[0].outcome = "running"
    assert ranked([lucky, steady], "max") == [lucky, steady]


def test_the_table_has_the_interval_of_the_mean_over_seeds():
    config = load(PLAIN + SPACE, "search.seeds_per_trial=2").experiment.search
    table = ranking_table([repeated(0, 0.3, 0.4), repeated(1, 0.2)], config, "small")

    assert [column.header for column in table.columns][2:5] == ["student/AP", "± 95 %", "epochs"]
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    # Half of the interval is 12.7062 * 0.05, see test_seeds.py.
    assert [row[2:5] for row in cells] == [("0.3500", "0.6353 (2)", "2"), ("0.2000", "-", "2")]


def test_the_best_of_several_seeds_says_so():
    text = best_experiment(Plan(load()), repeated(0, 0.3, 0.4), 3)

    assert text.startswith(
        "# The best of 3 trials of the search small: trial-00 (finished), student/AP 0.3000 at epoch 1 (mean of 2 "
        "seeds: 0.3500 ± 0.6353).\n"
    )


def test_the_note_tells_what_was_spent_and_that_it_ended_the_search():
    experiment = load(PLAIN + SPACE, "search.budget=2").experiment

    assert "Budget: 2 core-hours." in note(experiment, 3)
    assert "1.5 of 2 core-hours were spent." in note(experiment, 3, some_trials(), 1.5)
    assert "2.25 of 2 core-hours were spent, which ended the search." in note(experiment, 3, some_trials(), 2.25)
    assert spent_text(load(PLAIN + SPACE, "scale.gpu=true").experiment, 0.5) == "0.5 GPU-hours were spent"


def test_optuna_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)

    with pytest.raises(UserError) as caught:
        search(load(PLAIN + SPACE, "search.algorithm=optuna"), console=None)
    assert str(caught.value) == (
        "search.algorithm: optuna needs a package that is not installed; expected mimiclab[optuna], or another "
        "algorithm"
    )


def test_a_scorer_that_is_not_there_is_named_before_a_trial_starts(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)

    with pytest.raises(UserError, match=r"^eval\.scorer: faster-coco-eval is not installed; expected mimiclab\[fast-"):
        search(load(PLAIN + SPACE, "eval.scorer=faster-coco-eval"), console=None)


def test_trials_of_optuna_have_no_values_before_they_start():
    trials = plan(load(PLAIN + SPACE, "search.algorithm=optuna"))

    assert [(trial.name, trial.values) for trial in trials] == [(f"trial-0{n}", {}) for n in range(3)]
