"""The environment of a node without an image: what cluster/README.md says, done in an empty home, and trained on."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from tinyruns import TINY
from uv import find_uv_bin

ROOT = Path(__file__).parents[2]


def documented() -> dict[str, Any]:
    """The lines of a cluster's file that make the environment."""
    text = (ROOT / "cluster" / "README.md").read_text()
    found: dict[str, Any] = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[-1])
    return found


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_a_file_with_these_lines_is_one_of_a_cluster(cloud: str) -> None:
    config = yaml.safe_load((ROOT / "cluster" / f"{cloud}-spot.yaml").read_text())
    del config["docker"], config["initialization_commands"]

    validate_config(prepare_config({**config, **documented()}))


@pytest.mark.cluster
@pytest.mark.long
@pytest.mark.timeout(3600)  # without uv's cache, gigabytes are fetched
def test_a_cluster_runs_on_what_uv_made(tmp_path: Path) -> None:
    home, lines = tmp_path / "home", documented()
    cache = subprocess.run(
        [find_uv_bin(), "cache", "dir"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()
    mounts = {Path(target.replace("~", str(home), 1)): source for target, source in lines["file_mounts"].items()}
    token = home / ".ray" / "auth_token"
    assert mounts.pop(token) == "~/.ray/auth_token"  # a cluster of one machine makes its own
    for target, source in mounts.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, target)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHON", "VIRTUAL"))
    }
    environment |= {"HOME": str(home), "UV_CACHE_DIR": cache, "XDG_STATE_HOME": str(home / "state")}

    def shell(command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command],
            env=environment,
            cwd=home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        return done.stdout

    def on_node(command: str) -> str:
        return shell(f". ~/.bashrc && {command}")

    for command in lines["setup_commands"]:
        shell(command)

    shell("~/uv/bin/uv pip check --python ~/venv/bin/python")
    imported = on_node(
        "python -c 'import mimiclab, ray, torch; print(mimiclab.__file__, ray.__file__, torch.__file__)'"
    )
    assert all(path.startswith(str(home / "venv")) for path in imported.split())
    (home / "tiny.yaml").write_text(TINY.replace("ROOT", "."))
    try:
        on_node("mimiclab cluster up --num-cpus 1")
        assert token.is_file()
        job = on_node("mimiclab submit train tiny.yaml --set scale.workers=1 --set optim.epochs=1 --follow")
    finally:
        on_node("mimiclab cluster down")
    assert "epoch 1: student AP" in job
    assert "has ended: SUCCEEDED" in job
