"""Check data sets before they are trained on: entries, boxes, image files, and what two sets share."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from mimiclab.data.findings import Finding, Kind, name_some
from mimiclab.data.flaws import find_flaws
from mimiclab.data.listing import Listing, read_listing
from mimiclab.data.probe import ImageFacts, image_files, probe_images
from mimiclab.data.report import Report, SetReport
from mimiclab.data.watch import watch
from mimiclab.errors import UserError

if TYPE_CHECKING:
    from mimiclab.schema import Experiment, Split

_ROW_KINDS = (
    (Kind.IMAGE_ONE_CHANNEL, "one_channel", "has one channel; training repeats it to three"),
    (Kind.IMAGE_CMYK, "cmyk", "is CMYK; training takes it to RGB without its colour profile"),
    (Kind.IMAGE_ALPHA, "alpha", "has transparency; training drops it and sees what is underneath"),
    (Kind.IMAGE_DEEP, "deep", "has more than 8 bits a channel; training cuts them off, or clips at 255"),
)


@dataclass(frozen=True)
class Source:
    """An annotation file and the folder of its images; without a folder no image is read."""

    annotations: Path
    images: Path | None = None


def choose_sources(
    annotations: Path | None,
    images: Path | None,
    val: Path | None,
    val_images: Path | None,
    experiment: Experiment | None,
) -> list[Source]:
    """What to check: the files that were named, and from the experiment what was not.

    Without an annotation file it is both sets of the experiment. With the experiment's own training set, its folder
    and its validation set are taken where no other is named.

    Args:
        annotations: The training set.
        images: The folder of its images.
        val: The validation set.
        val_images: The folder of its images; that of the training set where there is none.
        experiment: May name both sets.

    Raises:
        UserError: Neither a file nor an experiment was given, a folder has no file, or both files are the same.
    """
    if annotations is None and experiment is None:
        raise UserError("nothing to check: expected an annotation file, or --experiment with one that names its data")
    for option, folder, file in (("--images", images, annotations), ("--val-images", val_images, val)):
        if folder is not None and file is None:
            raise UserError(f"{option} {folder}: expected the annotation file that lists its images, found none")
    own = _own_sources(experiment, annotations) if experiment is not None else None
    train = Source(annotations, images) if annotations is not None else None
    if own is not None and (train is None or train.images is None):
        train = own[0]
    assert train is not None
    if val is not None:
        validation = Source(val, val_images or train.images)
    elif own is not None:
        validation = own[1]
    else:
        return [train]
    if validation.annotations.resolve() == train.annotations.resolve():
        raise UserError(f"{validation.annotations}: it is training and validation set at once, expected two files")
    return [train, validation]


def _own_sources(experiment: Experiment, annotations: Path | None) -> tuple[Source, Source] | None:
    """Training and validation set of an experiment; None where `annotations` is another training set."""
    from mimiclab.data.splits import locate

    data = experiment.data
    own = data.train.annotations if data.train is not None else None
    if annotations is not None and (own is None or Path(own).resolve() != annotations.resolve()):
        return None
    located = locate(data)
    return _source("train", located.train), _source("val", located.val)


def _source(key: str, split: Split | None) -> Source:
    if split is None or split.annotations is None or split.images is None:
        raise UserError(f"data.{key}: packed data was read and decoded as it was packed; expected an annotation file")
    return Source(Path(split.annotations), Path(split.images))


def check(sources: Sequence[Source], console: Console, experiment: Experiment | None = None) -> Report:
    """Read all of one set, or of a training and a validation set.

    Memory is that of parsing one annotation file at a time, the columns of all, and an image for each thread.

    Args:
        sources: The training set, and the validation set where there is one.
        console: Where progress is shown.
        experiment: Whose smallest anchor boxes are measured against.

    Raises:
        UserError: A file or folder cannot be read as such.
    """
    from mimiclab.data.measures import measure, reach

    anchors = reach(experiment) if experiment is not None else None
    for source in sources:
        if source.images is not None and not source.images.is_dir():
            raise UserError(f"{source.images}: no such folder of images (for {source.annotations})")
    findings: list[Finding] = []
    listings, sets = [], []
    for source in sources:
        with watch(console, f"reading {source.annotations}"):
            listing = read_listing(source.annotations)
            flaws, objects = find_flaws(listing)
        findings += [*listing.findings, *flaws]
        listings.append(listing)
        sets.append(SetReport.of(listing, source.images, measure(listing, objects, anchors)))
    if len(listings) == 2:
        findings += _differing_classes(*listings)

    facts = [_probe(listing, source.images, console) for listing, source in zip(listings, sources, strict=True)]
    for listing, source, found in zip(listings, sources, facts, strict=True):
        if source.images is not None:
            findings += _image_findings(listing, source.images, found)
            findings += _same_content(listing, source.images, found)
    findings += _unlisted(listings, sources)
    if len(sources) == 2:
        findings += _leaks(listings, facts)
    return Report(tuple(sets), anchors, findings)


_Facts = dict[str, ImageFacts]


def _probe(listing: Listing, folder: Path | None, console: Console) -> _Facts:
    """What every listed file is, each once."""
    if folder is None:
        return {}
    names = list(dict.fromkeys(name for name in listing.file_names if name is not None))
    with watch(console, f"decoding the images of {listing.path.name}", len(names)) as advance:
        return dict(zip(names, probe_images([folder / name for name in names], advance), strict=True))


def _image_findings(listing: Listing, folder: Path, facts: _Facts) -> Iterator[Finding]:
    told = set()
    for row, (name, size) in enumerate(zip(listing.file_names, listing.image_sizes.tolist(), strict=True)):
        if name is None:
            continue
        found, path, image_id = facts[name], folder / name, int(listing.image_ids[row])

        def finding(kind: Kind, what: str, path: Path = path, image_id: int = image_id, name: str = name) -> Finding:
            return Finding(kind, str(listing.path), f"{path}: {what}", image_id=image_id, file_name=name)

        # A stored size of NaN was found before.
        known = not any(map(math.isnan, size))
        if found.problem is None and found.digest is not None and known and size != list(found.size):
            width, height = found.size
            turned = found.orientation >= 5 and size == [height, width]
            what = f"the image is {width} x {height}, its annotation file says {size[0]:g} x {size[1]:g}"
            yield finding(Kind.IMAGE_SIZE, what + (", as EXIF's orientation turns it" if turned else ""))
        if name in told:
            continue
        told.add(name)
        if found.problem is not None:
            yield finding(Kind.IMAGE_UNREADABLE, f"cannot be read as an image: {found.problem}")
        elif found.digest is None:
            yield finding(Kind.IMAGE_MISSING, "there is no such file")
        if found.orientation != 1:
            what = f"EXIF's orientation is {found.orientation}; training reads the pixels as they are stored"
            yield finding(Kind.IMAGE_ROTATED, what)
        for kind, attribute, what in _ROW_KINDS:
            if getattr(found, attribute):
                yield finding(kind, what)


def _same_content(listing: Listing, folder: Path, facts: _Facts) -> Iterator[Finding]:
    image_ids = _first_image_ids(listing)
    for names in _by_content(facts).values():
        if len(names) > 1:
            message = f"{folder}: {name_some(names)} hold the same bytes"
            yield Finding(
                Kind.DUPLICATE_IMAGE, str(listing.path), message, image_id=image_ids[names[0]], file_name=names[0]
            )


def _first_image_ids(listing: Listing) -> dict[str | None, int]:
    """The id that each name is first listed with."""
    rows = zip(reversed(listing.file_names), reversed(listing.image_ids.tolist()), strict=True)
    return dict(rows)


def _by_content(facts: _Facts) -> dict[bytes, list[str]]:
    """The names of the files that can be read, by their content."""
    names: dict[bytes, list[str]] = {}
    for name, found in facts.items():
        if found.digest is not None and found.problem is None:
            names.setdefault(found.digest, []).append(name)
    return names


def _unlisted(listings: Sequence[Listing], sources: Sequence[Source]) -> Iterator[Finding]:
    # By absolute paths: two sets may share a folder, or one's may be inside of the other's.
    folders = [
        (listing, source.images, source.images.resolve())
        for listing, source in zip(listings, sources, strict=True)
        if source.images is not None
    ]
    known = {
        os.path.normpath(folder / name)
        for listing, _, folder in folders
        for name in listing.file_names
        if name is not None
    }
    for listing, images, folder in folders:
        for name in image_files(images):
            path = os.path.normpath(folder / name)
            if path not in known:
                known.add(path)
                message = f"{images / name}: no annotation file lists it"
                yield Finding(Kind.IMAGE_UNLISTED, str(listing.path), message, file_name=name)


def _leaks(listings: Sequence[Listing], facts: Sequence[_Facts]) -> Iterator[Finding]:
    train, val = (_by_content(each) for each in facts)
    image_ids = _first_image_ids(listings[1])
    for digest, names in val.items():
        for name in names if digest in train else ():
            message = (
                f"{listings[1].path}: {name} holds the same bytes as {name_some(train[digest])} of the training set"
            )
            yield Finding(Kind.LEAK, str(listings[1].path), message, image_id=image_ids[name], file_name=name)


def _differing_classes(train: Listing, val: Listing) -> Iterator[Finding]:
    # As training orders them: by id.
    classes = [
        [listing.category_names[row] for row in np.argsort(listing.category_ids, kind="stable").tolist()]
        for listing in (train, val)
    ]
    if classes[0] != classes[1]:
        message = f"has the classes {classes[1]}, expected those of {train.path}: {classes[0]}"
        yield Finding(Kind.CLASSES_DIFFER, str(val.path), f"{val.path}: {message}")
