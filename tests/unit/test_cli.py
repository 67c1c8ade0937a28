import json
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from PIL import Image

from mimiclab import runs
from mimiclab.cli import main
from mimiclab.experiment import load_experiment

SMALL = "name: small\ndata: {scenes: {}}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(SMALL)


@pytest.fixture
def mimiclab(capsys):
    def run(*args):
        with pytest.raises(SystemExit) as caught:
            main(args)
        return caught.value.code, *capsys.readouterr()

    return run


def test_show_prints_values_and_origins(mimiclab):
    code, out, err = mimiclab("show", "x.yaml", "--set", "optim.lr=1e-3", "--set", "optim.epochs=2")

    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert err == ""
    assert ["name", "=", '"small"', "x.yaml:1"] in lines
    assert ["optim.lr", "=", "0.001", "--set"] in lines
    assert ["optim.epochs", "=", "2", "--set"] in lines
    assert ["seed", "=", "0", "default"] in lines


def test_show_is_plain_text_and_never_wraps_where_there_is_no_terminal(mimiclab, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")

    _, out, _ = mimiclab("show", "x.yaml", "--set", f"where.storage=/{'long/' * 30}")

    assert "\x1b" not in out
    assert sum(line.startswith("where.storage = ") and line.endswith("--set") for line in out.splitlines()) == 1


def test_a_mistake_is_one_message_on_stderr(mimiclab):
    code, out, err = mimiclab("show", "no.yaml")

    assert code == 2
    assert out == ""
    assert err == "error: no.yaml: no such file; expected an experiment file (YAML)\n"


@pytest.mark.parametrize("args", [["shwo"], ["show"], ["show", "x.yaml", "--no-such"], ["show", "x.yaml", "--set"]])
def test_wrong_usage_exits_with_2(mimiclab, args):
    code, out, err = mimiclab(*args)

    assert code == 2
    assert out == ""
    assert "Error" in err


def test_version(mimiclab):
    assert mimiclab("--version") == (0, f"mimiclab {version('mimiclab')}\n", "")


def test_verbose_says_which_files_are_read(tmp_path):
    code = "from mimiclab.cli import main; main()"
    quiet, verbose = (
        subprocess.run([sys.executable, "-c", code, "show", "x.yaml", *more], capture_output=True, text=True)
        for more in ([], ["-v"])
    )

    assert quiet.stderr == ""
    assert verbose.stderr == "reading x.yaml\n"
    assert quiet.stdout == verbose.stdout


def run_verb(body):
    """Run a verb with the given body as its own process."""
    code = (
        f"import os, signal\nfrom mimiclab.cli import app, main\n@app.command()\ndef verb():\n  {body}\nmain(['verb'])"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_a_bug_shows_its_traceback():
    done = run_verb("raise RuntimeError('broken')")

    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.endswith("RuntimeError: broken\n")
    assert "╭" not in done.stderr


def test_an_interrupt_exits_with_130_and_no_traceback():
    done = run_verb("os.kill(os.getpid(), signal.SIGINT)")

    assert done.returncode == 130
    assert "Traceback" not in done.stderr


def test_help_loads_nothing_heavy():
    heavy = "{'torch', 'torchvision', 'ray', 'mlflow', 'matplotlib', 'pydantic', 'pyarrow', 'numpy'}"
    code = (
        f"import sys\nfrom mimiclab.cli import main\ntry: main(['--help'])\nfinally: print({heavy} & set(sys.modules))"
    )

    out = subprocess.check_output([sys.executable, "-c", code], text=True)

    assert "show" in out
    assert out.splitlines()[-1] == "set()"


# ---- mistakes in the other verbs: one message, exit code 2, nothing made, no Ray started ----

TRAINABLE = """
name: small
data:
  train: {annotations: data/train.json, images: data}
  val: {annotations: data/val.json, images: data}
  resize: {short: 32, long: 32}
model:
  backbone: {name: resnet18, width: 16}
  pyramid: {channels: 16, max_level: 5}
  student: {head_width: 32, offset_channels: [8, 8]}
  teacher: {num_convs: 1}
optim: {global_batch: 2}
"""


def write_set(name, *, file="1.png", width=32, names=("cat", "dog"), num_objects=1):
    """An annotation file of one image with the given mistakes."""
    annotations = [
        {"id": number, "image_id": 1, "category_id": 1, "bbox": [2, 2, 9, 9]} for number in range(num_objects)
    ]
    content = {
        "images": [{"id": 1, "file_name": file, "width": width, "height": 32}],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, start=1)],
    }
    Path(name).write_text(json.dumps(content))


