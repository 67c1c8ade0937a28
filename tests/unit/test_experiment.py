import json
import os
import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from mimiclab.errors import UserError
from mimiclab.experiment import (
    DEFAULTS_VERSION,
    defaults,
    differences,
    flatten,
    identity,
    load_experiment,
    render,
    resolved_yaml,
)
from mimiclab.optim import OptimConfig
from mimiclab.schema import PATH_KEYS, Experiment, Scenes, SearchConfig, Workers, known_keys

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
ENVIRON = {"MIMICLAB_DATA": "/data", "MIMICLAB_WEIGHTS": "/weights"}
SMALL = "name: small\ndata: {scenes: {}}\n"
FILES = "data:\n  train: {annotations: a.json, images: a}\n  val: {annotations: b.json, images: b}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text, *overrides, environ=ENVIRON):
    Path("x.yaml").write_text(text)
    return load_experiment("x.yaml", overrides, environ)


def mistake(text, *overrides, environ=ENVIRON):
    with pytest.raises(UserError) as caught:
        load(text, *overrides, environ=environ)
    return str(caught.value)


# Reading


@pytest.mark.parametrize("name", ["bccd-mobilenet", "scenes"])
def test_the_experiments_that_come_with_the_project_load(name):
    loaded = load_experiment(EXPERIMENTS / f"{name}.yaml", environ=ENVIRON)

    assert loaded.experiment.name == name
    assert loaded.path == EXPERIMENTS / f"{name}.yaml"


def test_values_reach_their_sections_with_their_types():
    text = SMALL + "optim: {lr: 3e-4, clip_norm: 20, schedule: step, milestones: [8, 11]}\nscale: {gpu: true}\n"

    experiment = load(text).experiment

    assert experiment.optim == OptimConfig(lr=3e-4, clip_norm=20.0, schedule="step", milestones=(8, 11))
    assert isinstance(experiment.optim.clip_norm, float)
    assert experiment.scale.gpu is True


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.e-3", ".001", "+0.001", "10e-4"])
def test_numbers_in_scientific_notation(number):
    assert load(SMALL + f"optim: {{lr: {number}}}\n").experiment.optim.lr == 1e-3


@pytest.mark.parametrize("name", ["no", "on", "2024-01-02", "1_0"])
def test_text_that_older_yaml_takes_for_something_else_stays_text(name):
    assert load(f"name: {name}\ndata: {{scenes: {{}}}}\n").experiment.name == name


def test_aliases_may_repeat_a_value():
    experiment = load(
        f"name: x\n{FILES.replace('train: {', 'train: &s {')}".replace("{annotations: b.json, images: b}", "*s")
    )

    assert experiment.experiment.data.val == experiment.experiment.data.train


def test_experiment_travels_to_workers_unchanged():
    experiment = load(SMALL).experiment

    assert pickle.loads(pickle.dumps(experiment)) == experiment


def test_experiment_is_frozen():
    experiment = load(SMALL).experiment

    with pytest.raises(ValueError, match="frozen"):
        experiment.seed = 1


@pytest.mark.parametrize(
    ("written", "expected"),
    [("4", (4, 4)), ("{min: 4, max: 4}", (4, 4)), ("{min: 1, max: 8}", (1, 8)), ("{max: 8, min: 1}", (1, 8))],
)
def test_workers_are_a_number_or_a_range(written, expected):
    workers = load(SMALL, f"scale.workers={written}").experiment.scale.workers

    assert (workers.min, workers.max) == expected
    assert str(workers) == ("4" if expected == (4, 4) else "1 to 8")


def test_an_end_of_a_range_of_workers_may_be_overridden():
    loaded = load(SMALL + "scale: {workers: {min: 1, max: 4}}\n", "scale.workers.min=2")

    assert loaded.experiment.scale.workers == Workers(min=2, max=4)
    assert loaded.origins["scale.workers.min"] == "--set"
    assert loaded.origins["scale.workers.max"] == "x.yaml:3"


def test_labels_of_nodes_may_have_dots_and_slashes():
    loaded = load(SMALL + "scale:\n  label_selector:\n    ray.io/market-type: spot\n")

    assert loaded.experiment.scale.label_selector == {"ray.io/market-type": "spot"}
    assert loaded.origins["scale.label_selector.ray.io/market-type"] == "x.yaml:5"


