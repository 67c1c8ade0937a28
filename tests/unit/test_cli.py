import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from mimiclab.cli import main

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