@pytest.fixture
def trainable():
    """An experiment in which everything is right."""
    Path("data").mkdir()
    Image.new("RGB", (32, 32)).save("data/1.png")
    Path("data/broken.png").write_text("no picture")
    for name in ("train", "val"):
        write_set(f"data/{name}.json")
    Path("t.yaml").write_text(TRAINABLE)


@pytest.fixture
def mistake(mimiclab, monkeypatch):
    """Run a verb that is to fail before it does anything, and give its message."""
    monkeypatch.setenv("RAY_ADDRESS", "no-address")  # should a check be missing, Ray still does not start

    def run(*args):
        files = sorted(Path().rglob("*"))
        ray_before = ray_is_running()
        code, _, err = mimiclab(*args)
        assert code == 2
        assert err.startswith("error: ")
        assert err.count("error: ") == 1
        assert sorted(Path().rglob("*")) == files
        assert ray_is_running() == ray_before
        return err.removeprefix("error: ").removesuffix("\n")

    return run


def ray_is_running():
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def test_train_without_an_experiment_file(mistake):
    assert mistake("train", "no.yaml") == "no.yaml: no such file; expected an experiment file (YAML)"


def test_train_with_an_unknown_key(mistake):
    Path("y.yaml").write_text(SMALL + "optm: {lr: 1}\n")

    assert mistake("train", "y.yaml") == "y.yaml:3: unknown key optm; did you mean optim?"
    assert mistake("demo", "--set", "optim.l=1").startswith("--set: unknown key optim.l; did you mean optim.lr?")


def test_train_with_a_variable_that_is_unset(mistake, monkeypatch):
    monkeypatch.delenv("NO_SUCH_DATA", raising=False)
    override = "data.train.images=$NO_SUCH_DATA/x"

    assert "variable NO_SUCH_DATA is unset or empty" in mistake("train", "x.yaml", "--set", override)


def test_train_with_fewer_images_per_step_than_workers(mistake, trainable):
    message = mistake("train", "t.yaml", "--set", "scale.workers=3")

    assert message.endswith("found optim.global_batch 2 and scale.workers 3")


@pytest.mark.usefixtures("trainable")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train.annotations=data/no.json", "{cwd}/data/no.json: no such annotation file"),
        ("data.val.annotations=data/1.png", "{cwd}/data/1.png: not JSON: "),
        ("data.val.images=photos", "{cwd}/photos: no such folder of images (for {cwd}/data/val.json)"),
        ("where.tracking=http://127.0.0.1:1", "where.tracking: http://127.0.0.1:1 does not answer within 5 s ("),
        ("where.tracking=mlflow.db", "where.tracking: 'mlflow.db' is no tracking address; expected sqlite:///PATH"),
        ("where.storage=ftp://host/runs", "where.storage: ftp://host/runs: cannot be opened as a folder or URI: "),
        ("where.storage=x.yaml", "where.storage: {cwd}/x.yaml/small cannot be written: {cwd}/x.yaml is no folder"),
        ("model.weights=no.safetensors", "weights {cwd}/no.safetensors: cannot be read as a safetensors file: No such"),
        ("model.weights=data/1.png", "weights {cwd}/data/1.png: cannot be read as a safetensors file: "),
        (
            "model.backbone={width: 64, weights: data/1.png}",
            "model: weights {cwd}/data/1.png: not a safetensors file (",
        ),
    ],
)
def test_train_with_something_that_is_not_there_or_not_what_it_should_be(mistake, override, message):
    assert mistake("train", "t.yaml", "--set", override).startswith(message.format(cwd=Path.cwd()))