def test_checkpoints_weigh_their_cost_where_it_is_known_how_often_machines_go():
    experiment = load(SMALL + "checkpoint: {every_steps: auto}\nscale: {mtbf_minutes: 90}\n").experiment

    assert experiment.checkpoint.every_steps == "auto"
    assert experiment.scale.mtbf_minutes == 90.0


# Origins, overrides, extends


def test_origins_name_file_and_line_or_override_or_default():
    loaded = load(SMALL + "optim:\n  lr: 1e-3\n  epochs: 2\nseed: 1\n", "optim.epochs=3")

    assert loaded.origins["name"] == "x.yaml:1"
    assert loaded.origins["optim.lr"] == "x.yaml:4"
    assert loaded.origins["seed"] == "x.yaml:6"
    assert loaded.origins["optim.epochs"] == "--set"
    assert loaded.origins["optim.gamma"] == "default"
    assert loaded.origins.keys() == flatten(loaded.experiment).keys()


def test_overrides_are_laid_over_the_file_in_turn():
    experiment = load(
        SMALL + "optim: {lr: 1, epochs: 5}\n",
        "optim.lr=2e-3",
        "optim.lr=1e-3",
        "optim={warmup_steps: 7}",
        "model.student.kernel_sizes=[3, 7]",
        "optim.clip_norm=",
    ).experiment

    assert experiment.optim == OptimConfig(lr=1e-3, epochs=5, warmup_steps=7, clip_norm=None)
    assert experiment.model.student.kernel_sizes == (3, 7)


def test_extends_merges_mappings_and_replaces_lists():
    Path("base").mkdir()
    Path("base/root.yaml").write_text("optim: {lr: 1, epochs: 5, schedule: step, milestones: [2, 3]}\nseed: 4\n")
    Path("base/mid.yaml").write_text("extends: root.yaml\noptim:\n  lr: 0.5\n  milestones: [1]\n")

    loaded = load("extends: base/mid.yaml\n" + SMALL + "optim:\n  epochs: 6\n")

    assert loaded.experiment.optim == OptimConfig(lr=0.5, epochs=6, schedule="step", milestones=(1,))
    assert loaded.experiment.seed == 4
    assert loaded.origins["optim.lr"] == "base/mid.yaml:3"
    assert loaded.origins["optim.schedule"] == "base/root.yaml:1"
    assert loaded.origins["optim.epochs"] == "x.yaml:5"


def test_a_section_set_to_null_forgets_what_was_extended():
    Path("base.yaml").write_text(SMALL)

    loaded = load(f"extends: base.yaml\n{FILES}  scenes: null\n")

    assert loaded.experiment.data.scenes is None
    assert loaded.origins["data.scenes"] == "x.yaml:5"


# Variables


