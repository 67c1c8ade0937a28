"""The command line: each verb a thin call into the module that does the work.

Imports of those modules stay inside the verbs, so that `--help` and completion are instant.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mimiclab.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from mimiclab.cluster.state import LocalCluster
    from mimiclab.experiment import LoadedExperiment
    from mimiclab.schema import Experiment

app = typer.Typer(
    help="Train, search and compare object detectors.",
    no_args_is_help=True,
    # A bug shows Python's own traceback.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _set_up_logging(verbose: bool) -> bool:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("mimiclab").setLevel(logging.DEBUG if verbose else logging.INFO)
    return verbose


# What these mean is the same in every verb that takes them.
ExperimentFile = Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="Experiment file (YAML).")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in optim.lr=1e-3; may be repeated."),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", callback=_set_up_logging, help="Say more about what happens.")
]

Address = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Head of a Ray cluster; $RAY_ADDRESS, else this machine."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Remove the run of this name and start anew.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name, MLflow id, folder or URI of a run.")]
Storage = Annotated[str, typer.Option(help="Folder or URI that holds the runs.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"mimiclab {version('mimiclab')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


@app.command()
def show(experiment: ExperimentFile, overrides: Overrides = None, verbose: Verbose = False) -> None:
    """Show every value of an experiment, and where it was written."""
    from rich.console import Console

    from mimiclab.experiment import load_experiment, render

    Console(soft_wrap=True, markup=False).print(render(load_experiment(experiment, overrides or ())), end="")


@app.command()
def train(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    address: Address = None,
    seeds: Annotated[
        int | None,
        typer.Option(metavar="N", help="Train N runs, of its seed and those after it; show means and 95 % intervals."),
    ] = None,
    fresh: Fresh = False,
    verbose: Verbose = False,
) -> None:
    """Train an experiment; the same command goes on where it was."""
    from mimiclab.experiment import load_experiment

    loaded = load_experiment(experiment, overrides or ())
    if seeds is None:
        _train(loaded.experiment, address, fresh, verbose)
    else:
        _train_seeds(loaded, seeds, address, fresh, verbose)


@app.command()
def demo(overrides: Overrides = None, fresh: Fresh = False, verbose: Verbose = False) -> None:
    """Generate scenes, train on them from a random start, and show what was learned."""
    from mimiclab.experiment import load_experiment

    file = _shipped_experiment("scenes.yaml")
    _train(load_experiment(file, overrides or ()).experiment, None, fresh, verbose)


def _shipped_experiment(name: str) -> Path:
    """An experiment of the checkout, or its copy inside of an installed wheel."""
    package = Path(__file__).parent
    copies = (package.parent.parent / "experiments" / name, package / "experiments" / name)
    return next((path for path in copies if path.is_file()), copies[0])


def _train(experiment: Experiment, address: str | None, fresh: bool, verbose: bool) -> None:
    from rich.console import Console

    from mimiclab.summary import show_result
    from mimiclab.train import train

    console = Console(soft_wrap=True, markup=False)
    run = train(experiment, console=console, address=address, fresh=fresh, verbose=verbose)
    show_result(run, experiment, console)


def _train_seeds(loaded: LoadedExperiment, num: int, address: str | None, fresh: bool, verbose: bool) -> None:
    from rich.console import Console

    from mimiclab.seeds import train_seeds

    console = Console(soft_wrap=True, markup=False)
    train_seeds(loaded, num, console=console, address=address, fresh=fresh, verbose=verbose)


@app.command()
def search(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    address: Address = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove the search of this name and start anew.")] = False,
    verbose: Verbose = False,
) -> None:
    """Search the space of an experiment; rank its trials and write the best as an experiment."""
    from rich.console import Console

    from mimiclab.experiment import load_experiment
    from mimiclab.search import driver

    loaded = load_experiment(experiment, overrides or ())
    driver.search(loaded, console=Console(soft_wrap=True, markup=False), address=address, fresh=fresh, verbose=verbose)


@app.command()
def evaluate(run: RunName, storage: Storage = "./runs", verbose: Verbose = False) -> None:
    """Score a run's best weights on its validation set, both heads."""
    from rich.console import Console

    from mimiclab import runs
    from mimiclab.summary import evaluate_run

    evaluate_run(runs.find(run, storage), Console(soft_wrap=True, markup=False))


@app.command()
def predict(
    run: RunName,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files or folders.")],
    save: Annotated[Path, typer.Option(help="Folder for pictures and detections.json.")] = Path("predictions"),
    min_score: Annotated[float, typer.Option(help="Leave out detections below.", min=0, max=1)] = 0.3,
    storage: Storage = "./runs",
    verbose: Verbose = False,
) -> None:
    """Detect objects in images with a run's best weights."""
    from rich.console import Console

    from mimiclab import runs
    from mimiclab.summary import predict_and_show

    predict_and_show(runs.find(run, storage), images, save, min_score, Console(soft_wrap=True, markup=False))


