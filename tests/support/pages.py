"""A store that real trainings and a real search have filled, `mimiclab ui` on it, and a browser."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import BrowserContext, expect, sync_playwright
from tinyruns import TINY, quiet, tiny

from mimiclab.experiment import load_experiment
from mimiclab.tracking import runs as tracking
from mimiclab.tracking.client import connect

SEARCH = """
extends: tiny.yaml
name: look
scale: {workers: 1}
optim: {epochs: 2}
search:
  trials: 3
  max_concurrent: 1
  grace_period: 2
  space:
    optim.lr: {loguniform: [1e-3, 1e-2]}
    model.mimic.cls_weight: {loguniform: [0.1, 10]}
"""
# A busy machine draws without a graphics card for half a minute.
PATIENCE_MS = 120_000
# Otherwise a first visit opens a panel that asks for an assistant.
_VISITED_BEFORE = """
localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
"""


def fill(root: Path) -> str:
    """Train two runs and search a little, on a cluster of its own; the address of the store.

    It also has a run that was better, and was discarded.
    """
    from mimiclab.session import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    import ray

    from mimiclab.search.driver import search
    from mimiclab.train import train

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        for name, lr in (("slow", "1e-3"), ("fast", "3e-3")):
            train(tiny(root, f"name={name}", f"optim.lr={lr}", "scale.workers=1"), console=quiet())
        (root / "tiny.yaml").write_text(TINY.replace("ROOT", str(root)))
        (root / "look.yaml").write_text(SEARCH)
        search(load_experiment(root / "look.yaml", ()), console=quiet())
    finally:
        ray.shutdown()
    uri = f"sqlite:///{root}/mlflow.db"
    discarded = tracking.open_run(uri, "mimiclab", "fast", "abc", {}, {})
    connect(uri).log_metric(discarded, "student/AP", 1.0)
    tracking.forget_run(uri, "mimiclab", "fast", "abc")
    return uri


@contextlib.contextmanager
def user_interface(tracking: str, output: Path) -> Iterator[dict[str, str]]:
    """Run `mimiclab ui` and give the links that it prints, by what they lead to; Ctrl-C at the end."""
    with output.open("w") as file:
        command = [sys.executable, "-m", "mimiclab", "ui", "--tracking", tracking, "--port", str(_free_port())]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 180
        while "Ctrl-C" not in output.read_text():
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.2)
        lines = (line.partition(": http") for line in output.read_text().splitlines())
        yield {name: f"http{rest}" for name, found, rest in lines if found}
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, output.read_text()


def chromium() -> str | None:
    """The browser of the system; playwright's own would be a download of its own."""
    return shutil.which("chromium")


@contextlib.contextmanager
def browser(height: int = 1000) -> Iterator[BrowserContext]:
    """A browser that shows nothing and has been here before."""
    with sync_playwright() as playwright:
        shown = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"], headless=True)
        context = shown.new_context(viewport={"width": 1440, "height": height})
        context.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        context.add_init_script(_VISITED_BEFORE)
        yield context
        shown.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
