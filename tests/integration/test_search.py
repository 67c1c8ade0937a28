"""A whole search on a real Ray cluster and a real MLflow store, one whose processes die, one that is interrupted."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote

import psutil
import pytest
import ray
from mlflow import MlflowClient
from mlflow.entities import Run
from rich.console import Console
from tinyruns import at_step, history

from mimiclab import runs
from mimiclab.errors import UserError
from mimiclab.experiment import LoadedExperiment, load_experiment
from mimiclab.lease import Lease, last_holder
from mimiclab.progress import PROGRESS
from mimiclab.search.driver import search
from mimiclab.search.promote import promote
from mimiclab.search.record import RECORD, Record, recompute
from mimiclab.search.report import REPORT, TEXT
from mimiclab.search.trials import Trial
from mimiclab.storage import Storage
from mimiclab.tracking import ui
from mimiclab.tracking.searches import newest_search
from mimiclab.train import train

pytestmark = pytest.mark.cluster

TINY = (Path(__file__).parent / "tiny.yaml").read_text()
STEPS_PER_EPOCH = 5
# With this seed the first trial may detect 100 objects and the second one 1, which is pruned for it; the third
# looks for weights that are not there.
SEARCH = """
name: look
seed: 62
scale: {workers: 1}
search:
  metric: student/AR100
  trials: 3
  max_concurrent: 1
  space:
    model.inference.max_detections: {choice: [100, 1]}
    model.mimic.cls_weight: {loguniform: [0.1, 10]}
    model.weights: {choice: [null, null, none.safetensors]}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("search")


def load(root: Path, *overrides: str) -> LoadedExperiment:
    (root / "tiny.yaml").write_text(TINY.replace("ROOT", str(root)))
    (root / "look.yaml").write_text("extends: tiny.yaml\n" + SEARCH)
    return load_experiment(root / "look.yaml", overrides)


@pytest.fixture(scope="module")
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def ranking(root: Path, console: Console, ray_cluster: None) -> list[Trial]:
    """The trials of a finished search, the best first."""
    return search(load(root), console=console)