def test_variables_and_home_are_expanded_in_paths_only(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    text = (
        "name: x\ndata:\n  train: {annotations: $A/a.json, images: '${A}b'}\n"
        "  val: {annotations: ~/b, images: a$$b}\n"
        "where: {tracking: 'sqlite:///$A/m.db', storage: $H/runs, project: $A}\n"
    )

    experiment = load(text, environ={"A": "/a", "H": "~"}).experiment

    assert experiment.data.train.annotations == "/a/a.json"
    assert experiment.data.train.images == "/ab"
    assert experiment.data.val.annotations == "/home/me/b"
    assert experiment.data.val.images == "a$b"
    assert experiment.where.tracking == "sqlite:////a/m.db"
    assert experiment.where.storage == "/home/me/runs"
    assert experiment.where.project == "$A"


def test_a_variable_that_an_override_replaces_need_not_be_set():
    assert load(SMALL + "where: {storage: $NO}\n", "where.storage=/x").experiment.where.storage == "/x"


def test_variables_are_looked_up_in_the_environment_by_default(monkeypatch):
    monkeypatch.setenv("MIMICLAB_TEST_ROOM", "/room")
    Path("x.yaml").write_text(SMALL + "where: {storage: $MIMICLAB_TEST_ROOM}\n")

    assert load_experiment("x.yaml").experiment.where.storage == "/room"


def test_every_path_key_is_a_key_of_the_schema():
    assert set(PATH_KEYS) <= set(known_keys())


# What a user gets wrong: each is one message that names place, key, what was found and what was expected

BAD_FILES = {
    "empty": ("", "x.yaml: the file is empty, expected keys such as name: and data:"),
    "only a comment": ("# nothing\n", "x.yaml: the file is empty, expected keys such as name: and data:"),
    "a list": ("- name\n", "x.yaml:1: found a list, expected keys such as name: and data:"),
    "a word": ("\nscenes\n", "x.yaml:2: found 'scenes', expected keys such as name: and data:"),
    "not YAML": (
        "name: x\nseed: [1\n",
        "x.yaml:3: not valid YAML: while parsing a flow sequence, expected ',' or ']'",
    ),
    "a tab": (
        "name: x\ndata:\n\tflip: 1\n",
        "x.yaml:3: not valid YAML: while scanning for the next token, found character '\\t'",
    ),
    "a control character": (
        "name: x\nseed: \x01\n",
        "x.yaml:2: not valid YAML: special characters are not allowed, found #x01",
    ),
    "two documents": (
        "name: x\n---\nname: y\n",
        "x.yaml:2: not valid YAML: expected a single document in the stream, but found another document",
    ),
    "a key twice": (SMALL + "optim:\n  lr: 1\n  lr: 2\n", "x.yaml:5: key lr is given twice, first on line 4"),
    "a key twice on top": (SMALL + "name: y\n", "x.yaml:3: key name is given twice, first on line 1"),
    "a list as key": ("? [a]\n: 1\n", "x.yaml:1: found a list or mapping as a key, expected a name"),
    "a tag": (
        SMALL + "seed: !!python/name:os.system 1\n",
        "x.yaml:3: found the YAML tag !!python/name:os.system on '1', expected a plain value",
    ),
    "a tag that does not fit": (
        SMALL + "seed: !!int one\n",
        "x.yaml:3: found the YAML tag !!int on 'one', expected a plain value",
    ),
    "an alias inside itself": (
        SMALL + "optim: &o {lr: *o}\n",
        "x.yaml:3: found an alias inside of what it stands for",
    ),
    "extends two": (
        "extends: [a.yaml, b.yaml]\n",
        "x.yaml:1: extends: found ['a.yaml', 'b.yaml'], expected the path of one file",
    ),
    "extends nothing": ("name: x\nextends: no.yaml\n", "x.yaml:2: extends: no such file: no.yaml"),
    "extends itself": ("extends: x.yaml\n", "x.yaml: files extend each other in a circle: x.yaml -> x.yaml"),
    "no name": ("data: {scenes: {}}\n", "x.yaml: name: found nothing, expected a value"),
    "no data": ("name: x\n", "x.yaml: data: found nothing, expected a value"),
    "no images": (
        "name: x\n" + FILES.replace(", images: b", ""),
        "x.yaml:4: data.val.images: found nothing, expected a value",
    ),
    "section is null": (SMALL + "eval:\n", "x.yaml:3: eval: found null, expected a section of keys"),
    "dataclass is a number": (SMALL + "optim: 3\n", "x.yaml:3: optim: found 3, expected a section of keys"),
    "whole number": (SMALL + "seed: 1.5\n", "x.yaml:3: seed: found 1.5, expected a whole number"),
    "whole number as text": (SMALL + "seed: '1'\n", 'x.yaml:3: seed: found "1", expected a whole number'),
    "whole number as truth": (SMALL + "seed: true\n", "x.yaml:3: seed: found true, expected a whole number"),
    "number": (SMALL + "optim:\n  lr: fast\n", 'x.yaml:4: optim.lr: found "fast", expected a number'),
    "infinity": (SMALL + "optim: {lr: .inf}\n", 'x.yaml:3: optim.lr: found ".inf", expected a number'),
    "truth": (SMALL + "scale: {gpu: yes}\n", 'x.yaml:3: scale.gpu: found "yes", expected true or false'),
    "text": ("name: 12\ndata: {scenes: {}}\n", "x.yaml:1: name: found 12, expected text (put it in quotes)"),
    "empty text": (
        SMALL + "where: {storage: ''}\n",
        'x.yaml:3: where.storage: found "", expected text that is not empty',
    ),
    "list": (SMALL + "optim: {milestones: 3}\n", "x.yaml:3: optim.milestones: found 3, expected a list"),
    "list too long": (
        SMALL + "model: {student: {offset_channels: [3, 5, 7]}}\n",
        "x.yaml:3: model.student.offset_channels: found [3, 5, 7], expected at most 2 values",
    ),
    "list too short": (
        SMALL + "model: {student: {offset_channels: [3]}}\n",
        "x.yaml:3: model.student.offset_channels[1]: found nothing, expected a value",
    ),
    "item of a list": (
        SMALL + "model:\n  student:\n    kernel_sizes: [3, a]\n",
        'x.yaml:5: model.student.kernel_sizes[1]: found "a", expected a whole number',
    ),
    "choice": (
        SMALL + "optim: {name: adam}\n",
        "x.yaml:3: optim.name: found \"adam\", expected 'sgd' or 'adamw'",
    ),
    "too small": (
        SMALL + "eval: {every_epochs: 0}\n",
        "x.yaml:3: eval.every_epochs: found 0, expected more than 0",
    ),
    "negative": (SMALL + "seed: -1\n", "x.yaml:3: seed: found -1, expected 0 or more"),
    "large seed": (
        SMALL + "seed: 4294967296\n",
        "x.yaml:3: seed: found 4294967296, expected 4294967295 or less",
    ),
    "too large": (
        "name: x\ndata:\n  scenes: {}\n  flip: 2\n",
        "x.yaml:4: data.flip: found 2, expected 1.0 or less",
    ),
    "bad name": (
        "name: a/b\ndata: {scenes: {}}\n",
        "x.yaml:1: name: expected 1 to 100 letters, digits, '.', '_' or '-', the first a letter or a digit "
        "(it names a folder), found 'a/b'",
    ),
    "parent as name": ("name: ..\ndata: {scenes: {}}\n", "found '..'"),
    "neither data": (
        "name: x\ndata: {flip: 0}\n",
        "x.yaml:2: data: either scenes, or both train and val, must be given; found none of them",
    ),
    "half of the data": ("name: x\n" + FILES[: FILES.index("  val")], "must be given; found train"),
    "both data": ("name: x\n" + FILES + "  scenes: {}\n", "found train and val and scenes"),
    "resize": (
        "name: x\ndata: {scenes: {}, resize: {short: 9, long: 8}}\n",
        "x.yaml:2: data.resize: short must not be above long, found short 9 and long 8",
    ),
    "range of sizes the wrong way round": (
        "name: x\ndata: {scenes: {}, resize: {train_short: [800, 640]}}\n",
        "x.yaml:2: data.resize: train_short must be the lowest and the highest short side, neither above long, found "
        "train_short [800, 640] and long 1333",
    ),
    "range of sizes above the long side": (
        "name: x\ndata: {scenes: {}, resize: {train_short: [640, 1400]}}\n",
        "found train_short [640, 1400] and long 1333",
    ),
    "range of sizes with one end": (
        "name: x\ndata:\n  scenes: {}\n  resize: {train_short: [640]}\n",
        "x.yaml:4: data.resize.train_short[1]: found nothing, expected a value",
    ),
    "range of crops the wrong way round": (
        "name: x\ndata:\n  scenes: {}\n  augment: {crop: [0.9, 0.3]}\n",
        "x.yaml:4: data.augment: crop must be the lowest and the highest value, found [0.9, 0.3]",
    ),
    "scale that leaves nothing": (
        "name: x\ndata:\n  scenes: {}\n  augment: {scale: [0, 1]}\n",
        "x.yaml:4: data.augment.scale[0]: found 0, expected more than 0",
    ),
    "hue beyond the opposite colour": (
        "name: x\ndata:\n  scenes: {}\n  augment: {color: {hue: 0.6}}\n",
        "x.yaml:4: data.augment.color.hue: found 0.6, expected 0.5 or less",
    ),
    "no images in a block": (
        "name: x\ndata:\n  scenes: {}\n  order: {block: 0}\n",
        "x.yaml:4: data.order.block: found 0, expected more than 0",
    ),
    "detector's own check": (
        SMALL + "model:\n  pyramid:\n    max_level: 9\n",
        "x.yaml:4: model.pyramid: max_level must be 5, 6 or 7, found 9",
    ),
    "statistics over GPUs without any": (
        SMALL + "model: {backbone: {norm: sync_bn}}\n",
        "x.yaml: model.backbone.norm: sync_bn works on GPUs only, found scale.gpu false; expected scale.gpu true, "
        "or the norm frozen_bn or group_norm",
    ),
    "boxes in half precision": (
        SMALL + "model: {detector: fcos}\noptim: {precision: bf16}\n",
        "x.yaml: optim.precision: bf16 with model.detector fcos: torchvision would round boxes to it, several pixels "
        "in a large image; expected fp32",
    ),
    "across sections": (
        SMALL + "optim: {global_batch: 2}\nscale: {workers: 3}\n",
        "x.yaml: every worker needs an image of each step: optim.global_batch must be at least "
        "scale.workers, found optim.global_batch 2 and scale.workers 3",
    ),
    "no workers": (
        SMALL + "scale: {workers: 0}\n",
        "x.yaml:3: scale.workers: found 0, expected a whole number above 0, or both as in {min: 1, max: 8}",
    ),
    "workers as truth": (
        SMALL + "scale: {workers: true}\n",
        "x.yaml:3: scale.workers: found true, expected a whole number above 0, or both as in {min: 1, max: 8}",
    ),
    "workers as a list": (
        SMALL + "scale: {workers: [1, 8]}\n",
        "x.yaml:3: scale.workers: found [1, 8], expected a whole number above 0, or both as in {min: 1, max: 8}",
    ),
    "workers as text": (SMALL + "scale: {workers: auto}\n", 'x.yaml:3: scale.workers: found "auto", expected a whole'),
    "workers without an upper end": (
        SMALL + "scale:\n  workers: {min: 2}\n",
        "x.yaml:4: scale.workers.max: found nothing, expected a value",
    ),
    "range of workers from none": (
        SMALL + "scale:\n  workers:\n    min: 0\n    max: 2\n",
        "x.yaml:5: scale.workers.min: found 0, expected more than 0",
    ),
    "range of workers the wrong way round": (
        SMALL + "scale:\n  workers: {min: 3, max: 2}\n",
        "x.yaml:4: scale.workers: min must not be above max, found min 3 and max 2",
    ),
    "slip in a range of workers": (
        SMALL + "scale: {workers: {min: 1, max: 2, mex: 2}}\n",
        "x.yaml:3: unknown key scale.workers.mex; did you mean scale.workers.max?",
    ),
    "more workers at most than images": (
        SMALL + "optim: {global_batch: 2}\nscale: {workers: {min: 1, max: 3}}\n",
        "scale.workers, found optim.global_batch 2 and scale.workers 3",
    ),
    "nothing at once": (
        SMALL + "scale: {micro_batch: 0}\n",
        "x.yaml:3: scale.micro_batch: found 0, expected more than 0",
    ),
    "statistics of a part of the images": (
        SMALL + "model: {backbone: {norm: sync_bn}}\nscale: {gpu: true, micro_batch: 2}\n",
        "x.yaml: scale.micro_batch: with model.backbone.norm sync_bn every worker has to compute all of its images at "
        "once; expected scale.micro_batch null, or the norm frozen_bn or group_norm",
    ),
    "checkpoints after no steps": (
        SMALL + "checkpoint: {every_steps: 0}\n",
        "x.yaml:3: checkpoint.every_steps: found 0, expected a whole number above 0, or auto",
    ),
    "checkpoints of its own accord": (
        SMALL + "checkpoint: {every_steps: often}\n",
        'x.yaml:3: checkpoint.every_steps: found "often", expected a whole number above 0, or auto',
    ),
    "checkpoints weighed against nothing": (
        SMALL + "checkpoint: {every_steps: auto}\n",
        "x.yaml: checkpoint.every_steps: auto weighs the cost of a checkpoint against how often machines go: expected "
        "scale.mtbf_minutes, or a number of steps",
    ),
    "machines that go at once": (
        SMALL + "scale: {mtbf_minutes: 0}\n",
        "x.yaml:3: scale.mtbf_minutes: found 0, expected more than 0",
    ),
    "no metric": (SMALL + "eval: {metric: ''}\n", 'x.yaml:3: eval.metric: found "", expected text that is not empty'),
    "best in no sense": (
        SMALL + "eval: {mode: best}\n",
        "x.yaml:3: eval.mode: found \"best\", expected 'max' or 'min'",
    ),
    "no patience": (SMALL + "eval: {patience: 0}\n", "x.yaml:3: eval.patience: found 0, expected more than 0"),
    "label that is a number": (
        SMALL + "scale:\n  label_selector:\n    zone: 1\n",
        "x.yaml:5: scale.label_selector.zone: found 1, expected text (put it in quotes)",
    ),
    "label that is empty": (
        SMALL + "scale: {label_selector: {zone: ''}}\n",
        'x.yaml:3: scale.label_selector.zone: found "", expected text that is not empty',
    ),
    "labels in a list": (
        SMALL + "scale: {label_selector: [spot]}\n",
        'x.yaml:3: scale.label_selector: found ["spot"], expected a section of keys',
    ),
    "GPU of no name": (
        SMALL + "scale: {accelerator_type: ''}\n",
        'x.yaml:3: scale.accelerator_type: found "", expected text that is not empty',
    ),
    "placement": (
        SMALL + "scale: {placement: pack}\n",
        "x.yaml:3: scale.placement: found \"pack\", expected 'PACK', 'SPREAD', 'STRICT_PACK' or 'STRICT_SPREAD'",
    ),
    "no time for each other": (
        SMALL + "scale: {collective_timeout_s: 0}\n",
        "x.yaml:3: scale.collective_timeout_s: found 0, expected more than 0",
    ),
    "fewer than no crashes": (
        SMALL + "scale: {max_crashes: -1}\n",
        "x.yaml:3: scale.max_crashes: found -1, expected 0 or more",
    ),
    "fewer than no preemptions": (
        SMALL + "scale: {max_preemptions: -1}\n",
        "x.yaml:3: scale.max_preemptions: found -1, expected 0 or more",
    ),
    "slip of the pen": (
        SMALL + "model:\n  mimic:\n    cls_wieght: 2\n",
        "x.yaml:5: unknown key model.mimic.cls_wieght; did you mean model.mimic.cls_weight?",
    ),
    "slip in a key of several sections": (
        SMALL + "model: {inference: {nms_iuo: 1}}\n",
        "x.yaml:3: unknown key model.inference.nms_iuo; did you mean model.inference.nms_iou?",
    ),
    "wrong section": (SMALL + "epochs: 3\n", "x.yaml:3: unknown key epochs; did you mean optim.epochs?"),
    "wrong section and slip": (
        SMALL + "warmup_step: 3\n",
        "x.yaml:3: unknown key warmup_step; did you mean optim.warmup_steps?",
    ),
    "unknown section": (SMALL + "modle: {}\n", "x.yaml:3: unknown key modle; did you mean model?"),
    "like nothing": (
        SMALL + "scale: {zzz: 1}\n",
        "x.yaml:3: unknown key scale.zzz; known here: workers, gpu, threads",
    ),
    "dotted": (
        SMALL + "optim.lr: 1\n",
        "x.yaml:3: unknown key optim.lr; a file nests its keys, dotted ones are for --set",
    ),
    "variable unset": (
        SMALL + "where: {storage: $NOWHERE/runs}\n",
        "x.yaml:3: where.storage: variable NOWHERE is unset or empty, found '$NOWHERE/runs'",
    ),
    "variable misspelt": (
        SMALL + "where: {storage: $9}\n",
        "x.yaml:3: where.storage: found '$9', expected $NAME or ${NAME} ($$ for a plain $)",
    ),
}


@pytest.mark.parametrize(("text", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_mistakes_in_a_file(text, message):
    found = mistake(text)

    assert message in found
    assert found.startswith("x.yaml")
    assert "\n" not in found


BAD_OVERRIDES = {
    "no value": ("optim.lr", "--set optim.lr: expected KEY=VALUE, such as optim.lr=1e-3"),
    "no key": ("=3", "--set =3: expected KEY=VALUE, such as optim.lr=1e-3"),
    "empty part": ("optim..lr=3", "--set optim..lr=3: expected KEY=VALUE, such as optim.lr=1e-3"),
    "not YAML": (
        "seed=[1",
        "--set [1: not valid YAML: while parsing a flow sequence, expected ',' or ']'",
    ),
    "unknown": ("optim.lrr=3", "--set: unknown key optim.lrr; did you mean optim.lr?"),
    "type": ("optim.lr=fast", '--set: optim.lr: found "fast", expected a number'),
    "below a value": ("seed.x=1", "--set: seed: found a section of keys, expected a whole number"),
    "a section's check": (
        "model.pyramid.max_level=9",
        "x.yaml:4 with --set: model.pyramid: max_level must be 5, 6 or 7, found 9",
    ),
    "the whole": ("scale.workers=9", "x.yaml with --set: every worker needs an image of each step"),
    "variable": ("where.storage=$NO", "--set: where.storage: variable NO is unset or empty, found '$NO'"),
}


@pytest.mark.parametrize(("override", "message"), BAD_OVERRIDES.values(), ids=BAD_OVERRIDES.keys())
def test_mistakes_in_an_override(override, message):
    assert mistake(SMALL + "model:\n  pyramid: {channels: 64}\n", override).startswith(message)


def test_every_mistake_is_listed():
    found = mistake("name: x\ndata: {scenes: {}}\nseed: a\nwhere: {storage: $NO}\n", "optim.x=1")

    assert found.splitlines() == [
        "x.yaml: 3 mistakes",
        "  x.yaml:4: where.storage: variable NO is unset or empty, found '$NO'",
        '  x.yaml:3: seed: found "a", expected a whole number',
        "  --set: unknown key optim.x; known here: " + ", ".join(field.name for field in fields(OptimConfig)),
    ]


def test_an_empty_variable_counts_as_unset():
    found = mistake(SMALL + "where: {storage: $EMPTY}\n", environ={"EMPTY": ""})

    assert "variable EMPTY is unset or empty" in found


def test_files_that_cannot_be_read(folder):
    Path("latin.yaml").write_bytes(b"name: caf\xe9\n")
    for path, message in [
        ("no.yaml", "no.yaml: no such file; expected an experiment file (YAML)"),
        (".", ".: cannot be read: Is a directory"),
        ("latin.yaml", "latin.yaml: found bytes that are not UTF-8 at 9, expected YAML"),
    ]:
        with pytest.raises(UserError) as caught:
            load_experiment(path)
        assert str(caught.value) == message


def test_a_circle_of_files_is_shown():
    Path("y.yaml").write_text("extends: x.yaml\n")

    assert mistake("extends: y.yaml\n") == ("x.yaml: files extend each other in a circle: x.yaml -> y.yaml -> x.yaml")


def test_mistakes_in_an_extended_file_name_that_file():
    Path("base.yaml").write_text("\noptim: {lr: fast}\n")

    assert mistake("extends: base.yaml\n" + SMALL) == 'base.yaml:2: optim.lr: found "fast", expected a number'


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, "lr must be positive, found 0.0"),
        ({"lr": float("nan")}, "lr must be positive, found nan"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more, found -1.0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), found 1.0"),
        ({"global_batch": 0}, "global_batch must be 1 or more, found 0"),
        ({"epochs": 0}, "epochs must be 1 or more, found 0"),
        ({"gamma": 1.5}, r"gamma must be in \(0, 1\], found 1.5"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more, found -1"),
        ({"clip_norm": 0.0}, "clip_norm must be positive, or null for no clipping, found 0.0"),
        ({"schedule": "step"}, r"schedule step needs milestones.*found schedule step and milestones \[\]"),
        ({"milestones": (3,)}, r"found schedule cosine and milestones \[3\]"),
        ({"schedule": "step", "milestones": (3, 3)}, r"rising epochs from 1, found \[3, 3\]"),
        ({"schedule": "step", "milestones": (0, 3)}, r"rising epochs from 1, found \[0, 3\]"),
    ],
)
def test_optim_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**values)


