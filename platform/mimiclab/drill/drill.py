"""A drill from start to end: the undisturbed run, the disturbed one, and what the difference is."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from rich.console import Console

from mimiclab import checkpoint, runs
from mimiclab.cluster.local import owned_cluster
from mimiclab.drill import schedule
from mimiclab.drill.chaos import Chaos
from mimiclab.drill.compare import (
    FROM_THE_STEP,
    compare_checkpoints,
    compare_histories,
    compare_metrics,
    read_history,
)
from mimiclab.drill.figure import draw_timeline
from mimiclab.drill.report import Findings, Outcome, show
from mimiclab.drill.stage import Driver
from mimiclab.drill.story import tell
from mimiclab.errors import UserError
from mimiclab.experiment import LoadedExperiment, identity, vary
from mimiclab.lease import Lease
from mimiclab.ledger import Ledger
from mimiclab.progress import PROGRESS
from mimiclab.runs import Run
from mimiclab.schema import Experiment, ScaleConfig
from mimiclab.tracking import runs as tracking
from mimiclab.train import check, complete, num_steps

if TYPE_CHECKING:
    from mimiclab.data.splits import Splits

UNDISTURBED, DISTURBED = "undisturbed", "drill"
"""What the runs are called after the experiment's name."""
REPORT, FIGURE = "drill.json", "timeline.png"
"""Files in the folder of the disturbed run, and artifacts of it."""

# In both folders: what a drill may remove, and of what data and code that is. Hidden: it stays where a run starts anew.
_MARK = ".drill"
_SEND_S = 60.0


def drill(
    loaded: LoadedExperiment,
    *,
    events: str | None,
    num_random: int | None,
    seed: int,
    elastic: bool,
    tolerance: float,
    fresh: bool,
    console: Console,
    verbose: bool,
) -> Findings:
    """Train an experiment undisturbed and disturbed on a cluster of its own, and print what the difference is.

    An undisturbed run of an earlier drill is taken where it is of the same experiment, data and size. Changes of the
    code between two releases are not noticed: `fresh` trains it again.

    Args:
        loaded: what to train; its `scale.workers` is the number of nodes.
        events: as `schedule.parse` reads them; or else
        num_random: how many to draw.
        seed: of the drawing, and of the choice of ranks and nodes.
        elastic: go on with fewer workers where a node is lost, in place of a new node.
        tolerance: largest difference of AP where the number of workers changed.
        fresh: train the undisturbed run anew as well.
        console: gets what a person wants to know.
        verbose: let Ray talk.

    Raises:
        UserError: anything that the user can mend, found before a cluster is started wherever possible.
        KeyboardInterrupt: nothing is left running.
    """

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    named, (undisturbed, disturbed) = prepare(loaded, events=events, num_random=num_random, elastic=elastic)
    num_workers, threads = disturbed.scale.workers.max, disturbed.scale.threads
    splits = check(undisturbed, console, fresh=True)
    steps = num_steps(undisturbed, splits)
    if named is not None:
        planned = named
        schedule.check(planned, steps, num_workers, elastic=elastic)
    else:
        assert num_random is not None
        planned = schedule.draw(num_random, seed, steps, num_workers, elastic=elastic)
    say(f"events: {', '.join(map(str, planned))}; of {steps} steps")
    cpus = os.cpu_count() or 1
    if num_workers * threads > cpus:
        say(f"{num_workers} workers of {threads} threads share {cpus} CPUs: times say little, all else holds")

    reused = not fresh and is_reusable(undisturbed, splits)
    with _sigterm_as_ctrl_c(), owned_cluster(say, num_nodes=num_workers, cpus_per_node=threads) as nodes:

        def driver(experiment: Experiment, name: str) -> Driver:
            _clear(experiment, splits)
            say(f"training {experiment.name}")
            return Driver(experiment, nodes.cluster.head, lambda line: say(f"{name} | {line}"), verbose=verbose)

        if reused:
            say(f"run {undisturbed.name} is there already, of the same experiment, data and size")
        elif code := driver(undisturbed, UNDISTURBED).run():
            raise UserError(
                f"run {undisturbed.name}: it ended with exit code {code}, see above; expected an experiment that can "
                "be trained"
            )
        ours = driver(disturbed, DISTURBED)
        chaos = Chaos(
            planned,
            nodes,
            cpus_per_node=threads,
            replace=not elastic,
            kill_driver=ours.kill,
            seed=seed,
            say=lambda text: say(f"! {text}"),
        )
        code = ours.run(chaos.hear)
        say("ending the cluster")
    findings = find(undisturbed, disturbed, code, chaos.story, steps, tolerance)
    _keep(findings, undisturbed, disturbed, console)
    return findings