@pytest.fixture(scope="module")
def client(root: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{root}/mlflow.db")


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def parent_and_children(client: MlflowClient, name: str = "look") -> tuple[Run, dict[str, Run]]:
    found = client.search_runs([client.get_experiment_by_name("mimiclab").experiment_id])
    (parent,) = (run for run in found if run.info.run_name == name)
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    return parent, {run.info.run_name: run for run in children}


def best_of(client: MlflowClient, run: Run, epochs: int) -> float:
    """The best of the epochs that the search has seen: a stop may reach a trial one evaluation later."""
    history = client.get_metric_history(run.info.run_id, "student/AR100")
    return max((metric.value for metric in history if metric.step <= epochs * STEPS_PER_EPOCH), default=-1)


def test_the_better_trial_is_trained_to_its_end_and_the_worse_one_is_pruned(ranking: list[Trial]) -> None:
    assert [(trial.name, trial.outcome, trial.epochs) for trial in ranking] == [
        ("trial-00", "finished", 3),
        ("trial-01", "pruned", 1),
        ("trial-02", "failed", 0),
    ]


def test_mlflow_shows_the_search_and_its_trials(ranking: list[Trial], client: MlflowClient) -> None:
    parent, children = parent_and_children(client)
    assert (parent.info.run_name, parent.info.status) == ("look", "FINISHED")
    assert parent.data.params["search.space.model.inference.max_detections.choice"] == "[100, 1]"
    assert parent.data.tags["search.best_trial"] == "trial-00"
    assert "`model.mimic.cls_weight`: loguniform [0.1, 10]" in parent.data.tags["mlflow.note.content"]
    assert "| trial-01 | pruned |" in parent.data.tags["mlflow.note.content"]
    assert {"experiment.yaml", "best.yaml", "report"} == {
        file.path for file in client.list_artifacts(parent.info.run_id)
    }

    assert {name: (run.info.status, run.data.tags["trial.outcome"]) for name, run in children.items()} == {
        "look-trial-00": ("FINISHED", "finished"),
        "look-trial-01": ("KILLED", "pruned"),
        "look-trial-02": ("FAILED", "failed"),
    }
    for trial in ranking:
        run = children[trial.experiment.name]
        for key, value in trial.values.items():
            assert run.data.params[key] == str(value)
            assert run.data.metrics.get(key) == (value if isinstance(value, int | float) else None)
    assert "none.safetensors" in children["look-trial-02"].data.tags["trial.error"]


def test_the_ranking_is_that_of_the_recorded_metrics(ranking: list[Trial], client: MlflowClient) -> None:
    parent, children = parent_and_children(client)
    values = [best_of(client, children[trial.experiment.name], trial.epochs) for trial in ranking]
    assert values == sorted(values, reverse=True)
    assert values[0] == parent.data.metrics["best/student/AR100"]
    for trial in ranking[:2]:
        best = trial.best("max")
        assert best is not None
        assert best[1] == best_of(client, children[trial.experiment.name], trial.epochs)


def test_a_pruned_trial_has_its_whole_history(ranking: list[Trial], client: MlflowClient) -> None:
    """ASHA kills it right after an evaluation, before all of that has been sent."""
    _, children = parent_and_children(client)
    pruned = children["look-trial-01"].info.run_id
    losses = [m.step for m in client.get_metric_history(pruned, "train/loss")]
    assert losses[:5] == [1, 2, 3, 4, 5]
    assert len(losses) == len(set(losses))
    evaluated = [m.step for m in client.get_metric_history(pruned, "student/AP")]
    assert evaluated in ([5], [5, 10])  # the second one where training was faster than the stop


def test_the_folders_of_the_trials_say_how_they_ended(ranking: list[Trial]) -> None:
    found = [runs.read(runs.folder_of(trial.experiment)) for trial in ranking]
    assert [run.status if run else None for run in found] == ["finished", "killed", "failed"]


def test_the_best_trial_is_an_experiment_of_its_own(ranking: list[Trial], root: Path) -> None:
    file = root / "runs" / "look" / "best.yaml"
    assert file.read_text().startswith(
        "# The best of 3 trials of the search look: trial-00 (finished), student/AR100 0."
    )
    best = load_experiment(file).experiment
    assert best.name == "look-best"
    assert best.model_copy(update={"name": "look-trial-00"}) == ranking[0].experiment
    assert best.model.inference.max_detections == 100


def test_a_promoted_trial_trains_to_the_same_numbers(ranking: list[Trial], root: Path) -> None:
    storage = str(root / "runs")
    file = promote("look", "trial-00", output=root / "again.yaml", storage=storage)

    run = train(load_experiment(file).experiment, console=Console(file=io.StringIO()))

    assert run.name == "look-trial-00-promoted"
    events = Record(Storage(root / "runs" / "look")).events
    results = [event for event in events if event["event"] == "result" and event["trial"] == "trial-00"]
    assert [(event["step"], event["value"]) for event in results] == history(run, "student/AR100")
    assert len(results) == 3
    first = runs.find("look-trial-00", storage)
    assert history(run, "train/loss") == history(first, "train/loss")
    # And the file names the runs that it comes from.
    text = file.read_text()
    assert f"run look-trial-00, identity {first.identity}" in text
    parent = MlflowClient(first.tracking).get_run(first.mlflow_run_id).data.tags["mlflow.parentRunId"]
    assert f"run {first.mlflow_run_id}, of the search {parent}" in text


def test_the_search_leaves_its_report(ranking: list[Trial], root: Path, client: MlflowClient) -> None:
    folder = root / "runs" / "look" / REPORT
    assert "1 failed, 1 finished, 1 pruned" in (folder / TEXT).read_text()
    parent, _ = parent_and_children(client)
    artifacts = {Path(file.path).name for file in client.list_artifacts(parent.info.run_id, REPORT)}
    assert artifacts == {path.name for path in folder.iterdir()} >= {TEXT, "curves.png"}


def test_a_person_sees_what_happens_and_what_came_of_it(ranking: list[Trial], console: Console) -> None:
    lines = [line.rstrip() for line in said(console).splitlines()]
    assert lines[0] == "3 trials, 1 at a time"
    assert "trial-00  epoch 3/3, student/AR100 0." in said(console)
    assert "trial-01  pruned after epoch 1" in lines
    assert any(line.startswith("trial-02  failed: weights ") for line in lines)
    start = next(i for i, line in enumerate(lines) if line.startswith("trial ")) + 1
    assert [line.split()[:2] for line in lines[start : start + 3]] == [[trial.name, trial.outcome] for trial in ranking]
    assert "Traceback" not in said(console)


def test_the_pages_link_to_the_comparison_of_the_trials(ranking: list[Trial], root: Path) -> None:
    found = newest_search(f"sqlite:///{root}/mlflow.db", "mimiclab")
    assert found is not None
    assert (found.name, len(found.trials)) == ("look", 3)
    link = ui.compare_page("http://127.0.0.1:5000/", found.experiment_id, found.trials)
    start, query = link.split("?")
    assert start == "http://127.0.0.1:5000/#/compare-runs"
    assert {key: json.loads(unquote(value)) for key, _, value in (p.partition("=") for p in query.split("&"))} == {
        "runs": found.trials,
        "experiments": [found.experiment_id],
    }


def test_the_same_command_on_a_complete_search_runs_nothing(
    ranking: list[Trial], root: Path, client: MlflowClient
) -> None:
    parent, children = parent_and_children(client)
    before = (root / "runs" / "look" / RECORD).read_text()
    again = Console(file=io.StringIO(), width=200)
    found = search(load(root), console=again)
    assert [(t.name, t.outcome, t.evaluations, t.error) for t in found] == [
        (t.name, t.outcome, t.evaluations, t.error) for t in ranking
    ]
    assert "search look is complete" in said(again)
    assert (root / "runs" / "look" / RECORD).read_text() == before
    now, same = parent_and_children(client)
    assert (now.info.run_id, now.info.status) == (parent.info.run_id, "FINISHED")
    for name, run in same.items():
        assert run.data.metrics == children[name].data.metrics
        assert (run.info.status, run.info.end_time) == (children[name].info.status, children[name].info.end_time)


def test_a_second_driver_is_refused(ranking: list[Trial], root: Path, console: Console) -> None:
    with (
        Lease.take(Storage(root / "runs" / "look"), "look"),
        pytest.raises(UserError, match=r"look: process \d+ on .* since .*expected no other driver"),
    ):
        search(load(root), console=console)


def test_a_changed_search_of_that_name_is_refused(ranking: list[Trial], root: Path, console: Console) -> None:
    with pytest.raises(UserError) as caught:
        search(load(root, "search.grace_period=2", "optim.lr=2e-3"), console=console)
    assert "What changed:\n  optim.lr: 0.001 -> 0.002\n  search.grace_period: 1 -> 2\n" in str(caught.value)


def test_more_workers_than_the_cluster_has(root: Path, console: Console, ray_cluster: None) -> None:
    loaded = load(root, "name=large", "scale.workers=99", "optim.global_batch=99")
    with pytest.raises(UserError, match="99 workers of 1 CPU each need 99, found 4 in the cluster"):
        search(loaded, console=console)
    assert not (root / "runs" / "large").exists()


def test_a_metric_that_no_evaluation_reports(root: Path, client: MlflowClient, ray_cluster: None) -> None:
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(
        UserError, match=r"search.metric: evaluations do not report student/ap; did you mean student/AP"
    ):
        search(load(root, "name=misnamed", "search.metric=student/ap", "search.trials=1"), console=console)
    (parent,) = client.search_runs(["1"], "attributes.run_name = 'misnamed'")
    (child,) = client.search_runs(["1"], "attributes.run_name = 'misnamed-trial-00'")
    assert parent.info.status == "FAILED"
    # On a connection that goes on, the trial's process may live to say that it failed.
    assert child.info.status in ("KILLED", "FAILED")
    assert child.data.tags["trial.outcome"] == "killed"


EPOCH_ENDS = [5, 10, 14, 19, 24, 28]
DYING = """
name: dying
scale: {workers: 1, max_crashes: 1}
search:
  metric: student/AR100
  algorithm: grid
  max_concurrent: 1
  grace_period: 3
  space: {model.inference.max_detections: {choice: [100, 99, 98]}}
"""


def kill_driver(folder: Path) -> None:
    """End the process that drives a run, as a machine that is short of memory does."""
    holder = last_holder(Storage(folder))
    assert holder is not None
    os.kill(holder.pid, signal.SIGKILL)


def steps_of(client: MlflowClient, run: Run, key: str) -> list[int]:
    return [metric.step for metric in client.get_metric_history(run.info.run_id, key)]


def attempts(folder: Path) -> list[int]:
    """The steps that a run was begun from."""
    lines = (folder / PROGRESS).read_text().splitlines()
    return [json.loads(line)["step"] for line in lines if '"kind": "attempt"' in line]


def told(events: list[dict]) -> list[tuple[str, str]]:
    """What the record says of the lives of the trials."""
    kinds = ("started", "retried", "resumed", "ended")
    return [(event["event"], event["trial"]) for event in events if event["event"] in kinds]


def test_a_trial_whose_process_dies_goes_on_and_one_that_always_dies_is_given_up(
    root: Path, client: MlflowClient, ray_cluster: None
) -> None:
    load(root)
    (root / "dying.yaml").write_text(f"extends: tiny.yaml\n{DYING}")
    folders = [root / "runs" / f"dying-trial-{number:02d}" for number in range(3)]
    at_step(folders[0], 7, lambda: kill_driver(folders[0]))
    over = threading.Event()
    killed = []

    def kill_each() -> None:
        while not over.wait(0.01):
            holder = last_holder(Storage(folders[1])) if folders[1].exists() else None
            if holder is not None and holder.pid not in killed:
                killed.append(holder.pid)
                os.kill(holder.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_each)
    killer.start()
    try:
        ranking = search(load_experiment(root / "dying.yaml"), console=Console(file=io.StringIO(), width=200))
    finally:
        over.set()
        killer.join()

    first, second, third = sorted(ranking, key=lambda trial: trial.number)
    for trial in (first, third):
        assert (trial.outcome, [epoch for epoch, _ in trial.evaluations]) == ("finished", [1, 2, 3])
    assert (second.outcome, second.evaluations) == ("failed", [])
    assert second.error is not None
    assert second.error.startswith("scale.max_crashes: 1, and its process died 2 times")
    assert len(killed) == 2
    events = Record(Storage(root / "runs" / "dying")).events
    assert told(events) == [
        *((event, "trial-00") for event in ("started", "retried", "resumed", "ended")),
        *((event, "trial-01") for event in ("started", "retried", "resumed", "ended")),
        *((event, "trial-02") for event in ("started", "ended")),
    ]
    start, again = attempts(folders[0])
    assert (start, again >= 5) == (0, True)
    assert attempts(folders[2]) == [0]
    _, children = parent_and_children(client, "dying")
    assert {name: (run.info.status, run.data.tags["trial.outcome"]) for name, run in children.items()} == {
        "dying-trial-00": ("FINISHED", "finished"),
        "dying-trial-01": ("FAILED", "failed"),
        "dying-trial-02": ("FINISHED", "finished"),
    }
    for name in ("dying-trial-00", "dying-trial-02"):
        assert steps_of(client, children[name], "train/loss") == list(range(1, EPOCH_ENDS[2] + 1))
        assert steps_of(client, children[name], "student/AR100") == EPOCH_ENDS[:3]


WIDE = """
name: wide
scale: {workers: 2}
search:
  metric: student/AR100
  algorithm: grid
  max_concurrent: 1
  space: {optim.lr: {choice: [1e-3, 1e+30]}}
"""


@pytest.mark.slow
def test_trials_of_several_workers_are_driven_with_ray_train(
    root: Path, client: MlflowClient, ray_cluster: None
) -> None:
    """The first one's driver dies, the second one's loss becomes NaN; both give their processors back."""
    load(root)
    (root / "wide.yaml").write_text(f"extends: tiny.yaml\n{WIDE}")
    folder = root / "runs" / "wide-trial-00"
    at_step(folder, 7, lambda: kill_driver(folder))

    ranking = search(load_experiment(root / "wide.yaml"), console=Console(file=io.StringIO(), width=200))

    assert [(trial.name, trial.outcome, trial.epochs) for trial in ranking] == [
        ("trial-00", "finished", 3),
        ("trial-01", "pruned", 0),
    ]
    assert ranking[1].error is not None
    assert "loss" in ranking[1].error
    assert told(Record(Storage(root / "runs" / "wide")).events) == [
        *((event, "trial-00") for event in ("started", "retried", "resumed", "ended")),
        *((event, "trial-01") for event in ("started", "ended")),
    ]
    assert attempts(folder)[-1] >= 5
    _, children = parent_and_children(client, "wide")
    assert steps_of(client, children["wide-trial-00"], "train/loss") == list(range(1, 15))
    assert steps_of(client, children["wide-trial-00"], "student/AR100") == [5, 10, 14]
    # Ray keeps them for the life of the job: a cluster that others use too would fill up with such trials.
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, ray.util.placement_group_table()
        time.sleep(0.5)


GRID = """
name: stopped
optim: {epochs: 6}
scale: {workers: 1}
search:
  metric: student/AR100
  algorithm: grid
  trials: 3
  max_concurrent: 1
  space:
    optim.lr: {choice: [1e-3, 1e+30]}
    model.inference.max_detections: {choice: [1, 100]}
"""


def start(root: Path) -> subprocess.Popen[str]:
    """The command line on a cluster of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", "from mimiclab.cli import main; main()", "search", "stopped.yaml"],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen[str], file: Path, text: str) -> list[psutil.Process]:
    """Wait until a file holds a text; the processes that the command has started by then."""
    deadline = time.monotonic() + 200
    while not (file.exists() and text in file.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return psutil.Process(process.pid).children(recursive=True)


def test_a_search_goes_on_after_ctrl_c_and_after_sigkill(root: Path, ray_cluster: None) -> None:
    """The first trial is running at Ctrl-C. When the driver is killed it has finished, and the second one runs."""
    load(root)
    tracking = f"sqlite:///{root}/stopped.db"
    (root / "stopped.yaml").write_text(f"extends: tiny.yaml\n{GRID}where: {{tracking: '{tracking}'}}\n")
    runs_folder = root / "runs"

    process = start(root)
    children = wait_for(process, runs_folder / "stopped-trial-00" / PROGRESS, '"step": 7')
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "stopped" in output
    assert "Traceback" not in output
    client = MlflowClient(tracking)
    parent, trials = parent_and_children(client, "stopped")
    assert parent.info.status == "KILLED"
    assert {name: (run.info.status, run.data.tags["trial.outcome"]) for name, run in trials.items()} == {
        "stopped-trial-00": ("KILLED", "killed")
    }
    run = runs.read(runs_folder / "stopped-trial-00")
    assert run is not None
    assert run.status == "killed"
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []

    process = start(root)
    wait_for(process, runs_folder / "stopped" / RECORD, '"trial": "trial-01", "epoch": 1, "go_on": true')
    holder = last_holder(Storage(runs_folder / "stopped-trial-01"))
    assert holder is not None
    training = psutil.Process(holder.pid)
    process.kill()
    _, alive = psutil.wait_procs([training], timeout=30)
    assert alive == []
    process.communicate()
    _, trials = parent_and_children(client, "stopped")
    assert {name: run.data.tags["trial.outcome"] for name, run in trials.items() if name != "stopped-trial-01"} == {
        "stopped-trial-00": "finished"
    }

    console = Console(file=io.StringIO(), width=200)
    ranking = search(load_experiment(root / "stopped.yaml"), console=console)

    assert [(t.name, t.outcome, [epoch for epoch, _ in t.evaluations]) for t in ranking] == [
        ("trial-01", "finished", [1, 2, 3, 4, 5, 6]),
        ("trial-00", "finished", [1, 2, 3, 4, 5, 6]),
        ("trial-02", "pruned", []),
    ]
    assert [trial.error is not None and "loss" in trial.error for trial in ranking] == [False, False, True]
    assert "3 trials, 1 of them ended before, 1 at a time" in said(console)

    events = Record(Storage(runs_folder / "stopped")).events
    assert told(events) == [
        *((event, "trial-00") for event in ("started", "resumed", "ended")),
        *((event, "trial-01") for event in ("started", "resumed", "ended")),
        *((event, "trial-02") for event in ("started", "ended")),
    ]
    decisions = [{k: v for k, v in event.items() if k != "time"} for event in events if event["event"] == "decision"]
    assert decisions == list(recompute(events))
    compared = [(d["trial"], d["epoch"], d["rung"], len(d["values"])) for d in decisions if d["rung"]]
    assert compared == [
        (trial, epoch, rung, n)
        for n, trial in enumerate(("trial-00", "trial-01"))
        for epoch, rung in ((1, 1), (2, 2), (3, 2), (4, 4), (5, 4))
    ]

    now, trials = parent_and_children(client, "stopped")
    assert (now.info.run_id, now.info.status) == (parent.info.run_id, "FINISHED")
    assert {name: (run.info.status, run.data.tags["trial.outcome"]) for name, run in trials.items()} == {
        "stopped-trial-00": ("FINISHED", "finished"),
        "stopped-trial-01": ("FINISHED", "finished"),
        "stopped-trial-02": ("KILLED", "pruned"),
    }
    assert "loss" in trials["stopped-trial-02"].data.tags["trial.error"]
    for name in ("stopped-trial-00", "stopped-trial-01"):
        assert steps_of(client, trials[name], "train/loss") == list(range(1, EPOCH_ENDS[-1] + 1))
        assert steps_of(client, trials[name], "student/AR100") == EPOCH_ENDS
        assert steps_of(client, trials[name], "optim.lr") == [0]
