"""Batches are a function of the step: not of the workers, the loader, or what came before."""

import gc
import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from mimiclab.data.coco import CocoDataset, read_coco
from mimiclab.data.dataset import EvalBatches, TrainBatches, check_images, read_image, scale_boxes, training_batches
from mimiclab.data.order import Order, rank_slice, sample_key
from mimiclab.data.transforms import draw_short, padded_size, resized_size
from mimiclab.engine import Batch
from mimiclab.errors import UserError
from mimiclab.optim import OptimConfig
from mimiclab.schema import AugmentConfig, ColorJitter, DataConfig, Experiment, OrderConfig, Resize, Scenes

SIZES = [(64, 48), (40, 80), (96, 33), (50, 50), (31, 70), (120, 40), (48, 64)]
GLOBAL_BATCH = 4
NUM_STEPS = 5


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    """Seven images of mixed sizes, number i with i objects."""
    root = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i, (width, height) in enumerate(SIZES):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
        images.append({"id": 10 + i, "file_name": f"{i}.png", "width": width, "height": height})
        for j in range(i):
            box = [j, 2 * j, 5 + j, 6]
            annotations.append({"id": len(annotations), "image_id": 10 + i, "category_id": 1, "bbox": box})
    path = root / "instances.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]})
    )
    return read_coco(path, root)


def train_batches(
    dataset: CocoDataset, rank: int = 0, world: int = 1, short: int | tuple[int, int] = 48
) -> TrainBatches:
    order = Order(len(dataset.images), GLOBAL_BATCH, seed=3)
    return TrainBatches(dataset, order, short=short, long=64, flip=0.5, rank=rank, world=world)


EVERYTHING = DataConfig(
    scenes=Scenes(),
    resize=Resize(short=48, long=64, train_short=(20, 60)),
    augment=AugmentConfig(
        color=ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
        crop=(0.3, 1),
        scale=(0.3, 2),
        mosaic=0.5,
    ),
    order=OrderConfig(block=2, window=2, group_by_aspect=True, repeat_threshold=1),
)
OPTIONS = {
    "everything": EVERYTHING,
    "no mosaic": EVERYTHING.model_copy(update={"augment": EVERYTHING.augment.model_copy(update={"mosaic": 0.0})}),
    "order alone": EVERYTHING.model_copy(update={"augment": AugmentConfig()}),
}


def optional_batches(dataset: CocoDataset, data: DataConfig, rank: int = 0, world: int = 1) -> TrainBatches:
    experiment = Experiment(name="x", seed=3, data=data, optim=OptimConfig(global_batch=GLOBAL_BATCH))
    return training_batches(dataset, experiment, rank=rank, world=world)


def joined(batches: list[Batch]) -> Batch:
    """The ranks' parts of one step as one batch."""
    assert len({batch.pad_to for batch in batches}) == 1
    return Batch(
        images=[image for batch in batches for image in batch.images],
        targets=[target for batch in batches for target in batch.targets],
        pad_to=batches[0].pad_to,
        image_ids=[image_id for batch in batches for image_id in batch.image_ids],
    )


def assert_equal(batch: Batch, other: Batch) -> None:
    assert batch.pad_to == other.pad_to
    assert batch.image_ids == other.image_ids
    for image, other_image in zip(batch.images, other.images, strict=True):
        assert torch.equal(image, other_image)
    for target, other_target in zip(batch.targets, other.targets, strict=True):
        assert target.keys() == other_target.keys()
        assert all(torch.equal(target[name], other_target[name]) for name in target)


@pytest.mark.parametrize("short", [48, (20, 60)])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_number_of_workers_makes_the_same_steps(
    dataset: CocoDataset, world: int, short: int | tuple[int, int]
) -> None:
    alone = train_batches(dataset, short=short)
    ranks = [train_batches(dataset, rank, world, short) for rank in range(world)]
    for step in range(NUM_STEPS):
        assert_equal(joined([batches[step] for batches in ranks]), alone[step])


