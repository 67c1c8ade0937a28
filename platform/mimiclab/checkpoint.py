"""What a checkpoint holds: written aside or in order, verified, and named by a manifest that is written last.

step-00000050/            or step-00000050-notice, made because a machine was announced to go
    weights.safetensors   the detector, with the class names in its header
    state.pt              optimizer and step; tensors and plain values only
    meta.json             everything that is not a tensor
    manifest.json         SHA-256 of the three files above; a folder without it is not a checkpoint
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from torch import Tensor

from mimiclab.errors import UserError
from mimiclab.storage import MissingError, Place, Storage, storage_at

WEIGHTS, STATE, META, MANIFEST = "weights.safetensors", "state.pt", "meta.json", "manifest.json"
_NOTICE = "-notice"
_NAME = re.compile(rf"step-(\d{{8,}})({_NOTICE})?")
_ASIDE = ".step-"


class DamagedError(UserError):
    """A checkpoint is not what its manifest says, or has none; the message names it and the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder, what its meta.json says, and its files' checksums."""

    storage: Storage
    meta: dict[str, Any]
    hashes: Mapping[str, str]

    @property
    def step(self) -> int:
        """Number of training steps done."""
        return int(self.meta["step"])

    @property
    def name(self) -> str:
        """What messages call it: its path, or its URI without credentials."""
        return self.storage.name

    @property
    def path(self) -> Path:
        """Its folder on a local disk.

        Raises:
            UserError: It lies elsewhere; see `write_weights`.
        """
        if self.storage.local is None:
            raise UserError(f"checkpoint {self.name}: it lies on no local disk, expected one that does")
        return self.storage.local

    def weights(self) -> dict[str, Tensor]:
        """The detector's state, on the CPU.

        Raises:
            DamagedError: The file is not what the manifest says.
            UserError: It cannot be read.
        """
        weights: dict[str, Tensor] = safetensors.load(self._read(WEIGHTS))
        return weights

    def state(self) -> dict[str, Any]:
        """The engine's state, on the CPU; loading it runs no code.

        Raises:
            DamagedError: The file is not what the manifest says.
            UserError: It cannot be read.
        """
        content = io.BytesIO(self._read(STATE))
        state: dict[str, Any] = torch.load(content, map_location="cpu", weights_only=True)
        return state

    def write_weights(self, path: Path) -> None:
        """Copy the file of weights to a local disk, its folder made when missing.

        Raises:
            DamagedError: The file is not what the manifest says.
            UserError: It cannot be read, or the copy not written.
        """
        Storage(path.parent).write(path.name, self._read(WEIGHTS))

    def _read(self, name: str) -> bytes:
        return _verified(self.storage, name, self.hashes)


def save(
    folder: Place,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any],
    meta: Mapping[str, Any],
    *,
    notice: bool = False,
) -> Checkpoint:
    """Write a checkpoint for `meta["step"]`; one of its step and kind is replaced.

    Args:
        folder: Holds the run's checkpoints; made when missing.
        weights: Of the detector, on any device.
        state: Of the engine; tensors on any device, and plain values.
        meta: What JSON can hold; "step" and "classes" at least.
        notice: Whether a machine was announced to go.

    Raises:
        UserError: It cannot be written; the message names the place.
    """
    root, name = storage_at(folder), _name(int(meta["step"]), notice=notice)
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    files = {
        WEIGHTS: safetensors.save(contiguous, metadata={"classes": json.dumps(meta["classes"])}),
        STATE: buffer.getvalue(),
        META: json.dumps(meta, indent=1).encode(),
    }
    hashes = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
    root.write_folder(name, {**files, MANIFEST: json.dumps(hashes, indent=1).encode()})
    return Checkpoint(root / name, dict(meta), hashes)


def latest(folder: Place, warn: Callable[[str], None], *, deep: bool = True) -> Checkpoint | None:
    """The newest checkpoint that verifies; damaged ones are named to `warn` and skipped for the one before.

    Args:
        folder: Holds the run's checkpoints.
        warn: Gets a line for each damaged one.
        deep: False reads manifest and meta.json only; weights and state are verified anyway when they are read.

    Raises:
        UserError: The place cannot be read: whether there is a checkpoint is not known then.
    """
    root = storage_at(folder)
    damaged: set[str] = set()
    # Listed anew after each: a run at work may have removed it for a newer one.
    while left := [name for name in _names(root) if name not in damaged]:
        try:
            return load(root / left[-1], deep=deep)
        except DamagedError as error:
            warn(f"{error}; going back to the checkpoint before it")
            damaged.add(left[-1])
    return None


