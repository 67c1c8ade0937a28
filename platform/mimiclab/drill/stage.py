"""The driver of a drill's run: `mimiclab train` as a process of its own, as a user would start it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mimiclab import runs
from mimiclab.cluster.nodes import without_cluster
from mimiclab.experiment import resolved_yaml
from mimiclab.progress import PROGRESS, ProgressReader
from mimiclab.schema import Experiment

_POLL_S = 0.05
# Asked to stop, it records the run as killed; the tracking server may be slow.
_STOP_S = 60.0


class Driver:
    """Runs the command that trains an experiment on a cluster, as often as it is killed.

    Args:
        experiment: what it trains; its run's folder is on this machine and empty.
        address: of the cluster's head.
        say: gets each line that it prints.
        verbose: let Ray talk.
    """

    def __init__(self, experiment: Experiment, address: str, say: Callable[[str], object], *, verbose: bool) -> None:
        self._experiment = experiment
        self._options = ["--address", address, *(["--verbose"] if verbose else [])]
        self._say = say
        self._process: subprocess.Popen[str] | None = None
        self._killed = False

    def kill(self) -> bool:
        """End it without a last word, and have `run` start it again; False where it had ended by itself."""
        if self._process is None or self._process.poll() is not None:
            return False
        self._killed = True
        self._process.kill()
        self._process.wait()
        return True

    def run(self, hear: Callable[[dict[str, Any]], object] = lambda _: None) -> int:
        """Train to the end; the exit code. An exception, of `hear` or from outside, stops it.

        Args:
            hear: gets every event of the run, within a tenth of a second where it does not take longer itself.
        """
        reader = ProgressReader(runs.folder_of(self._experiment) / PROGRESS)
        with tempfile.TemporaryDirectory(prefix="mimiclab-") as folder:
            file = Path(folder) / runs.EXPERIMENT
            file.write_text(resolved_yaml(self._experiment))
            while True:
                self._killed = False
                with self._started(file) as process:
                    while process.poll() is None:
                        for event in reader.new_events():
                            hear(event)
                        time.sleep(_POLL_S)
                for event in reader.new_events():
                    hear(event)
                if not self._killed:
                    return process.returncode
                self._say("the driver is started again")

    @contextlib.contextmanager
    def _started(self, file: Path) -> Iterator[subprocess.Popen[str]]:
        # A session of its own: a Ctrl-C reaches the drill, which then stops it.
        process = self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mimiclab", "train", str(file), *self._options],
            env={"COLUMNS": "120", **without_cluster(os.environ), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        shown = threading.Thread(target=self._show, args=(process,), daemon=True)
        shown.start()
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(_STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            shown.join(_STOP_S)

    def _show(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._say(line.rstrip("\n"))
