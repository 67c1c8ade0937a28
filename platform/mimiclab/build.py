"""A detector from its experiment, with the weights that the experiment starts from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mimicdet import MimicDet, ModelConfig
from mimicdet.interface import Detector
from mimicdet.weights import load_matching
from mimiclab.checkpoint import classes_of
from mimiclab.errors import UserError


def build_detector(config: ModelConfig, classes: Sequence[str], *, pretrained: bool = True) -> Detector:
    """Build the detector for these classes, with the weights that the experiment starts from.

    `pretrained` False reads none of them: a run's own weights are loaded next, and what it started from may be gone.

    Raises:
        UserError: weights cannot be read, or are of another model or other classes.
    """
    try:
        detector = MimicDet(config, len(classes), pretrained=pretrained)
        if config.weights is not None and pretrained:
            _check_classes(Path(config.weights), classes)
            load_matching(detector, config.weights)
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    return detector


def _check_classes(weights: Path, classes: Sequence[str]) -> None:
    trained = classes_of(weights)
    if trained != list(classes):
        raise UserError(
            f"model.weights: {weights} is trained for {len(trained)} classes ({', '.join(trained)}), "
            f"expected the data's {len(classes)} ({', '.join(classes)})"
        )