# Written out, identity


def everything():
    text = (EXPERIMENTS / "bccd-mobilenet.yaml").read_text()
    elastic = "scale={workers: {min: 1, max: 2}, label_selector: {ray.io/market-type: spot}, mtbf_minutes: 90}"
    return load(
        text,
        "where.project='1e5'",
        elastic,
        "checkpoint.every_steps=auto",
        environ={**ENVIRON, "MIMICLAB_DATA": "/pay/$100/$$"},
    ).experiment


@pytest.mark.parametrize("make", [everything, lambda: load(SMALL).experiment])
def test_resolved_copy_loads_to_the_same_experiment(make):
    experiment = make()
    Path("resolved.yaml").write_text(resolved_yaml(experiment))

    again = load_experiment("resolved.yaml", environ={})

    assert again.experiment == experiment
    assert identity(again.experiment) == identity(experiment)
    assert "default" not in again.origins.values()
    assert resolved_yaml(again.experiment) == resolved_yaml(experiment)


@pytest.mark.parametrize(
    "override",
    [
        *("scale.workers=3", "scale.gpu=true", "where.storage=/s", "where.project=p", "optim.epochs=99"),
        *("checkpoint.keep=9", "data.loader_processes=3", "eval.num_pictures=0"),
        *("scale.workers={min: 1, max: 3}", "scale.micro_batch=1", "scale.label_selector={zone: a}"),
        *("scale.accelerator_type=A10G", "scale.placement=SPREAD", "scale.max_preemptions=3"),
        *("scale.mtbf_minutes=90", "checkpoint.every_steps=7"),
    ],
)
def test_identity_is_that_of_the_run_however_it_is_run(override):
    a, b = load(SMALL).experiment, load(SMALL, override).experiment

    assert a != b
    assert identity(a) == identity(b)
    assert differences(a, b) == []


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("name=other", 'name: "small" -> "other"'),
        ("seed=1", "seed: 0 -> 1"),
        ("optim.lr=1e-3", "optim.lr: 0.0003 -> 0.001"),
        ("model.student.kernel_sizes=[3, 3]", "model.student.kernel_sizes: [3, 5] -> [3, 3]"),
        ("model.mimic.detach_teacher=false", "model.mimic.detach_teacher: true -> false"),
        ("data.scenes.seed=1", "data.scenes.seed: 0 -> 1"),
        ("eval.every_epochs=2", "eval.every_epochs: 1 -> 2"),
        ("eval.metric=gap/AP", 'eval.metric: "student/AP" -> "gap/AP"'),
        ("eval.mode=min", 'eval.mode: "max" -> "min"'),
        ("optim.ema_decay=0.999", "optim.ema_decay: null -> 0.999"),
    ],
)
def test_identity_changes_with_what_a_run_computes(override, difference):
    a, b = load(SMALL).experiment, load(SMALL, override).experiment

    assert identity(a) != identity(b)
    assert differences(a, b) == [difference]


