"""Data sets: import, look at, check and pack them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mimiclab.verbs.options import Address, Overrides, Verbose

app = typer.Typer(help="Data sets.", no_args_is_help=True)


@app.command("import")
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


@app.command("view")
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


@app.command("scenes")
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


@app.command("pack")
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


@app.command("check")
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
