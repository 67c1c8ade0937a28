"""What cluster/README.md says of the files beside it: what is to be filled in, who is let in, how MLflow is saved."""

import re
import shlex
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from ray.autoscaler._private.aws.config import _create_default_inbound_rules

FOLDER = Path(__file__).parents[2] / "cluster"
FILES = sorted(FOLDER.rglob("*.yaml"))
PAGE = (FOLDER / "README.md").read_text()
PLACEHOLDER = r"(?:ami-)?YOUR-[A-Z]+"


def section(title: str) -> str:
    return re.split(r"^## ", PAGE.split(f"## {title}\n")[1], flags=re.MULTILINE)[0]


def test_the_page_names_each_placeholder_of_the_files_and_no_other() -> None:
    used = {found for path in FILES for found in re.findall(PLACEHOLDER, path.read_text())}
    named = set(re.findall(rf"^ *\| `({PLACEHOLDER})` \|", section("Before the first start"), re.MULTILINE))
    assert named == used
    assert len(used) > 3


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_belongs_to_a_user_is_left_to_be_filled_in(path: Path) -> None:
    text = path.read_text()
    buckets = re.findall(r"(?:s3|gs)://([^/\s]*)", text)
    images = re.findall(r"image: (\S*)mimiclab:", text)
    projects = re.findall(r"project_id: (\S+)", text)
    assert set(buckets) <= {"YOUR-BUCKET"}
    assert set(images) <= {"YOUR-REGISTRY/"}
    assert set(projects) <= {"YOUR-PROJECT"}
    assert buckets or images or projects or path.name == "network.yaml"


def test_everybody_reaches_ssh_on_aws_as_the_page_says() -> None:
    [inside, ssh] = _create_default_inbound_rules(["group"])
    assert inside["UserIdGroupPairs"] == [{"GroupId": "group"}]
    assert (ssh["FromPort"], ssh["ToPort"], ssh["IpRanges"]) == (22, 22, [{"CidrIp": "0.0.0.0/0"}])
    listens = section("What listens where")
    assert "| SSH | 22 | every address of every machine |" in listens
    assert "everybody reach SSH (`0.0.0.0/0`)" in listens


def test_the_page_saves_the_database_of_a_server_that_runs_and_puts_it_back(tmp_path: Path) -> None:
    lines = section("Upgrading").replace("\\\n", " ").splitlines()
    [save, restore] = [shlex.split(line)[4] for line in lines if "sqlite3" in line]
    database = tmp_path / "mlflow" / "mlflow.db"
    database.parent.mkdir()
    with closing(sqlite3.connect(database)) as server:
        server.execute("CREATE TABLE runs (name)")
        server.execute("INSERT INTO runs VALUES ('kept')")
        server.commit()
        run(save, tmp_path)
        server.execute("DELETE FROM runs")  # the next machine's is empty
        server.commit()

        run(restore, tmp_path)

        assert server.execute("SELECT name FROM runs").fetchall() == [("kept",)]


def run(command: str, home: Path) -> None:
    [python, *arguments] = shlex.split(command)
    assert python == "python"
    subprocess.run([sys.executable, *arguments], cwd=home, check=True)
