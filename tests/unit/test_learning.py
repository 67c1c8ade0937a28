"""The detector learns: a few images by heart, both heads together, the student closer to the teacher by mimicking."""

from dataclasses import dataclass

import pytest
import torch

from mimicdet import MimicDet, ModelConfig
from mimicdet.config import (
    AnchorConfig,
    BackboneConfig,
    InferenceConfig,
    MimicConfig,
    PyramidConfig,
    StudentConfig,
    TeacherConfig,
)
from mimiclab.data.coco import CocoDataset, read_coco
from mimiclab.data.dataset import TrainBatches
from mimiclab.data.order import Order
from mimiclab.data.scenes import generate_scenes
from mimiclab.engine import Engine
from mimiclab.evaluate import evaluate
from mimiclab.optim import OptimConfig
from mimiclab.schema import DataConfig, EvalConfig, Resize, Scenes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SIZE, NUM_IMAGES, NUM_STEPS = 96, 4, 500
SHORT = 100  # steps after which mimicking is compared with its control


@dataclass(frozen=True)
class History:
    """Metrics at some steps, and the mean cosine of paired features at every step."""

    metrics: dict[int, dict[str, float]]
    cosine_cls: list[float]
    cosine_reg: list[float]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    paths = generate_scenes(tmp_path_factory.mktemp("scenes"), seed=3, num_train=NUM_IMAGES, num_val=1, size=SIZE)
    return read_coco(paths.train_annotations, paths.train_images)


def learn(dataset: CocoDataset, mimic: MimicConfig, until: int, evaluated: tuple[int, ...]) -> History:
    torch.manual_seed(0)
    config = ModelConfig(
        backbone=BackboneConfig(name="resnet18", width=16),
        pyramid=PyramidConfig(channels=32, max_level=5),
        anchors=AnchorConfig(scale=2),
        student=StudentConfig(head_width=128, offset_channels=(16, 16), offsets="analytic_learned", num_samples=64),
        teacher=TeacherConfig(num_rois=32, num_convs=1, pooled_size=5),
        mimic=mimic,
        inference=InferenceConfig(topk=300),
    )
    detector = MimicDet(config, len(dataset.classes))
    optim = OptimConfig(
        name="adamw",
        lr=2e-3,
        global_batch=NUM_IMAGES,
        epochs=NUM_STEPS,
        schedule="step",
        milestones=(400,),
        warmup_steps=10,
    )
    engine = Engine(detector, optim, num_steps=NUM_STEPS, steps_per_epoch=1)
    order = Order(NUM_IMAGES, NUM_IMAGES, 0)
    batches = TrainBatches(dataset, order, short=SIZE, long=SIZE, flip=0.0, rank=0, world=1)
    data = DataConfig(scenes=Scenes(), resize=Resize(short=SIZE, long=SIZE))
    history = History({}, [], [])
    for step in range(until):
        means = engine.train_step(batches[step])
        history.cosine_cls.append(float(means["cosine_cls"]))
        history.cosine_reg.append(float(means["cosine_reg"]))
        if step + 1 in evaluated:
            evaluation = evaluate(detector, dataset, data, EvalConfig(teacher_topk=300), rank=0, world=1)
            assert evaluation is not None
            history.metrics[step + 1] = evaluation.metrics
    return history


@pytest.fixture(scope="module")
def learned(dataset: CocoDataset) -> History:
    return learn(dataset, MimicConfig(), NUM_STEPS, (20, SHORT, NUM_STEPS))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_a_few_images_are_learned_by_heart(learned: History) -> None:
    assert learned.metrics[NUM_STEPS]["student/AP"] >= 0.9
    assert learned.metrics[NUM_STEPS]["teacher/AP"] >= 0.9


@pytest.mark.parametrize("head", ["student", "teacher"])
def test_both_heads_get_better_together(learned: History, head: str) -> None:
    early, later, last = (learned.metrics[step][f"{head}/AP"] for step in (20, SHORT, NUM_STEPS))
    assert early + 0.2 < later
    assert later + 0.1 < last


def test_the_cosine_of_mimicked_features_rises(learned: History) -> None:
    for cosine in (learned.cosine_cls, learned.cosine_reg):
        assert mean(cosine[:10]) + 0.1 < mean(cosine[-10:])


def test_mimicking_brings_the_student_closer_than_its_control(dataset: CocoDataset, learned: History) -> None:
    """The same run without the mimic losses: else the cosine could rise by itself."""
    control = learn(dataset, MimicConfig(cls_weight=0.0, reg_weight=0.0), SHORT, ())
    window = slice(SHORT - 20, SHORT)
    assert mean(learned.cosine_reg[window]) > mean(control.cosine_reg[window]) + 0.3
    assert mean(learned.cosine_cls[window]) > mean(control.cosine_cls[window]) + 0.02