@app.command()
def export(
    run: RunName,
    format: Annotated[Literal["onnx", "torch"], typer.Option(help="ONNX, or torch's exported program (.pt2).")],
    output: Annotated[
        Path | None, typer.Option(help="File to write; in the run's folder, or here if that is remote.")
    ] = None,
    storage: Storage = "./runs",
    verbose: Verbose = False,
) -> None:
    """Write a run's deployed detector, with its best weights, as a file for other programs."""
    from mimiclab import runs
    from mimiclab.export import export

    export(runs.find(run, storage), format, output, typer.echo)


@app.command()
def ui(
    tracking: Annotated[str, typer.Option(help="MLflow's address.")] = "sqlite:///mlflow.db",
    project: Annotated[str, typer.Option(help="MLflow experiment to open.")] = "mimiclab",
    port: Annotated[
        int | None, typer.Option(help="Port; the first free one from 5000 by default.", min=1, max=65535)
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Open MLflow's pages on 127.0.0.1, until Ctrl-C."""
    from mimiclab.tracking.ui import serve

    serve(tracking, port, project)


data_app = typer.Typer(help="Data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.command("import")
def data_import(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of a Pascal VOC or YOLO data set.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="New folder for the annotation files.")],
    format: Annotated[Literal["auto", "voc", "yolo"], typer.Option(help="Format of SRC.")] = "auto",
    images: Annotated[Path | None, typer.Option(help="Folder of the images, if not where the format has it.")] = None,
    classes: Annotated[
        Path | None, typer.Option(help="Class names in order: a line each, or a YAML file with `names`.")
    ] = None,
    difficult: Annotated[
        Literal["keep", "ignore", "drop"],
        typer.Option(help="VOC's difficult objects: objects, regions to ignore, or nothing."),
    ] = "ignore",
    voc_one_based: Annotated[
        bool, typer.Option("--voc-one-based/--voc-zero-based", help="Where VOC's pixels count from.")
    ] = True,
    ignore_exif: Annotated[
        bool, typer.Option("--ignore-exif", help="Boxes are of the pixels as stored, whatever EXIF asks for.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier import.")] = False,
    verbose: Verbose = False,
) -> None:
    """Write COCO annotation files for a VOC or YOLO data set; its images stay where they are."""
    from rich.console import Console

    from mimiclab.data.importing import import_dataset

    import_dataset(
        source,
        target,
        console=Console(soft_wrap=True, markup=False),
        format=format,
        images=images,
        classes=classes,
        difficult=difficult,
        voc_one_based=voc_one_based,
        ignore_exif=ignore_exif,
        overwrite=overwrite,
    )


@data_app.command("view")
def data_view(
    path: Annotated[
        str, typer.Argument(metavar="EXPERIMENT|ANNOTATIONS|PACKED", help="What to show the training images of.")
    ],
    images: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the images of ANNOTATIONS.")] = None,
    num: Annotated[int, typer.Option(help="How many samples.", min=1, max=400)] = 16,
    step: Annotated[int, typer.Option(help="Training step whose samples come first.", min=0)] = 0,
    output: Annotated[Path, typer.Option(help="Picture to write.")] = Path("sheet.png"),
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:
    """Write a contact sheet of training images with boxes, before and after augmentation."""
    from mimiclab.data.view import view

    dataset = view(path, images, num=num, step=step, output=output, overrides=overrides or ())
    typer.echo(f"{output}: {num} samples of {dataset.origin} from step {step}, before and after augmentation")


@data_app.command("scenes")
def data_scenes(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that gets a subfolder for the set.")],
    train: Annotated[int, typer.Option(metavar="N", help="Training images.")] = 400,
    val: Annotated[int, typer.Option(metavar="N", help="Validation images.")] = 80,
    size: Annotated[int, typer.Option(metavar="S", help="Side of an image in pixels.")] = 128,
    seed: Annotated[int, typer.Option(metavar="K", help="The same seed draws the same images.")] = 0,
    verbose: Verbose = False,
) -> None:
    """Draw a synthetic data set in COCO's format."""
    from mimiclab.data.scenes import generate_scenes

    paths = generate_scenes(folder, seed=seed, num_train=train, num_val=val, size=size)
    typer.echo(f"train: {paths.train_annotations}, images in {paths.train_images}")
    typer.echo(f"val: {paths.val_annotations}, images in {paths.val_images}")


submit_app = typer.Typer(help="Run a verb as a job on a cluster, with the code that is here.", no_args_is_help=True)
jobs_app = typer.Typer(help="Jobs that were submitted to a cluster.", no_args_is_help=True)
cluster_app = typer.Typer(help="A cluster on this machine.", no_args_is_help=True)
app.add_typer(submit_app, name="submit")
app.add_typer(jobs_app, name="jobs")
app.add_typer(cluster_app, name="cluster")

JobServer = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="Job server of a Ray cluster; $RAY_API_SERVER_ADDRESS or $RAY_ADDRESS, else that of `cluster up`.",
    ),
]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="Name of a job, as `jobs list` shows it.")]


