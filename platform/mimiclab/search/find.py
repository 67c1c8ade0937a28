"""Searches by what people call them."""

from __future__ import annotations

from pathlib import Path

from mimiclab.errors import UserError
from mimiclab.search.record import RECORD, Record
from mimiclab.storage import MissingError, Storage


def find(reference: str, storage: str = "./runs") -> tuple[Storage, Record]:
    """Find a search by its name, its folder or that one's URI.

    Args:
        reference: any of these.
        storage: folder, or URI, that holds searches and runs.

    Returns:
        Its folder and its record, which is not empty.

    Raises:
        UserError: nothing answers to the reference, or the place cannot be read.
    """
    place = Storage(storage if "://" in storage else Path(storage).absolute())
    places = [Storage(reference if "://" in reference else Path(reference).absolute())]
    if reference and "/" not in reference:
        places.append(place / reference)
    for folder in places:
        record = Record(folder)
        if record.events:
            return folder, record
    shown = storage if place.local is not None else place.name  # without credentials
    raise UserError(f"search {reference}: no such name, folder or URI; searches in {shown}: {_known(place)}")


def _known(place: Storage) -> str:
    try:
        names = [name for name in sorted(place.folders()) if RECORD in (place / name).sizes()]
    except MissingError:  # a file
        names = []
    return ", ".join(names) or "none"
