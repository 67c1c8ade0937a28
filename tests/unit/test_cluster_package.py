import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from mimiclab import code
from mimiclab.cluster import package
from mimiclab.errors import UserError
from mimiclab.experiment import load_experiment
from mimiclab.storage import Storage


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """An experiment in a folder that also holds what must not travel."""
    monkeypatch.chdir(tmp_path)
    for name in (".git/config", ".venv/bin/python", "data/train/1.jpg", "runs/weights.safetensors", ".env"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("secret")
    Path("x.yaml").write_text("name: small\ndata: {scenes: {}}\n")
    return load_experiment("x.yaml", ["optim.lr=5e-4"]).experiment


@pytest.fixture
def stage(tmp_path):
    folder = tmp_path / "stage"
    folder.mkdir()
    return folder


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_package_is_the_code_and_the_experiment(experiment, stage):
    package.stage(experiment, stage)

    files = files_in(stage)
    assert {"mimicdet/detector.py", "mimiclab/cli.py", "mimiclab/data/coco.py", "experiment.yaml"} <= files
    assert {file for file in files if not file.startswith(("mimicdet/", "mimiclab/"))} == {
        "experiment.yaml",
        "versions.json",
    }
    assert not {file for file in files if "__pycache__" in file}
    assert load_experiment(stage / "experiment.yaml").experiment == experiment


def test_byte_code_and_hidden_files_stay(experiment, stage, tmp_path, monkeypatch):
    source = tmp_path / "source" / "somecode"
    for name in ("__init__.py", "part/a.py", "__pycache__/a.pyc", "part/b.pyc", ".git/config", "part/.env"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    monkeypatch.syspath_prepend(source.parent)
    monkeypatch.setattr(package, "PACKAGES", ("somecode",))

    package.stage(experiment, stage)

    assert files_in(stage) == {"somecode/__init__.py", "somecode/part/a.py", "experiment.yaml", "versions.json"}


def test_a_package_is_complete_and_comes_before_what_is_installed(experiment, stage):
    package.stage(experiment, stage)
    program = "import mimiclab.train, mimicdet; print(mimiclab.__file__, mimicdet.__file__, sep='\\n')"

    out = subprocess.check_output(
        [sys.executable, "-P", "-c", program], env={**os.environ, "PYTHONPATH": str(stage)}, text=True
    )

    assert out.splitlines() == [str(stage / "mimiclab/__init__.py"), str(stage / "mimicdet/__init__.py")]


def test_a_package_says_its_size(experiment, stage):
    said = package.stage(experiment, stage)

    total = sum(path.stat().st_size for path in stage.rglob("*") if path.is_file())
    assert said.startswith(f"{len(files_in(stage))} files, {total / 1e6:.2f} MB")
    assert total < 2e6


def test_a_package_that_is_too_large_is_refused(experiment, stage, tmp_path, monkeypatch):
    source = tmp_path / "source" / "largecode"
    source.mkdir(parents=True)
    (source / "__init__.py").touch()
    (source / "forgotten.safetensors").write_bytes(bytes(3_000_000))
    monkeypatch.syspath_prepend(source.parent)
    monkeypatch.setattr(package, "PACKAGES", ("largecode",))
    monkeypatch.setattr(package, "LIMIT_MB", 2)

    with pytest.raises(
        UserError, match=r"has 3\.0 MB, expected at most 2; .*: largecode/forgotten\.safetensors \(3\.00 MB\)"
    ):
        package.stage(experiment, stage)


def test_a_package_is_kept_and_comes_back_as_it_was(experiment, stage, tmp_path):
    package.stage(experiment, stage)
    root = Storage(tmp_path / "runs")
    name = package.keep(stage, root)
    (stage / "mimiclab" / "cli.py").touch()  # another time, the same content
    again = tmp_path / "again"
    package.restore(name, root, again)

    assert package.keep(stage, root) == name
    assert list((root / package.KEPT).sizes()) == [name]
    assert {f: (again / f).read_bytes() for f in files_in(again)} == {
        f: (stage / f).read_bytes() for f in files_in(stage)
    }


def test_a_package_that_was_changed_or_removed_is_refused(experiment, stage, tmp_path):
    package.stage(experiment, stage)
    root = Storage(tmp_path / "runs")
    name = package.keep(stage, root)
    (stage / "mimiclab" / "cli.py").write_text("another")
    other = package.keep(stage, root)
    place = root / package.KEPT

    assert other != name
    place.write(name, place.read(other))
    with pytest.raises(UserError, match=rf"{name}: it was changed since it was submitted"):
        package.restore(name, root, tmp_path / "changed")
    place.write(name, b"nothing")
    with pytest.raises(UserError, match=rf"{name}: no package of a job"):
        package.restore(name, root, tmp_path / "broken")
    place.delete(name)
    with pytest.raises(UserError, match=rf"{name}: the package of this job is gone"):
        package.restore(name, root, tmp_path / "gone")


def test_code_has_one_hash_wherever_it_lies(experiment, stage, tmp_path):
    program = "from mimiclab.code import running_code; print(running_code())"
    package.stage(experiment, stage)
    there = subprocess.check_output(
        [sys.executable, "-P", "-c", program], env={**os.environ, "PYTHONPATH": str(stage)}, text=True
    ).strip()

    assert there == code.running_code()
    (stage / "mimicdet" / "detector.py").write_text("changed = True\n")
    changed = subprocess.check_output(
        [sys.executable, "-P", "-c", program], env={**os.environ, "PYTHONPATH": str(stage)}, text=True
    ).strip()
    assert changed != there


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({}, 0, ""),
        (
            {"rich": "1.0", "typer": "0.1"},
            0,
            f"warning: other versions here than where this was submitted: rich {version('rich')}, not 1.0; "
            f"typer {version('typer')}, not 0.1\n",
        ),
        (
            {"no-such-package": "3.1"},
            2,
            "error: the environment of this node lacks no-such-package 3.1; expected one of the lock file of the code "
            "that was submitted\n",
        ),
    ],
    ids=["the same", "others", "missing"],
)
def test_an_environment_is_compared_with_that_of_the_package(experiment, stage, changes, code, said):
    package.stage(experiment, stage)
    file = stage / "versions.json"
    submitted = json.loads(file.read_text())
    assert {"torch", "torchvision", "mlflow", "ray", "pyyaml"} <= submitted.keys()
    assert "pytest" not in submitted
    file.write_text(json.dumps({**submitted, **changes}))

    done = subprocess.run(
        [sys.executable, "-P", "-m", "mimiclab.cluster.versions", "versions.json"],
        cwd=stage,
        env={**os.environ, "PYTHONPATH": str(stage)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    assert (done.returncode, done.stdout) == (code, said)