@pytest.mark.parametrize(
    ("start", "num_workers", "short"), [(0, 0, 48), (3, 0, (20, 60)), (0, 1, (20, 60)), (3, 1, 48)]
)
def test_a_loader_started_at_any_step_gives_that_step(
    dataset: CocoDataset, start: int, num_workers: int, short: int | tuple[int, int]
) -> None:
    batches = train_batches(dataset, short=short)
    loader = DataLoader(batches, batch_size=None, sampler=range(start, NUM_STEPS), num_workers=num_workers)
    loaded = list(loader)
    assert len(loaded) == NUM_STEPS - start
    for step, batch in zip(range(start, NUM_STEPS), loaded, strict=True):
        assert_equal(batch, train_batches(dataset, short=short)[step])


@pytest.mark.parametrize("data", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_number_of_workers_augments_alike(dataset: CocoDataset, world: int, data: DataConfig) -> None:
    alone = optional_batches(dataset, data)
    ranks = [optional_batches(dataset, data, rank, world) for rank in range(world)]
    for step in range(2 * NUM_STEPS):
        assert_equal(joined([batches[step] for batches in ranks]), alone[step])


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize(("start", "num_workers"), [(0, 0), (7, 0), (4, 1), (2, 4)])
def test_any_loader_started_at_any_step_augments_alike(dataset: CocoDataset, start: int, num_workers: int) -> None:
    expected = [optional_batches(dataset, EVERYTHING)[step] for step in range(start, 10)]
    batches = optional_batches(dataset, EVERYTHING, rank=1, world=3)
    loader = DataLoader(batches, batch_size=None, sampler=range(start, 10), num_workers=num_workers)
    mine = rank_slice(GLOBAL_BATCH, 1, 3)
    for whole, part in zip(expected, loader, strict=True):
        assert_equal(part, Batch(whole.images[mine], whole.targets[mine], whole.pad_to, whole.image_ids[mine]))


def test_augmented_batches_are_those_of_earlier_versions(dataset: CocoDataset) -> None:
    # As above: these values never change.
    digest = hashlib.sha256()
    for data in OPTIONS.values():
        for step in range(10):
            batch = optional_batches(dataset, data)[step]
            for image, target in zip(batch.images, batch.targets, strict=True):
                digest.update(str(tuple(image.shape)).encode() + target["boxes"].round().numpy().tobytes())
    assert digest.hexdigest()[:12] == "87fe44143d9b"


def test_plans_tell_sizes_and_images_without_reading(dataset: CocoDataset) -> None:
    ranks = [optional_batches(dataset, EVERYTHING, rank, 3) for rank in range(3)]
    mosaics = 0
    for step in range(2 * NUM_STEPS):
        batch = joined([batches[step] for batches in ranks])
        plans = ranks[1].plans(step)
        assert [plan.size for plan in plans] == [(image.shape[2], image.shape[1]) for image in batch.images]
        assert [dataset.images[plan.tiles[0].index].id for plan in plans] == batch.image_ids
        assert batch.pad_to == padded_size([plan.size for plan in plans])
        mosaics += sum(len(plan.tiles) == 4 for plan in plans)
    assert 10 < mosaics < 30


def test_the_order_of_an_experiment_is_what_it_asks_for(dataset: CocoDataset) -> None:
    order = optional_batches(dataset, EVERYTHING).order
    assert (order.num_images, order.global_batch, order.seed, order.block, order.window) == (7, GLOBAL_BATCH, 3, 2, 2)
    assert order.portrait is not None
    assert order.portrait.tolist() == [height > width for width, height in SIZES]
    # Six of seven images hold an object of the one class; at a threshold of 1 that is rare by sqrt(7 / 6).
    assert order.repeats is not None
    assert order.repeats.tolist() == pytest.approx([1] + 6 * [(7 / 6) ** 0.5])
    plain = optional_batches(dataset, EVERYTHING.model_copy(update={"order": OrderConfig()})).order
    assert (plain.block, plain.portrait, plain.repeats) == (None, None, None)


def test_crowd_regions_make_no_class_less_rare(dataset: CocoDataset) -> None:
    # All objects of the last three images are crowds: three images of seven hold the class.
    iscrowd = np.arange(len(dataset.columns.labels)) >= dataset.columns.offsets[4]
    crowded = replace(dataset, columns=replace(dataset.columns, iscrowd=iscrowd))
    order = optional_batches(crowded, EVERYTHING).order
    assert order.repeats is not None
    assert order.repeats.tolist() == pytest.approx([1] + 3 * [(7 / 3) ** 0.5] + 3 * [1])


def test_a_batch_is_what_the_order_says(dataset: CocoDataset) -> None:
    order = Order(len(dataset.images), GLOBAL_BATCH, seed=3)
    flips = 0
    for step in range(NUM_STEPS):
        batch = train_batches(dataset)[step]
        slots = order.slots(step)
        assert batch.image_ids == [dataset.images[slot.index].id for slot in slots]
        assert [int(target["key"]) for target in batch.targets] == [slot.key for slot in slots]
        for slot, image, target in zip(slots, batch.images, batch.targets, strict=True):
            record = dataset.images[slot.index]
            size = resized_size(record.width, record.height, 48, 64)
            assert image.shape == (3, size[1], size[0])
            assert image.dtype == torch.uint8
            assert target["boxes"].shape == (len(record.boxes), 4)
            assert target["boxes"].dtype == torch.float32
            assert target["labels"].dtype == torch.int64
            assert target["iscrowd"].dtype == torch.bool
            assert image.shape[1] <= batch.pad_to[0]
            assert image.shape[2] <= batch.pad_to[1]
            flips += bool(len(record.boxes)) and bool((target["boxes"][0, 0] > 0).item())
    assert batch.pad_to[0] % 32 == batch.pad_to[1] % 32 == 0
    assert 0 < flips < NUM_STEPS * GLOBAL_BATCH


def test_every_sample_of_a_range_has_a_size_of_its_own(dataset: CocoDataset) -> None:
    order = Order(len(dataset.images), GLOBAL_BATCH, seed=3)
    drawn: dict[int, set[tuple[int, int]]] = {}
    for step in range(40):
        batch = train_batches(dataset, short=(20, 60))[step]
        sizes = []
        for slot, image, target in zip(order.slots(step), batch.images, batch.targets, strict=True):
            record = dataset.images[slot.index]
            size = resized_size(record.width, record.height, draw_short((20, 60), slot.key), 64)
            assert image.shape == (3, size[1], size[0])
            assert (target["boxes"] <= torch.tensor(size).repeat(2)).all()
            sizes.append(size)
            drawn.setdefault(record.id, set()).add(size)
        # Not what the largest bound would need: the global batch's own sizes decide.
        assert batch.pad_to == padded_size(sizes)
    # In a square the long bound never decides, so that every draw shows.
    assert len(drawn[13]) > 12
    assert all(20 <= side <= 60 for size in drawn[13] for side in size)


def test_a_range_of_one_size_makes_the_batches_of_that_size(dataset: CocoDataset) -> None:
    for step in range(NUM_STEPS):
        assert_equal(train_batches(dataset, short=(48, 48))[step], train_batches(dataset)[step])


def test_batches_of_one_size_are_those_of_earlier_versions(dataset: CocoDataset) -> None:
    # A run that goes on after an update must see the same images: these values never change.
    digest = hashlib.sha256()
    for step in range(NUM_STEPS):
        batch = train_batches(dataset)[step]
        for image, target in zip(batch.images, batch.targets, strict=True):
            digest.update(str(tuple(image.shape)).encode() + target["boxes"].round().numpy().tobytes())
    assert digest.hexdigest()[:12] == "8c12fe0f8f2e"


def test_images_are_augmented_anew_in_every_epoch(dataset: CocoDataset) -> None:
    widths = set()
    for step in range(40):
        batch = train_batches(dataset)[step]
        for image_id, target in zip(batch.image_ids, batch.targets, strict=True):
            if image_id == 11:
                widths.add(float(target["boxes"][0, 0]))
    assert len(widths) == 2


def test_a_rank_without_images_still_has_a_batch(dataset: CocoDataset) -> None:
    batch = train_batches(dataset, rank=0, world=5)[0]
    assert batch.images == batch.targets == batch.image_ids == []
    assert batch.pad_to == train_batches(dataset)[0].pad_to


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_evaluation_sees_every_image_once_and_alike(dataset: CocoDataset, world: int) -> None:
    def evaluation(rank: int, world: int) -> EvalBatches:
        return EvalBatches(dataset, short=48, long=64, batch_size=2, rank=rank, world=world)

    alone = {tuple(batch.image_ids): batch for batch in DataLoader(evaluation(0, 1), batch_size=None)}
    seen = []
    for rank in range(world):
        batches = evaluation(rank, world)
        for item in range(len(batches)):
            batch = batches[item]
            assert [record.id for record in batches.records(item)] == batch.image_ids
            assert_equal(batch, alone[tuple(batch.image_ids)])
            seen += batch.image_ids
    assert sorted(seen) == [record.id for record in dataset.images]


def test_evaluation_pads_to_its_own_batch(dataset: CocoDataset) -> None:
    batches = EvalBatches(dataset, short=48, long=64, batch_size=1)
    assert [batches[item].pad_to for item in (0, 1, 2)] == [(64, 64), (64, 32), (32, 64)]
    with pytest.raises(IndexError):
        batches[len(dataset.images)]


def test_detections_go_back_to_the_stored_image(dataset: CocoDataset) -> None:
    batches = EvalBatches(dataset, short=48, long=64, batch_size=1)
    for item, record in enumerate(dataset.images):
        size = resized_size(record.width, record.height, 48, 64)
        back = scale_boxes(batches[item].targets[0]["boxes"], record, size)
        torch.testing.assert_close(back, torch.tensor(record.boxes))


def test_keys_of_evaluation_belong_to_the_image(dataset: CocoDataset) -> None:
    batches = EvalBatches(dataset, short=48, long=64, batch_size=3, rank=1, world=2)
    assert [int(target["key"]) for target in batches[0].targets] == [sample_key(0, 0, index) for index in (3, 4, 5)]


def test_read_image_gives_rgb_of_any_mode(tmp_path: Path) -> None:
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        path = tmp_path / f"{mode}.tiff"
        Image.new(mode, (5, 3)).save(path)
        image = read_image(path)
        assert image.shape == (3, 3, 5)
        assert image.dtype == torch.uint8


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    short = tmp_path / "short.png"
    Image.effect_noise((64, 64), 50).save(short)
    short.write_bytes(short.read_bytes()[:900])
    for path in (text, short, tmp_path / "gone.png"):
        with pytest.raises(UserError, match="cannot be read as an image") as error:
            read_image(path)
        assert str(path) in str(error.value)


def test_an_image_of_another_size_than_annotated_is_named(dataset: CocoDataset, tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    content = {
        "images": [{"id": 1, "file_name": "0.png", "width": 48, "height": 64}],
        "annotations": [],
        "categories": [{"id": 1, "name": "thing"}],
    }
    path.write_text(json.dumps(content))
    wrong = read_coco(path, dataset.images[0].path.parent)
    with pytest.raises(UserError, match=r"0\.png: the image is 64 x 48, .* says 48 x 64"):
        EvalBatches(wrong, short=48, long=64, batch_size=1)[0]


def test_an_order_of_another_data_set_is_refused(dataset: CocoDataset) -> None:
    with pytest.raises(ValueError, match="the order is of 3 images, the data set has 7"):
        TrainBatches(dataset, Order(3, 2, seed=0), short=48, long=64, flip=0.5, rank=0, world=1)


@pytest.mark.slow
def test_checking_images_keeps_none_of_them(dataset: CocoDataset) -> None:
    class Watched:
        """The first image comes last, and sees what is left of the others."""

        others = 0
        kept = -1

        def read(self, position: int) -> bytes:
            if position:
                self.others += 1
            else:
                deadline = time.monotonic() + 10
                while self.others < len(SIZES) - 1 and time.monotonic() < deadline:
                    time.sleep(0.01)
                time.sleep(0.2)
                sizes = {(3, height, width) for width, height in SIZES}
                self.kept = sum(type(each) is torch.Tensor and tuple(each.shape) in sizes for each in gc.get_objects())
            return dataset.source.read(position)

        def where(self, position: int) -> str:
            return dataset.source.where(position)

    gc.collect()
    watched = Watched()
    check_images(replace(dataset, source=watched))
    assert watched.others == len(SIZES) - 1
    assert watched.kept == 0
