"""What an experiment file may say: sections, keys, types, defaults and the checks between them.

Frozen pydantic models; a key that is not listed here is an error. The `model:` and `optim:` sections
are the dataclasses that the detector and the engine take, embedded as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PlainValidator,
    PositiveInt,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails

from mimicdet.config import ModelConfig
from mimiclab.optim import OptimConfig
from mimiclab.search.space import check_distribution, with_dotted_keys

Text = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Distribution = Annotated[dict[str, list[Any]], PlainValidator(check_distribution)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Split(_Section):
    """One part of a data set: COCO's format, `annotations` and `images`, or what `mimiclab data pack` made of it."""

    annotations: Text | None = None
    """Path of the JSON file."""
    images: Text | None = None
    """Folder that the file names in it are relative to."""
    packed: Text | None = None
    """Folder or URI of a packed data set."""

    @model_validator(mode="after")
    def _check(self) -> Split:
        given = self.model_dump()
        if self.packed is not None and len(given) > 1:
            raise ValueError(f"either packed, or annotations and images, must be given; found {' and '.join(given)}")
        missing: list[InitErrorDetails] = [
            {"type": "missing", "loc": (name,), "input": given}
            for name in ("annotations", "images")
            if name not in given
        ]
        if self.packed is None and missing:
            raise ValidationError.from_exception_data("Split", missing)
        return self

    @model_serializer
    def _only_given(self) -> dict[str, str]:
        # A null is no value of its own: what a run is does not change when a schema learns a key.
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}


class Scenes(_Section):
    """A synthetic data set of drawn scenes, made when it is first needed."""

    root: Text = "./runs/data"
    """Folder that generated sets are kept in."""
    seed: Seed = 0
    train: PositiveInt = 400
    val: PositiveInt = 80
    """How many images each split holds."""
    size: Annotated[int, Field(ge=32)] = 128
    """Side of an image, in pixels."""


class Resize(_Section):
    """Images keep their aspect: the short side becomes `short` unless the long one would pass `long`."""

    short: PositiveInt = 800
    long: PositiveInt = 1333
    train_short: tuple[PositiveInt, PositiveInt] | None = None
    """Lowest and highest: each training sample draws a `short` of its own from this range. Null is `short` for all."""

    @model_validator(mode="after")
    def _check(self) -> Resize:
        if self.short > self.long:
            raise ValueError(f"short must not be above long, found short {self.short} and long {self.long}")
        if self.train_short and not self.train_short[0] <= self.train_short[1] <= self.long:
            raise ValueError(
                "train_short must be the lowest and the highest short side, neither above long, found train_short "
                f"{list(self.train_short)} and long {self.long}"
            )
        return self


class OrderConfig(_Section):
    """The order of training images; what each option does to it is said at `mimiclab.data.order.Order`."""

    block: PositiveInt | None = None
    """Consecutive images that are shuffled as one; 512, a shard of packed data, where not all fits into the cache."""
    window: PositiveInt = 8
    """Blocks whose images are mixed with each other."""
    group_by_aspect: bool = False
    """Global batches of images that are all taller than wide, or all not: there is less to pad."""
    repeat_threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of images below which a class is rare; images that hold one are repeated. 0.001 for LVIS; null for none."""


class ColorJitter(_Section):
    """How far colours are changed at most; each sample draws evenly from the range. 0 changes nothing."""

    brightness: Annotated[float, Field(ge=0, le=1)] = 0.0
    """By a factor between 1 - brightness and 1 + brightness; contrast and saturation likewise."""
    contrast: Annotated[float, Field(ge=0, le=1)] = 0.0
    saturation: Annotated[float, Field(ge=0, le=1)] = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """In turns of the colour circle, both ways."""


class AugmentConfig(_Section):
    """What is done to a training image besides `data.flip` and `data.resize.train_short`; off by default."""

    color: ColorJitter = ColorJitter()
    crop: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] | None = None
    """Lowest and highest: the share of its width, and apart from it of its height, that is kept before resizing."""
    scale: tuple[Annotated[float, Field(gt=0, le=4)], Annotated[float, Field(gt=0, le=4)]] | None = None
    """Lowest and highest factor of large-scale jitter: the resized image is scaled once more, and where it becomes
    larger a part of the size that it would have had is cut out. [0.1, 2] is usual, with `resize.short` = `long`."""
    mosaic: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that a sample is put together from parts of four images, each scaled to fill its quarter."""
    min_visible: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Objects of which a smaller share of the box is left after cutting are dropped. Crowd regions stay."""

    @model_validator(mode="after")
    def _check(self) -> AugmentConfig:
        for name in ("crop", "scale"):
            bounds = getattr(self, name)
            if bounds and bounds[0] > bounds[1]:
                raise ValueError(f"{name} must be the lowest and the highest value, found {list(bounds)}")
        return self


class DataConfig(_Section):
    """The images: either `train` and `val`, or `scenes`."""

    train: Split | None = None
    val: Split | None = None
    scenes: Scenes | None = None
    resize: Resize = Resize()
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability that a training image is mirrored."""
    augment: AugmentConfig = AugmentConfig()
    order: OrderConfig = OrderConfig()
    loader_processes: NonNegativeInt = 0
    """Processes per worker that read images ahead; 0 reads in the worker itself, ahead with `scale.threads` above 1."""
    cache: Text | None = None
    """Folder of every machine that keeps shards of packed data; null keeps those of a remote store, in ~/.cache."""
    cache_gb: Annotated[float, Field(gt=0)] | None = None
    """Most that it keeps, in GB; null is no bound."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        given = [name for name in ("train", "val", "scenes") if getattr(self, name) is not None]
        if given not in (["train", "val"], ["scenes"]):
            found = " and ".join(given) or "none of them"
            raise ValueError(f"either scenes, or both train and val, must be given; found {found}")
        return self


class EvalConfig(_Section):
    """Evaluation on the validation split during training, and by `evaluate`."""

    every_epochs: PositiveInt = 1
    batch_size: PositiveInt = 8
    """Images per worker and pass."""
    teacher_topk: PositiveInt = 300
    """Proposals per image that the teacher is evaluated on."""
    num_pictures: NonNegativeInt = 8
    """Validation images that are logged with their detections."""


class CheckpointConfig(_Section):
    """How often the state of a run is written, and how much of it is kept."""

    every_steps: PositiveInt = 50
    """Besides the end of every epoch."""
    keep: PositiveInt = 2
    """How many of the newest checkpoints are kept."""


class ScaleConfig(_Section):
    """How large: the speed of a run, not what it computes."""

    workers: PositiveInt = 1
    gpu: bool = False
    """One GPU per worker."""
    threads: PositiveInt = 1
    """CPU threads per worker."""


class WhereConfig(_Section):
    """Where results go."""

    storage: Text = "./runs"
    """Folder, or URI of a bucket, that runs are kept in."""
    tracking: Text = "sqlite:///mlflow.db"
    """MLflow's tracking URI."""
    project: Text = "mimiclab"
    """Name of the MLflow experiment that runs are listed under."""


