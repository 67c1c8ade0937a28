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
from mimiclab.search.metric import check_metric
from mimiclab.search.space import check_distribution, grid, mistakes_between, with_dotted_keys

Text = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Distribution = Annotated[dict[str, Any], PlainValidator(check_distribution)]
Scorer = Literal["pycocotools", "faster-coco-eval"]
Metric = Annotated[str | dict[str, float], PlainValidator(check_metric)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _count_or(word: str, value: object) -> object:
    if value != word and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"found {json.dumps(value)}, expected a whole number above 0, or {word}")
    return value


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
    metric: Text = "student/AP"
    """What the best weights are best by; any metric of an evaluation."""
    mode: Literal["max", "min"] = "max"
    scorer: Scorer = "pycocotools"
    """What computes AP and AR from detections; faster-coco-eval, an extra, gives the same numbers in less time."""
    patience: PositiveInt | None = None
    """Evaluations in a row without a better value after which training ends; null for never."""


class CheckpointConfig(_Section):
    """How often the state of a run is written, and how much of it is kept."""

    every_steps: PositiveInt | Literal["auto"] = 50
    """Most steps that a kill costs: a checkpoint is begun early enough to be whole by then, and at the end of an epoch.
    auto weighs a checkpoint's cost, as measured, against `scale.mtbf_minutes`."""
    keep: PositiveInt = 2
    """How many of the newest checkpoints are kept, besides the best one; as many that a notice made."""

    @field_validator("every_steps", mode="plain")
    @classmethod
    def _check_every_steps(cls, value: object) -> object:
        # By hand: of a union pydantic reports a mistake for each member.
        return _count_or("auto", value)


class Workers(_Section):
    """How many workers: as many as there is room for, from `min` to `max`. In a file also a single number."""

    min: PositiveInt
    max: PositiveInt

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: object) -> object:
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return {"min": value, "max": value}
        if not isinstance(value, dict | Workers):
            raise ValueError(
                f"found {json.dumps(value)}, expected a whole number above 0, or both as in {{min: 1, max: 8}}"
            )
        return value

    @model_validator(mode="after")
    def _check(self) -> Workers:
        if self.min > self.max:
            raise ValueError(f"min must not be above max, found min {self.min} and max {self.max}")
        return self

    @model_serializer
    def _as_written(self) -> int | dict[str, int]:
        return self.max if self.min == self.max else {"min": self.min, "max": self.max}

    def __str__(self) -> str:
        return str(self.max) if self.min == self.max else f"{self.min} to {self.max}"


class ScaleConfig(_Section):
    """How large: the speed of a run, not what it computes."""

    workers: Workers = Workers(min=1, max=1)
    """A range lets a run go on with fewer while machines are gone, and grow when they come."""
    gpu: bool = False
    """One GPU per worker."""
    threads: PositiveInt = 1
    """CPU threads per worker."""
    micro_batch: PositiveInt | None = None
    """Most images that a worker computes at once; of more, gradients are added up. Null: all that it has of a step."""
    label_selector: dict[Text, Text] = {}
    """Labels of the nodes that workers may run on, as `ray.io/market-type: spot`."""
    accelerator_type: Text | None = None
    """Ray's name of a GPU, as A10G; null for any."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How workers are spread over nodes: few of them or many, as far as it goes or strictly."""
    collective_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """How long workers wait for each other within a step before they take one for lost."""
    mtbf_minutes: Annotated[float, Field(gt=0)] | None = None
    """Mean time between preemptions of any of the run's machines, as expected; for `checkpoint.every_steps: auto`."""
    max_crashes: NonNegativeInt = 3
    """Crashes in a row, without a new checkpoint between them, after which a run gives up at the next one."""
    max_preemptions: NonNegativeInt | None = None
    """Machines that may be taken from a run before it gives up; null for any number."""


class WhereConfig(_Section):
    """Where results go."""

    storage: Text = "./runs"
    """Folder, or URI of a bucket, that runs are kept in."""
    tracking: Text = "sqlite:///mlflow.db"
    """MLflow's tracking URI."""
    project: Text = "mimiclab"
    """Name of the MLflow experiment that runs are listed under."""
    system_metrics_s: Annotated[float, Field(gt=0)] | None = 10.0
    """Seconds between samples of how busy each machine is: CPU, memory, disk, network, GPUs; null for none."""

    @field_validator("storage")
    @classmethod
    def _check_storage(cls, storage: str) -> str:
        if "://" in storage and "@" in storage.split("://", 1)[1].split("/", 1)[0]:
            raise ValueError(
                "found credentials in the URI, which goes into every record of a run; expected them where the store's "
                "own tools look, as in the environment"
            )
        return storage