@submit_app.command("train")
def submit_train(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    address: JobServer = None,
    name: Annotated[str | None, typer.Option(help="Name of the job; the experiment's by default.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove the run of this name and start anew.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show the job's log until it ends.")] = False,
    verbose: Verbose = False,
) -> None:
    """Train an experiment as a job; submitted again, it goes on where it was."""
    from mimiclab.cluster import jobs
    from mimiclab.cluster.server import connect
    from mimiclab.experiment import load_experiment

    loaded = load_experiment(experiment, overrides or ()).experiment
    client = connect(address)
    job = jobs.submit_train(client, loaded, name=name, fresh=fresh, say=typer.echo)
    if follow:
        _follow(client, job)
    else:
        typer.echo(f"its log: mimiclab jobs logs {job} --follow")


@jobs_app.command("list")
def jobs_list(address: JobServer = None, verbose: Verbose = False) -> None:
    """List all jobs of the cluster, the newest first."""
    from mimiclab.cluster import jobs
    from mimiclab.cluster.server import connect

    typer.echo(jobs.table(jobs.list_jobs(connect(address))))


@jobs_app.command("logs")
def jobs_logs(
    job: JobName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    address: JobServer = None,
    verbose: Verbose = False,
) -> None:
    """Show what a job has printed."""
    from mimiclab.cluster import jobs
    from mimiclab.cluster.server import connect

    client = connect(address)
    if follow:
        _follow(client, job)
    else:
        typer.echo(jobs.read_log(client, job), nl=False)


@jobs_app.command("stop")
def jobs_stop(job: JobName, address: JobServer = None, verbose: Verbose = False) -> None:
    """Stop a job; submitted again, it goes on from its run's last checkpoint."""
    from mimiclab.cluster import jobs
    from mimiclab.cluster.server import connect

    ended = jobs.stop(connect(address), job)
    typer.echo(f"job {ended.id} has ended: {ended.status}")


def _follow(client: JobSubmissionClient, job: str) -> None:
    """Show a job's log until it ends, and exit as it did."""
    from mimiclab.cluster import jobs

    try:
        ended = jobs.follow(client, job, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        typer.echo(f"\njob {job} goes on; mimiclab jobs logs {job} --follow shows it, mimiclab jobs stop {job} ends it")
        raise
    if ended.status != "SUCCEEDED":
        typer.echo(f"job {ended.id} has ended: {ended.status}: {ended.message}", err=True)
        raise typer.Exit(1)
    typer.echo(f"job {ended.id} has ended: {ended.status}")


@cluster_app.command("up")
def cluster_up(
    num_cpus: Annotated[
        int | None,
        typer.Option(
            help="CPUs that its head offers; by default as many as the machine has, none with --nodes.", min=0
        ),
    ] = None,
    nodes: Annotated[
        int, typer.Option(metavar="N", help="Nodes beside the head, labelled as spot machines.", min=0)
    ] = 0,
    cpus_per_node: Annotated[
        int, typer.Option(metavar="K", help="CPUs that each of them offers, whatever the machine has.", min=1)
    ] = 1,
    verbose: Verbose = False,
) -> None:
    """Start a cluster on this machine; it runs until `cluster down`."""
    from mimiclab.cluster import local

    _describe(local.up(num_cpus, typer.echo, num_nodes=nodes, cpus_per_node=cpus_per_node))


@cluster_app.command("status")
def cluster_status(verbose: Verbose = False) -> None:
    """Say what runs of the cluster on this machine."""
    from mimiclab.cluster import state

    cluster = state.running()
    if cluster is None:
        typer.echo("no cluster runs on this machine; mimiclab cluster up starts one")
    else:
        _describe(cluster)


@cluster_app.command("down")
def cluster_down(verbose: Verbose = False) -> None:
    """End the cluster on this machine, and its jobs."""
    from mimiclab.cluster import local

    if not local.down(typer.echo):
        typer.echo("no cluster runs on this machine")


@app.command()
def drill(
    experiment: ExperimentFile,
    events: Annotated[
        str | None,
        typer.Option(
            metavar="KIND@STEP,...",
            help="What happens when, as kill-worker@20,kill-node@45,drain@70:20s,add-node@90,kill-driver@95.",
        ),
    ] = None,
    random: Annotated[int | None, typer.Option(metavar="N", help="Draw N events instead.", min=1)] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="Of what is drawn: events, and whom they hit.")] = 0,
    elastic: Annotated[
        bool, typer.Option("--elastic", help="Go on with fewer workers where a node is lost; no node takes its place.")
    ] = False,
    tolerance: Annotated[
        float, typer.Option(help="Largest difference of AP where the number of workers changed.", min=0)
    ] = 0.05,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train the undisturbed run anew, too.")] = False,
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:
    """Train on a cluster of its own, once undisturbed and once losing machines; exit with 1 if it matters."""
    from rich.console import Console

    from mimiclab.drill.drill import drill
    from mimiclab.experiment import load_experiment

    # Its table is wide; without a terminal, rich takes 80 columns for all there are.
    console = Console(soft_wrap=True, markup=False, width=None if sys.stdout.isatty() else 140)
    findings = drill(
        load_experiment(experiment, overrides or ()),
        events=events,
        num_random=random,
        seed=seed,
        elastic=elastic,
        tolerance=tolerance,
        fresh=fresh,
        console=console,
        verbose=verbose,
    )
    if not findings.hold:
        raise typer.Exit(1)