def test_differences_cover_sections_that_only_one_side_has():
    found = differences(load(SMALL).experiment, load("name: small\n" + FILES).experiment)

    assert "data.scenes.size: 128 -> nothing" in found
    assert 'data.val.images: nothing -> "b"' in found


def test_identity_is_short_hex_and_the_same_in_every_process():
    Path("x.yaml").write_text(SMALL)
    code = "from mimiclab.experiment import *; print(identity(load_experiment('x.yaml').experiment))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout.strip()
        for seed in ("1", "2")
    }

    assert seen == {identity(load(SMALL).experiment)}
    assert len(*seen) == 12
    assert int(*seen, 16) >= 0


def test_render_has_a_line_for_every_key():
    loaded = load(SMALL, "optim.lr=1e-3")

    head, *lines = render(loaded).plain.splitlines()

    assert head == f"x.yaml, identity {identity(loaded.experiment)}"
    assert [line.split(" = ")[0] for line in lines] == list(flatten(loaded.experiment))
    assert any(line.split() == ["optim.lr", "=", "0.001", "--set"] for line in lines)


# The schema


def test_known_keys_are_the_sections_and_keys_of_a_resolved_experiment():
    def dotted(tree, prefix=""):
        for name, value in tree.items():
            yield prefix + name
            if isinstance(value, dict):
                yield from dotted(value, f"{prefix}{name}.")

    known = list(known_keys())
    resolved = list(dotted(yaml.safe_load(resolved_yaml(load("name: small\n" + FILES).experiment))))

    assert len(known) == len(set(known))
    absent = {"data.scenes": Scenes, "search": SearchConfig}
    resolved += ["data.train.packed", "data.val.packed", "scale.workers.min", "scale.workers.max"]
    assert set(known) == {*resolved, *(f"{name}.{k}" for name, section in absent.items() for k in section.model_fields)}


