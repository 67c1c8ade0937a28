"""What code ran, and where."""

import hashlib
import subprocess
from pathlib import Path

import torch

from mimiclab.code import COMMIT_TAG
from mimiclab.facts import facts, git_state, lock_hash


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_told_and_whether_files_have_changed_since(tmp_path: Path) -> None:
    git(tmp_path, "init")
    assert git_state(tmp_path) == {}, "a repository without a commit"
    (tmp_path / "a.py").write_text("a = 1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "notes.txt").write_text("git does not know this one")

    assert git_state(tmp_path) == {COMMIT_TAG: commit, "git.dirty": "false"}
    (tmp_path / "a.py").write_text("a = 2")
    assert git_state(tmp_path) == {COMMIT_TAG: commit, "git.dirty": "true"}

    # Installed somewhere inside of another repository, as in its virtual environment.
    (tmp_path / "site-packages").mkdir()
    assert git_state(tmp_path / "site-packages") == {}


def test_without_git_there_is_no_state(tmp_path: Path, monkeypatch) -> None:
    git(tmp_path, "init")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) == {}


def test_the_lock_is_that_of_the_checkout_else_of_what_is_installed(tmp_path: Path) -> None:
    installed = lock_hash(tmp_path)
    assert len(installed) == 64
    assert lock_hash(tmp_path) == installed
    (tmp_path / "requirements.lock").write_text("torch==2.15.0\n")
    assert lock_hash(tmp_path) == hashlib.sha256(b"torch==2.15.0\n").hexdigest()


def test_facts_of_this_machine() -> None:
    found = facts(torch.device("cpu"))
    assert torch.__version__.startswith(found["version.torch"])
    assert {"version.python", "version.ray", "version.mlflow", "host.name", "lock.sha256", "code.hash"} < found.keys()
    assert int(found["host.cores"]) >= 1
    assert float(found["host.memory_gb"]) > 0.1
    assert found["device"] == "cpu"
    assert "host.gpus" not in found
    assert all(value and len(value) < 5000 for value in found.values())