@app.command("spot-watch")
def spot_watch(
    cloud: Annotated[Literal["aws", "gcp", "kubernetes", "auto"], typer.Option(help="Whom to ask.")] = "auto",
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Head of the cluster; $RAY_ADDRESS, else this machine's.")
    ] = None,
    node_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Node of Ray to drain; the one on this machine by default.")
    ] = None,
    interval: Annotated[float, typer.Option(help="Seconds between questions.", min=0.1, max=60)] = 5,
    once: Annotated[bool, typer.Option("--once", help="Ask once and end; as a pod's preStop hook, drain.")] = False,
    grace_seconds: Annotated[
        float, typer.Option(help="Kubernetes: what is left from SIGTERM on, as the pod's grace period says.", min=0)
    ] = 25,
    drain_on_rebalance: Annotated[
        bool, typer.Option("--drain-on-rebalance", help="AWS: drain for a rebalance recommendation too.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Drain this machine's node of Ray when its cloud announces the machine's end; runs until SIGTERM."""
    from datetime import UTC, datetime

    from mimiclab.cluster.drain import RayNode
    from mimiclab.cluster.spot_watch import spot_watch

    if not spot_watch(
        cloud,
        RayNode(address, node_id),
        lambda line: typer.echo(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {line}"),
        interval=interval,
        once=once,
        grace_s=grace_seconds,
        drain_on_rebalance=drain_on_rebalance,
    ):
        raise typer.Exit(1)


@data_app.command("pack")
def data_pack(
    annotations: Annotated[Path, typer.Argument(metavar="SRC", help="COCO's JSON file.")],
    destination: Annotated[
        str, typer.Argument(metavar="DST", help="Folder, or URI as s3://bucket/path?region=eu-west-1.")
    ],
    images: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the images.")],
    address: Address = None,
    workers: Annotated[
        int | None, typer.Option(help="Threads, where no cluster is used; one per CPU by default.", min=1)
    ] = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out images that cannot be decoded, and say so.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Pack images and annotations into Parquet shards; the same command goes on where it was."""
    from rich.console import Console

    from mimiclab.data.packing import pack_files

    pack_files(
        annotations,
        images,
        destination,
        Console(soft_wrap=True, markup=False),
        address=address,
        workers=workers,
        skip_broken=skip_broken,
        verbose=verbose,
    )


@data_app.command("check")
def data_check(
    annotations: Annotated[
        Path | None, typer.Argument(metavar="[ANNOTATIONS]", help="COCO's JSON file; by default --experiment's sets.")
    ] = None,
    images: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of its images.")] = None,
    experiment: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Experiment whose anchors and data are meant.")
    ] = None,
    val: Annotated[
        Path | None, typer.Option(metavar="ANNOTATIONS", help="Validation set, which should share no image.")
    ] = None,
    val_images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of its images; that of --images by default.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="List each finding and every class.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
    verbose: Verbose = False,
) -> None:
    """Read all of a data set and say what is wrong with it; exit with 1 if anything is."""
    import json

    from rich.console import Console

    from mimiclab.data.check import check, choose_sources
    from mimiclab.experiment import load_experiment

    loaded = load_experiment(experiment).experiment if experiment is not None else None
    sources = choose_sources(annotations, images, val, val_images, loaded)
    report = check(sources, Console(stderr=True, soft_wrap=True, markup=False), loaded)
    if as_json:
        typer.echo(json.dumps(report.as_json(), allow_nan=False))
    else:
        report.show(Console(soft_wrap=True, markup=False, highlight=False), every)
    if not report.clean:
        raise typer.Exit(1)


def _describe(cluster: LocalCluster) -> None:
    from mimiclab.cluster import local

    for name, what in local.describe(cluster):
        typer.echo(f"{name + ':':12}{what}")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake is one message and exit code 2, a bug keeps its traceback."""
    try:
        app(args)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
