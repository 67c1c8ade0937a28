"""One trial, in the process that Ray Tune gives it: an ordinary training run whose evaluations go to the search.

`run_trial` drives Ray Train, whose workers may be several and anywhere. `TrialAlone` trains in the trial's own process.
"""

from __future__ import annotations

import gc
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.result import DONE, RESULT_DUPLICATE
from rich.console import Console

from mimiclab.fit import Fit, fit
from mimiclab.runs import Run
from mimiclab.schema import Experiment
from mimiclab.search.alone import fit_alone
from mimiclab.search.data import splits_of
from mimiclab.seat import LAST
from mimiclab.tracking.searches import PARENT_TAG
from mimiclab.train import complete, train

if TYPE_CHECKING:
    from mimiclab.data.splits import Splits

Report = Callable[[Mapping[str, Any]], object]


def run_trial(config: Mapping[str, str], *, parent: str, folder: str) -> None:
    """Train one trial with Ray Train; Tune kills the process that this runs in when the trial is pruned.

    Args:
        config: the trial's `experiment`, as JSON.
        parent: MLflow's id of the search's run.
        folder: where the search was started: relative paths mean what they mean there.
    """
    os.chdir(folder)
    # Made here: it finds the trial that it reports for in this process.
    with_reports = partial(fit, callbacks=[TuneReportCallback()])
    _train(Experiment.model_validate_json(config["experiment"]), parent, with_reports, tune.report)


class TrialAlone(tune.Trainable):  # type: ignore[misc]
    """Trains one trial after the other, each to its end or until it is pruned, in the process of this actor.

    A step is one evaluation. Training waits after it for what the search decides.
    """

    def setup(self, config: Mapping[str, str], *, parent: str = "", folder: str = "") -> None:
        """Prepare for the first trial; see `run_trial`."""
        os.chdir(folder)
        self._parent = parent
        self._training = self._prepare(config)

    def step(self) -> dict[str, Any]:
        """Train up to the next evaluation, and give that."""
        result = self._training.next()
        return {RESULT_DUPLICATE: True, DONE: True} if result is None else result

    def cleanup(self) -> None:
        """End the trial in good order: all that it has done is saved and sent."""
        self._training.end()

    def reset_config(self, new_config: Mapping[str, str]) -> bool:
        """Go over to another trial."""
        self._training.end()
        gc.collect()
        if torch := sys.modules.get("torch"):
            torch.cuda.empty_cache()
        self._training = self._prepare(new_config)
        return True

    def _prepare(self, config: Mapping[str, str]) -> _Training:
        return _Training(Experiment.model_validate_json(config["experiment"]), self._parent)


class _Training:
    """A trial in a thread, which stops at each evaluation until the next one is asked for."""

    def __init__(self, experiment: Experiment, parent: str) -> None:
        self._results: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._go_on = threading.Semaphore(0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(experiment, parent), name="trial", daemon=True)

    def next(self) -> dict[str, Any] | None:
        """The next evaluation, None if training has ended without one; raises what it ended by."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go_on.release()
        result = self._results.get()
        if self._failure is not None:
            raise self._failure
        return result

    def end(self) -> None:
        """Stop training where it goes on, and wait until it has."""
        self._stop.set()
        self._go_on.release()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self, experiment: Experiment, parent: str) -> None:
        try:
            _train(experiment, parent, partial(fit_alone, report=self._report, stop=self._stop), self._report)
        except BaseException as error:
            self._failure = error
        finally:
            self._results.put(None)

    def _report(self, metrics: Mapping[str, Any]) -> None:
        self._results.put(dict(metrics))
        self._go_on.acquire()


def _train(experiment: Experiment, parent: str, fit: Fit, report: Report) -> None:
    """Train a trial to its end, from its last checkpoint."""
    # The search has looked for mistakes already; a value that does not go with the data or the weights is met by the
    # worker, which says the same of it.
    splits = splits_of(experiment)
    if run := complete(experiment, splits):  # no worker begins that would tell its last evaluation again
        report(_last_result(run, experiment, splits))
    train(experiment, console=Console(quiet=True), tags={PARENT_TAG: parent}, splits=splits, fit=fit)


def _last_result(run: Run, experiment: Experiment, splits: Splits) -> dict[str, Any]:
    """The last evaluation of a run, as its worker told it: a search that was killed may not have heard."""
    from mimiclab import checkpoint
    from mimiclab.data.order import training_order

    newest = checkpoint.latest(run.checkpoints, warn=lambda _: None, deep=False)
    assert newest is not None  # it is complete
    order, step = training_order(splits.train, experiment), newest.meta["evaluated"]
    epoch = next(n for n in range(1, experiment.optim.epochs + 1) if order.epoch_end_step(n) == step)
    return {"epoch": epoch, "step": step, LAST: newest.meta["stopped"], **newest.meta["metrics"]}