def load(place: Place, *, deep: bool = True) -> Checkpoint:
    """Verify a checkpoint against its manifest.

    Args:
        place: Folder of the checkpoint.
        deep: False leaves weights and state for when they are read.

    Raises:
        DamagedError: A file is missing or differs from the manifest.
        UserError: A file cannot be read.
    """
    storage = storage_at(place)
    try:
        hashes = json.loads(storage.read(MANIFEST))
        if not (isinstance(hashes, dict) and hashes.keys() >= {WEIGHTS, STATE, META}):
            raise ValueError("files are missing in it")
    except MissingError as error:
        raise DamagedError(f"checkpoint {storage.name}: {MANIFEST} is missing, it was never whole") from error
    except ValueError as error:  # neither JSON nor text, too
        raise DamagedError(f"checkpoint {storage.name}: {MANIFEST} is damaged ({error})") from error
    meta = json.loads(_verified(storage, META, hashes))
    for name in (WEIGHTS, STATE) if deep else ():
        try:
            found = storage.sha256(name)
        except MissingError as error:
            raise _missing(storage, name) from error
        _compare(storage, name, found, hashes)
    return Checkpoint(storage, meta, hashes)


def find(folder: Place, step: int, *, deep: bool = True) -> Checkpoint | None:
    """The checkpoint of a step, of either kind, None where there is none; see `load` for errors."""
    root = storage_at(folder)
    names = [name for name in _names(root) if _step(name) == step]
    return load(root / names[-1], deep=deep) if names else None


def prune(folder: Place, *, newest: int, keep: int, steps: Sequence[int]) -> None:
    """Remove old checkpoints.

    Kept are the last `keep` ones up to step `newest`, as many of those that a notice asked for, those of the given
    steps, and later ones. A later one is damaged, since the run did not go on from it: it must not count as one of
    those kept. Folders without a manifest are none to keep.

    Raises:
        UserError: One cannot be removed; the message names it.
    """
    root = storage_at(folder)
    done = [name for name in _names(root) if _step(name) <= newest]
    whole = [name for name in done if MANIFEST in (root / name).sizes()]
    kept = {name for name in whole if _step(name) in steps}
    for notice in (False, True):
        kept.update([name for name in whole if name.endswith(_NOTICE) == notice][-keep:])
    for name in done:
        if name not in kept:
            (root / name).delete(MANIFEST)  # first: what is removed in part is no checkpoint
            root.delete_folder(name)
    for name in root.folders():
        if name.startswith(_ASIDE):  # what a killed process left half-written
            root.delete_folder(name)


def classes_of(weights: Path) -> list[str]:
    """Class names that a weights file was trained for.

    Raises:
        UserError: the file is missing, no safetensors file, or none that a run wrote.
    """
    try:
        with safe_open(str(weights), framework="pt") as file:
            header = file.metadata() or {}
        names: list[str] = json.loads(header["classes"])
    except (OSError, SafetensorError) as error:
        raise UserError(f"weights {weights}: cannot be read as a safetensors file: {error}") from error
    except (KeyError, ValueError) as error:
        raise UserError(f"weights {weights}: no class names in its header, expected the {WEIGHTS} of a run") from error
    return names


def _name(step: int, *, notice: bool) -> str:
    return f"step-{step:08d}{_NOTICE if notice else ''}"


def _step(name: str) -> int:
    return int(name.removesuffix(_NOTICE).removeprefix("step-"))


def _names(root: Storage) -> list[str]:
    """Folders that are named as checkpoints, by step; at the same step what no notice asked for comes last."""
    found = [name for name in root.folders() if _NAME.fullmatch(name)]
    return sorted(found, key=lambda name: (_step(name), not name.endswith(_NOTICE)))


def _verified(storage: Storage, name: str, hashes: Mapping[str, str]) -> bytes:
    """A file's content; what is decoded are the very bytes that were verified."""
    try:
        content = storage.read(name)
    except MissingError as error:
        raise _missing(storage, name) from error
    _compare(storage, name, hashlib.sha256(content).hexdigest(), hashes)
    return content


def _compare(storage: Storage, name: str, found: str, hashes: Mapping[str, str]) -> None:
    if found != hashes[name]:
        raise DamagedError(f"checkpoint {storage.name}: {name} differs from its manifest, it is damaged")


def _missing(storage: Storage, name: str) -> DamagedError:
    return DamagedError(f"checkpoint {storage.name}: {name} is missing, it is damaged")
