"""The image of the nodes, as far as its Dockerfile says: whether what Ray runs in a container finds what it needs."""

import os
import re
import subprocess
from pathlib import Path

from ray.autoscaler._private.command_runner import _with_interactive

DOCKERFILE = (Path(__file__).parents[2] / "cluster" / "Dockerfile").read_text().replace("\\\n", "")
SETTINGS = dict(re.findall(r"(\w+)=(\S+)", re.findall(r"^ENV (.*)$", DOCKERFILE, re.MULTILINE)[-1]))


def test_a_command_of_ray_up_finds_ray(tmp_path: Path) -> None:
    [profile] = re.findall(r"^RUN (echo .* > /etc/profile\.d/\w+\.sh)$", DOCKERFILE, re.MULTILINE)
    ray = tmp_path / "venv" / "bin" / "ray"
    ray.parent.mkdir(parents=True)
    ray.write_text("#!/bin/sh\necho of the image\n")
    ray.chmod(0o755)
    (tmp_path / ".bashrc").touch()
    # What belongs to the image is put below a home: a login shell reads its profile last.
    profile = re.sub(r"/etc/profile\.d/\w+\.sh", str(tmp_path / ".profile"), profile)
    subprocess.run(["bash", "-c", profile.replace("/opt/venv", str(tmp_path / "venv"))], check=True)
    path = SETTINGS["PATH"].replace("/opt/venv", str(tmp_path / "venv")).replace("$PATH", os.defpath)

    done = subprocess.run(
        " ".join(_with_interactive("ray --version")),
        shell=True,
        executable="/bin/bash",
        env={"HOME": str(tmp_path), "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )

    assert done.stdout == "of the image\n", done.stderr


def test_the_autoscaler_on_the_head_reaches_workers_and_copies_files_to_them() -> None:
    [packages] = re.findall(r"apt-get install -y --no-install-recommends ([^&]*)", DOCKERFILE)
    assert {"openssh-client", "rsync", "procps"} <= set(packages.split())


def test_a_container_with_nvidia_s_runtime_gets_the_gpus() -> None:
    assert SETTINGS["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert {"compute", "utility"} <= set(SETTINGS["NVIDIA_DRIVER_CAPABILITIES"].split(","))