def prepare(
    loaded: LoadedExperiment, *, events: str | None, num_random: int | None, elastic: bool
) -> tuple[list[schedule.Event] | None, tuple[Experiment, Experiment]]:
    """What can be said of a drill before its data is read: its events, None where they are drawn, and its experiments.

    Raises:
        UserError: the events are none, neither or both ways were chosen, or the experiments are none for a drill.
    """
    if (events is None) == (num_random is None):
        raise UserError(
            f"found {'neither' if events is None else 'both'} --events and --random; expected one of them, as "
            "--events kill-worker@20,drain@70:20s"
        )
    named = None if events is None else schedule.parse(events)
    experiments = plan(loaded, elastic=elastic)
    for experiment in experiments:
        _refuse_what_is_no_drills(experiment)
    return named, experiments


def plan(loaded: LoadedExperiment, *, elastic: bool) -> tuple[Experiment, Experiment]:
    """The two experiments of a drill, as they run on nodes of this machine.

    Raises:
        UserError: it is none that a drill can train.
    """
    experiment = loaded.experiment
    if experiment.scale.gpu:
        raise UserError(
            f"{loaded.path}: scale.gpu: found true, expected false (--set scale.gpu=false): the nodes of a drill are "
            "processes of this machine, and have no GPU each"
        )
    if experiment.checkpoint.every_steps == "auto":
        raise UserError(
            f"{loaded.path}: checkpoint.every_steps: found auto, expected a number of steps (--set "
            "checkpoint.every_steps=50) that the steps repeated can be compared with"
        )
    if runs.storage_of(experiment).local is None:
        raise UserError(
            f"{loaded.path}: where.storage: found {experiment.where.storage}, expected a folder of this machine (--set "
            "where.storage=./runs), where a drill can follow its runs"
        )
    workers, usual = experiment.scale.workers.max, ScaleConfig()
    # One worker a node, by the CPUs that each offers.
    anywhere: dict[str, Any] = {
        "scale.label_selector": {},
        "scale.accelerator_type": None,
        "scale.placement": usual.placement,
        "scale.workers": workers,
    }
    scale = {**anywhere, "scale.workers": {"min": 1, "max": workers}} if elastic else anywhere
    return (
        vary(loaded, f"{experiment.name}-{UNDISTURBED}", anywhere),
        vary(loaded, f"{experiment.name}-{DISTURBED}", scale),
    )


def find(
    undisturbed: Experiment,
    disturbed: Experiment,
    exit_code: int,
    story: Sequence[dict[str, Any]],
    steps: int,
    tolerance: float,
) -> Findings:
    """Compare the two runs.

    Args:
        undisturbed: one that is complete.
        disturbed: the other, complete or not.
        exit_code: of its last driver.
        story: see `Chaos.story`.
        steps: that each takes.
        tolerance: see `Findings`.
    """
    told = tell(story)
    expected, found = _run(undisturbed), _run(disturbed)
    before, after = (checkpoint.latest(run.checkpoints, warn=lambda _: None) for run in (expected, found))
    every_steps, num_workers = disturbed.checkpoint.every_steps, disturbed.scale.workers.max
    assert every_steps != "auto"  # by plan
    same_size = set(told.worlds) <= {num_workers}
    histories = compare_histories(
        read_history(expected.tracking, expected.mlflow_run_id),
        read_history(found.tracking, found.mlflow_run_id),
        lambda series: same_size or series in FROM_THE_STEP,
    )
    both = before is not None and after is not None
    weights, state = compare_checkpoints(before, after) if both else (None, None)  # type: ignore[arg-type]
    ap = compare_metrics(before.meta["metrics"], after.meta["metrics"]) if both else None  # type: ignore[union-attr]
    return Findings(
        undisturbed=_outcome(expected, 0, before.step if before else 0),
        disturbed=_outcome(found, exit_code, after.step if after else 0),
        num_steps=steps,
        num_workers=num_workers,
        every_steps=every_steps,
        tolerance=tolerance,
        story=told,
        histories=histories,
        weights=weights,
        state=state,
        ap=ap,
    )