@pytest.mark.usefixtures("trainable")
def test_train_on_data_with_mistakes(mistake):
    cwd = Path.cwd()
    Path("data/list.json").write_text("[]")
    assert (
        mistake("train", "t.yaml", "--set", "data.val.annotations=data/list.json")
        == f"{cwd}/data/list.json: not COCO's format: expected an object on top, found a list"
    )
    for changes, message in (
        ({"file": "2.png"}, f"{cwd}/data: 1 of 1 images that {cwd}/data/val.json lists are missing: 2.png"),
        ({"file": "broken.png"}, f"{cwd}/data/broken.png: cannot be read as an image: "),
        ({"width": 64}, f"{cwd}/data/1.png: the image is 32 x 32, its annotation file says 64 x 32"),
        (
            {"names": ("dog", "cat")},
            f"data.val.annotations: {cwd}/data/val.json has the classes ['dog', 'cat'], "
            f"expected those of {cwd}/data/train.json: ['cat', 'dog']",
        ),
        ({"num_objects": 0}, f"data.val.annotations: {cwd}/data/val.json has no object in its 1 images; expected"),
    ):
        write_set("data/val.json", **changes)
        assert mistake("train", "t.yaml").startswith(message)


@pytest.mark.usefixtures("trainable")
def test_train_under_a_name_that_is_taken(mistake):
    other = load_experiment("t.yaml", ["optim.lr=0.5"]).experiment
    runs.prepare(other, fresh=False)
    Path("runs/photos").mkdir()
    Path("runs/photos/me.jpg").touch()

    assert mistake("train", "t.yaml").splitlines() == [
        f"run {Path.cwd()}/runs/small: it was started from another experiment. What changed:",
        "  optim.lr: 0.5 -> 0.0003",
        "Give the new one another name, or start anew with --fresh, which removes the old one.",
    ]
    assert "no run" in mistake("train", "t.yaml", "--fresh", "--set", "name=photos")


@pytest.mark.usefixtures("trainable")
@pytest.mark.slow
def test_training_loads_ray_only_after_all_checks():
    code = f"""
import sys
from mimiclab.cli import main
try:
    main({["train", "t.yaml", "--set", "where.storage=x.yaml"]})
finally:
    print({{"ray", "mlflow"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 2
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("verb", [["evaluate", "nobody"], ["predict", "nobody", "x.png"]])
def test_an_unknown_run(mistake, verb):
    assert mistake(*verb) == "run nobody: no such name, id or folder; runs in ./runs: none"
    assert mistake(*verb, "--storage", "x.yaml").endswith("runs in x.yaml: none")


@pytest.mark.usefixtures("trainable")
def test_predict_on_images_that_are_not_there(mistake):
    experiment = load_experiment("t.yaml").experiment
    folder = runs.prepare(experiment, fresh=False)
    runs.Run(folder, "0", "sqlite:///mlflow.db", "0" * 32, ("cat", "dog"), "failed").write()
    Path("empty").mkdir()

    assert mistake("predict", "small", "no.png") == "image no.png: no such file or folder"
    assert mistake("predict", "small", "empty").startswith("empty: no images, expected files ending in .jpg")
    assert mistake("predict", "small", "data/1.png").startswith(f"run {folder.name}: it has no checkpoint yet")


@pytest.mark.usefixtures("trainable")
def test_evaluate_on_data_of_other_classes(mistake):
    from mimiclab import checkpoint

    experiment = load_experiment("t.yaml").experiment
    folder = runs.prepare(experiment, fresh=False)
    runs.Run(folder, "0", "sqlite:///mlflow.db", "0" * 32, ("cat", "cow"), "finished").write()
    meta = {"step": 1, "classes": ["cat", "cow"], "best": None, "experiment": experiment.model_dump(mode="json")}
    checkpoint.save(folder / runs.CHECKPOINTS, {}, {}, meta)

    assert mistake("evaluate", "small").endswith(
        "val.json has the classes ['cat', 'dog'], expected those that run small was trained for: ['cat', 'cow']"
    )


@pytest.mark.parametrize("score", ["-0.1", "1.5", "high"])
def test_predict_with_a_score_that_is_none(mimiclab, score):
    code, _, err = mimiclab("predict", "small", "x.png", "--min-score", score)

    assert code == 2
    assert "--min-score" in err


def test_ui_without_anything_to_show(mistake):
    message = mistake("ui")

    assert message.startswith("where.tracking: sqlite:///mlflow.db: there is no file ")


def test_ui_on_a_port_that_is_in_use(mistake):
    Path("mlflow.db").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        assert mistake("ui", "--port", str(port)) == f"port {port} is in use; expected a free one"


@pytest.mark.parametrize("port", ["0", "65536", "http"])
def test_ui_on_a_port_that_is_none(mimiclab, port):
    code, _, err = mimiclab("ui", "--port", port)

    assert code == 2
    assert "--port" in err