class SearchConfig(_Section):
    """A search by asynchronous successive halving (ASHA) over some keys of the same file."""

    metric: Metric = "student/AP"
    """What trials are compared by: any metric of an evaluation, or a sum of several with weights, as in
    {student/AP: 1, student/latency_ms: -0.002}."""
    mode: Literal["max", "min"] = "max"
    algorithm: Literal["random", "grid", "optuna"] = "random"
    """grid tries every combination of a space of choices, the last key's values in turn first; optuna, an extra,
    proposes each trial from the results so far, by its tree-structured Parzen estimator."""
    trials: PositiveInt | None = None
    """Null is 16, or all of a grid; fewer are the first ones of it. More may be added to a search that was run."""
    seeds_per_trial: Annotated[int, Field(ge=1, le=100)] = 1
    """Trials that are not pruned are trained again with the seeds that follow, to so many, and rank by the mean."""
    budget: Annotated[float, Field(gt=0)] | None = None
    """GPU-hours, or core-hours where trials use no GPU, after which no trial goes on; null for any amount. It may be
    raised for a search that was run."""
    unit: Literal["epochs", "steps"] = "epochs"
    """What max_t and grace_period count. A trial's results come at its evaluations all the same."""
    max_t: PositiveInt | None = None
    """How long a trial is that is not pruned, its schedule included: it ends with the first epoch that reaches this;
    null is optim.epochs."""
    grace_period: PositiveInt = 1
    """How long every trial is at least."""
    reduction_factor: Annotated[int, Field(ge=2)] = 2
    """The rungs are at grace_period times each power of this. From one to the next a trial is compared at each of its
    results with all who have come there; about one in so many goes on."""
    max_concurrent: int | Literal["auto"] = "auto"
    """Trials at a time; auto is as many as the cluster holds."""
    workers_per_trial: PositiveInt | None = None
    """Workers of each trial; null is scale.workers."""
    space: dict[str, Distribution]
    """Dotted keys, each with one of `uniform: [low, high]`, `loguniform: [low, high]`, `normal: [mean, sd]` (within
    three sd), `int: [low, high]` (both included) and `choice: [...]`. With `when: {other.key: [values]}` a key is
    searched only in trials where that one has one of those values."""

    @field_validator("max_concurrent", mode="plain")
    @classmethod
    def _check_max_concurrent(cls, value: object) -> object:
        return _count_or("auto", value)

    @field_validator("space", mode="before")
    @classmethod
    def _check_space(cls, space: object) -> object:
        return with_dotted_keys(space)

    @model_validator(mode="after")
    def _check(self) -> SearchConfig:
        found: list[tuple[tuple[str, ...], str]]
        found = [(("space", key), text) for key, text in mistakes_between(self.space, self.algorithm)]
        if not found and self.algorithm == "grid" and self.trials is not None:
            size = len(grid(self.space))
            if self.trials > size:
                found = [(("trials",), f"found {self.trials}, the grid has {size}; expected {size} or fewer, or null")]
        if found:
            raise ValidationError.from_exception_data(
                "SearchConfig",
                [
                    {"type": "value_error", "loc": loc, "input": None, "ctx": {"error": ValueError(text)}}
                    for loc, text in found
                ],
            )
        return self

    def check_against(self, epochs: int, global_batch: int) -> None:
        """Make sure that trials are no longer than `optim.epochs`, reach their first rung, and feed their workers.

        Of what is counted in steps, only the data can tell how many an epoch has.

        Raises:
            ValueError: they do not.
        """
        if self.unit == "epochs" and self.max_t is not None and self.max_t > epochs:
            raise ValueError(
                "search.max_t must not be above optim.epochs, found search.max_t "
                f"{self.max_t} and optim.epochs {epochs}"
            )
        name, most = ("search.max_t", self.max_t)
        if most is None and self.unit == "epochs":
            name, most = "optim.epochs", epochs
        if most is not None and self.grace_period > most:
            raise ValueError(
                f"search.grace_period must not be above {name}, found search.grace_period "
                f"{self.grace_period} and {name} {most}"
            )
        if self.workers_per_trial is not None and self.workers_per_trial > global_batch:
            raise ValueError(
                "every worker needs an image of each step: optim.global_batch must be at least "
                f"search.workers_per_trial, found optim.global_batch {global_batch} and search.workers_per_trial "
                f"{self.workers_per_trial}"
            )


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
        if self.optim.global_batch < self.scale.workers.max:
            raise ValueError(
                "every worker needs an image of each step: optim.global_batch must be at least "
                f"scale.workers, found optim.global_batch {self.optim.global_batch} "
                f"and scale.workers {self.scale.workers.max}"
            )
        if self.checkpoint.every_steps == "auto" and self.scale.mtbf_minutes is None:
            raise ValueError(
                "checkpoint.every_steps: auto weighs the cost of a checkpoint against how often machines go: "
                "expected scale.mtbf_minutes, or a number of steps"
            )
        if self.model.backbone.norm == "sync_bn" and self.scale.micro_batch is not None:
            raise ValueError(
                "scale.micro_batch: with model.backbone.norm sync_bn every worker has to compute all of its images "
                "at once; expected scale.micro_batch null, or the norm frozen_bn or group_norm"
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
        if self.search:
            self.search.check_against(self.optim.epochs, self.optim.global_batch)
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
