"""What a checkpoint holds: written aside, verified, and named by a manifest that is written last.

step-00000050/
    weights.safetensors   the detector, with the class names in its header
    state.pt              optimizer and step; tensors and plain values only
    meta.json             everything that is not a tensor
    manifest.json         SHA-256 of the three files above; a folder without it is not a checkpoint
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mimiclab.errors import UserError

WEIGHTS, STATE, META, MANIFEST = "weights.safetensors", "state.pt", "meta.json", "manifest.json"
_PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder and what its meta.json says."""

    path: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Number of training steps done."""
        return int(self.meta["step"])

    def weights(self) -> dict[str, Tensor]:
        """The detector's state, on the CPU."""
        weights: dict[str, Tensor] = load_file(str(self.path / WEIGHTS))
        return weights

    def state(self) -> dict[str, Any]:
        """The engine's state, on the CPU; loading it runs no code."""
        state: dict[str, Any] = torch.load(self.path / STATE, map_location="cpu", weights_only=True)
        return state


def save(folder: Path, weights: Mapping[str, Tensor], state: Mapping[str, Any], meta: Mapping[str, Any]) -> Checkpoint:
    """Write a checkpoint for `meta["step"]`; until it is whole it has no name of its own."""
    target = folder / _name(meta["step"])
    aside = folder / f".{target.name}-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(contiguous, str(aside / WEIGHTS), metadata={"classes": json.dumps(meta["classes"])})
        torch.save(dict(state), aside / STATE)
        (aside / META).write_text(json.dumps(meta, indent=1))
        hashes = {name: _sha256(aside / name) for name in (WEIGHTS, STATE, META)}
        (aside / MANIFEST).write_text(json.dumps(hashes, indent=1))
        for path in (*aside.iterdir(), aside):
            _sync(path)
        if target.exists():  # the same step, trained again after a restart
            shutil.rmtree(target)
        aside.rename(target)
        _sync(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Checkpoint(target, dict(meta))


def latest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies; damaged ones are named to `warn` and skipped for the one before."""
    for path in sorted(_folders(folder), reverse=True):
        try:
            return load(path)
        except UserError as error:
            warn(f"{error}; going back to the checkpoint before it")
    return None


def load(path: Path) -> Checkpoint:
    """Verify a checkpoint against its manifest.

    Raises:
        UserError: a file is missing, unreadable or differs from the manifest; the message names it.
    """
    try:
        hashes = json.loads((path / MANIFEST).read_text())
        for name in (WEIGHTS, STATE, META):
            if _sha256(path / name) != hashes[name]:
                raise UserError(f"checkpoint {path}: {name} differs from its manifest, it is damaged")
        return Checkpoint(path, json.loads((path / META).read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {path}: cannot be read ({error})") from error


def prune(folder: Path, *, newest: int, keep: int, steps: Sequence[int]) -> None:
    """Remove all but the last `keep` checkpoints up to step `newest`, those of the given steps, and later ones.

    A later one is damaged, since the run did not go on from it: it must not count as one of those kept.
    """
    names = {_name(step) for step in steps}
    for path in sorted(path for path in _folders(folder) if path.name <= _name(newest))[:-keep]:
        if path.name not in names:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f".{_PREFIX}*"):  # what a killed process left half-written
        shutil.rmtree(path, ignore_errors=True)


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


def _name(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def _folders(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob(f"{_PREFIX}*") if path.is_dir())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