def test_reading_an_experiment_loads_no_torch():
    code = "import sys, mimiclab.experiment; print({'torch', 'ray', 'mlflow', 'rich'} & set(sys.modules))"

    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
    assert Experiment.model_fields["model"].annotation.__module__ == "mimicdet.config"


KNOWN_DEFAULTS = json.loads((Path(__file__).parent / "defaults.json").read_text())


def test_a_default_that_changes_is_noticed() -> None:
    """Runs that left a key to its default would silently be other runs. Raise DEFAULTS_VERSION, then mend the file."""
    assert KNOWN_DEFAULTS["version"] == DEFAULTS_VERSION
    known, now = KNOWN_DEFAULTS["defaults"], defaults()
    assert {key: now.get(key) for key in known} == known
    assert sorted(set(now) - set(known)) == [], "new keys belong into tests/unit/defaults.json"


def test_what_is_left_to_its_default_does_not_count(monkeypatch) -> None:
    written = load(SMALL + "model: {mimic: {cls_weight: 1.0}, backbone: {norm: group_norm}}\noptim: {lr: 3e-4}\n")
    assert identity(written.experiment) == identity(load(SMALL).experiment)
    before = identity(written.experiment)
    monkeypatch.setattr("mimiclab.experiment.DEFAULTS_VERSION", DEFAULTS_VERSION + 1)
    assert identity(written.experiment) != before