class SearchConfig(_Section):
    """A search by asynchronous successive halving (ASHA) over some keys of the same file."""

    metric: Text = "student/AP"
    """What trials are compared by; any metric of an evaluation."""
    mode: Literal["max", "min"] = "max"
    trials: PositiveInt = 16
    grace_period: PositiveInt = 1
    """Epochs that every trial is given."""
    reduction_factor: Annotated[int, Field(ge=2)] = 2
    """A trial is compared at grace_period times each power of this; about one in so many goes on."""
    max_concurrent: int | Literal["auto"] = "auto"
    """Trials at a time; auto is as many as the cluster holds."""
    space: dict[str, Distribution]
    """Dotted keys, each with one of `uniform: [low, high]`, `loguniform: [low, high]`, `int: [low, high]` (both
    included) and `choice: [...]`."""

    @field_validator("max_concurrent", mode="plain")
    @classmethod
    def _check_max_concurrent(cls, value: object) -> object:
        # By hand: of a union pydantic reports a mistake for each member.
        if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"found {json.dumps(value)}, expected a whole number above 0, or auto")
        return value

    @field_validator("space", mode="before")
    @classmethod
    def _check_space(cls, space: object) -> object:
        return with_dotted_keys(space)


class Experiment(_Section):
    """A whole experiment file, validated."""

    name: str
    """Of the run; becomes the name of a folder."""
    seed: Seed = 0
    data: DataConfig
    model: ModelConfig = Field(default_factory=ModelConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    scale: ScaleConfig = ScaleConfig()
    where: WhereConfig = WhereConfig()
    search: SearchConfig | None = None

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise ValueError(
                "expected 1 to 100 letters, digits, '.', '_' or '-', the first a letter or a digit (it names "
                f"a folder), found {name!r}"
            )
        return name

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        if self.optim.global_batch < self.scale.workers:
            raise ValueError(
                "every worker needs an image of each step: optim.global_batch must be at least "
                f"scale.workers, found optim.global_batch {self.optim.global_batch} "
                f"and scale.workers {self.scale.workers}"
            )
        if self.model.backbone.norm == "sync_bn" and not self.scale.gpu:
            raise ValueError(
                "model.backbone.norm: sync_bn works on GPUs only, found scale.gpu false; expected scale.gpu true, "
                "or the norm frozen_bn or group_norm"
            )
        if self.model.detector != "mimicdet" and self.optim.precision != "fp32":
            raise ValueError(
                f"optim.precision: {self.optim.precision} with model.detector {self.model.detector}: torchvision would "
                "round boxes to it, several pixels in a large image; expected fp32"
            )
        if self.search and self.search.grace_period > self.optim.epochs:
            raise ValueError(
                "search.grace_period must not be above optim.epochs, found search.grace_period "
                f"{self.search.grace_period} and optim.epochs {self.optim.epochs}"
            )
        return self


PATH_KEYS = (
    "data.train.annotations",
    "data.train.images",
    "data.train.packed",
    "data.val.annotations",
    "data.val.images",
    "data.val.packed",
    "data.cache",
    "data.scenes.root",
    "model.weights",
    "model.backbone.weights",
    "where.storage",
    "where.tracking",
)
"""Keys whose values may hold `$VARIABLES` and a leading `~`."""


def known_keys(section: object = Experiment, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every section and key below `section`."""
    for name, annotation in _keys_of(section).items():
        yield prefix + name
        for option in (annotation, *get_args(annotation)):  # also the sections that may be null
            yield from known_keys(option, f"{prefix}{name}.")


def _keys_of(section: object) -> dict[str, object]:
    if isinstance(section, type) and issubclass(section, BaseModel):
        return {name: field.annotation for name, field in section.model_fields.items()}
    if isinstance(section, type) and is_dataclass(section):
        hints = get_type_hints(section)
        return {field.name: hints[field.name] for field in fields(section)}
    return {}