def _outcome(run: Run, exit_code: int, step: int) -> Outcome:
    ledger = Ledger.from_record(run.ledger)
    ends = [session.end or session.start for session in ledger.sessions]
    return Outcome(
        name=run.name,
        exit_code=exit_code,
        step=step,
        restarts=len(ledger.restarts()),
        goodput=ledger.goodput,
        seconds=max(ends) - ledger.sessions[0].start if ends else 0.0,
    )


def _keep(findings: Findings, undisturbed: Experiment, disturbed: Experiment, console: Console) -> None:
    """Print what was found, leave it with a figure in the run's folder, and send both to MLflow."""
    from mimiclab.tracking.ui import place_of
    from mimiclab.tracking.writer import MlflowTracker

    run = _run(disturbed)
    events = (json.loads(line) for line in (_run(undisturbed).folder / PROGRESS).read_text().splitlines())
    steps = [(event["time"], event["step"]) for event in events if event["kind"] == "step"]
    files = run.folder / REPORT, run.folder / FIGURE
    files[0].write_text(json.dumps(findings.as_json(), indent=1))
    draw_timeline(files[1], f"{run.name}: {findings.num_steps} steps", steps, findings.story)
    tracker = MlflowTracker(run.tracking, run.mlflow_run_id)
    for file in files:
        tracker.log_file(f"drill/{file.name}", file.read_bytes())
    tracker.close(_SEND_S)
    show(findings, console)
    for name, where in (
        ("report", str(files[0])),
        ("figure", str(files[1])),
        ("MLflow", place_of(run.tracking, run.mlflow_run_id)),
    ):
        console.print(f"{name + ':':10}{where}", highlight=False, markup=False)


def _run(experiment: Experiment) -> Run:
    run = runs.read(runs.storage_of(experiment))
    if run is None:
        raise UserError(f"run {experiment.name}: it was never begun, see above; expected an experiment that is trained")
    return run


def _refuse_what_is_no_drills(experiment: Experiment) -> None:
    runs.check(experiment, fresh=True)
    folder = runs.folder_of(experiment)
    if (folder / runs.EXPERIMENT).exists() and not (folder / _MARK).exists():
        raise UserError(
            f"run {folder}: it was not made by a drill, which would remove it; expected another name (--set name=...)"
        )


def is_reusable(experiment: Experiment, splits: Splits) -> bool:
    """Whether a drill's run of an experiment is what training it now would give, as far as can be told."""
    run = complete(experiment, splits)
    if run is None or run.experiment() != experiment or Ledger.from_record(run.ledger).restarts():
        return False
    newest = checkpoint.latest(run.checkpoints, warn=lambda _: None)
    return (
        newest is not None
        and newest.step == num_steps(experiment, splits)
        and run.storage.read(_MARK) == _made_of(splits)
    )


def _made_of(splits: Splits) -> bytes:
    """Hash of what a run depends on beside its experiment: its data, as far as files' times tell, and the versions."""
    from mimiclab.data.coco import content_hash
    from mimiclab.data.columns import ImageFiles
    from mimiclab.data.pack import file_stats

    made_of = hashlib.sha256(json.dumps([version(name) for name in ("mimiclab", "torch")]).encode())
    for split in (splits.train, splits.val):
        made_of.update(content_hash(split).encode())
        if isinstance(split.source, ImageFiles):
            made_of.update(file_stats(split.source).tobytes())
    return made_of.hexdigest().encode()


def _clear(experiment: Experiment, splits: Splits) -> None:
    """Make the folder of a run an empty one, and have MLflow begin a new run."""
    storage = runs.storage_of(experiment)
    with Lease.take(storage, experiment.name):
        storage.write(_MARK, _made_of(splits))
        runs.prepare(experiment, fresh=True)
        uri = tracking.absolute_uri(experiment.where.tracking)
        tracking.forget_run(uri, experiment.where.project, experiment.name, identity(experiment))


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Else it would end this process at once, and leave the cluster."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
