"""Stops and worlds: a stopped run ends with the bits of one that was not, and every world takes the same step.

Run as a program, this file trains in processes of its own, one for each rank, and leaves what they saw in a folder.
They are forked from one that has imported everything and computed nothing, which saves an import for each.
"""

import itertools
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

import mimicdet.detector
import mimicdet.refinement
from mimicdet import MimicDet, ModelConfig
from mimicdet.config import AnchorConfig, BackboneConfig, PyramidConfig, StudentConfig, TeacherConfig
from mimiclab.data.coco import CocoDataset, read_coco
from mimiclab.data.dataset import TrainBatches
from mimiclab.data.order import Order
from mimiclab.data.scenes import CLASSES, generate_scenes
from mimiclab.engine import Engine, NonFiniteLossError
from mimiclab.optim import OptimConfig

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

TINY = ModelConfig(
    backbone=BackboneConfig(name="resnet18", width=16),
    pyramid=PyramidConfig(channels=16, max_level=5),
    anchors=AnchorConfig(scale=2),
    student=StudentConfig(head_width=32, offset_channels=(8, 8), offsets="analytic_learned", num_samples=32),
    teacher=TeacherConfig(num_rois=16, num_convs=1),
)
GLOBAL_BATCH = 5  # uneven slices in worlds of 2 and 3

NUM_STEPS, STOPS = 6, (1, 2, 4)
# After the first step DDP would lay its buckets out anew, if it were let; fp16's first steps overflow.
RUNS = {
    "adamw, average": (
        OptimConfig(lr=2e-3, global_batch=GLOBAL_BATCH, warmup_steps=2, clip_norm=5.0, ema_decay=0.9),
        None,
    ),
    "sgd, fp16, parts": (
        OptimConfig(
            name="sgd",
            lr=1e-3,
            global_batch=GLOBAL_BATCH,
            warmup_steps=1,
            schedule="step",
            milestones=(1,),
            precision="fp16",
        ),
        1,
    ),
}

CASES = [(1, None), (1, 2), (1, 1), (2, None), (2, 2), (2, 1), (3, None), (3, 1), (5, None)]
"""Worlds, and how many images a rank puts through at once."""
PLAIN = OptimConfig(
    name="sgd", lr=0.01, global_batch=GLOBAL_BATCH, warmup_steps=0, schedule="constant", clip_norm=None, ema_decay=0.5
)
NUM_COMPARED = 2  # steps after the one that all worlds go on from


# ---- what the processes do ----


def batches(dataset: CocoDataset, rank: int, world: int) -> TrainBatches:
    order = Order(len(dataset.images), GLOBAL_BATCH, seed=1)
    return TrainBatches(dataset, order, short=(40, 64), long=64, flip=0.5, rank=rank, world=world)


def engine(config: OptimConfig, micro_batch: int | None, *, seed: int, double: bool = False) -> Engine:
    torch.manual_seed(seed)
    detector = MimicDet(TINY, len(CLASSES))
    if double:
        detector.double()
    return Engine(detector, config, num_steps=NUM_STEPS, steps_per_epoch=3, micro_batch=micro_batch)


def save(trained: Engine, path: Path) -> None:
    torch.save({"weights": trained.weights(), "state": trained.state_dict()}, path)


def load(trained: Engine, path: Path) -> None:
    saved = torch.load(path, weights_only=True)
    trained.load_state_dict(saved["state"], saved["weights"])


def train(rank: int, world: int, dataset: CocoDataset, folder: Path, start: int, stop: int) -> None:
    """Every run from step `start` on, until the last rank says that after step `stop` everyone stops."""
    items = batches(dataset, rank, world)
    for name, (config, micro_batch) in RUNS.items():
        trained = engine(config, micro_batch, seed=start)  # nothing of the start may be left
        if start:
            load(trained, folder / f"{name}-{start}.pt")
        means, signals = [], []
        while trained.step < NUM_STEPS:
            last = rank == world - 1 and trained.step + 1 == stop
            means.append(trained.train_step(items[trained.step], signal=float(last)))
            signals.append(trained.signal)
            if trained.signal:
                break
        if rank == 0:
            save(trained, folder / f"{name}-{stop}.pt")
        record = {
            "means": means,
            "signals": signals,
            "step": trained.step,
            "weights": trained.weights(),
            "state": trained.state_dict(),
        }
        torch.save(record, folder / f"{name}-{stop}-rank-{rank}.pt")


def begin(_rank: int, _world: int, dataset: CocoDataset, folder: Path) -> None:
    """The step before those that are compared between worlds."""
    trained = engine(PLAIN, None, seed=0, double=True)
    trained.train_step(batches(dataset, 0, 1)[0])
    save(trained, folder / "begun.pt")


def compare(rank: int, world: int, dataset: CocoDataset, folder: Path) -> None:
    """What each step shows and looks at, and the gradients of the first, in every case of this world."""
    looked_at = watch()
    items = batches(dataset, rank, world)
    for micro_batch in (micro for each, micro in CASES if each == world):
        trained = engine(PLAIN, micro_batch, seed=1, double=True)
        load(trained, folder / "begun.pt")
        gradients, steps = {}, []
        for step in range(1, 1 + NUM_COMPARED):
            batch = items[step]
            trained.train_step(batch)
            gradients = gradients or {
                name: p.grad.clone() for name, p in trained.detector.named_parameters() if p.grad is not None
            }
            shown = [
                {"image": image, "id": image_id, "pad_to": batch.pad_to, **target}
                for image, image_id, target in zip(batch.images, batch.image_ids, batch.targets, strict=True)
            ]
            steps.append({"shown": shown, **{name: list(positions) for name, positions in looked_at.items()}})
            for positions in looked_at.values():
                positions.clear()
        record = {"steps": steps, "gradients": gradients, "weights": trained.weights()}
        torch.save(record, folder / f"compared-{world}-{micro_batch}-{rank}.pt")


def watch() -> dict[str, list[Any]]:
    """From now on, the positions that losses look at, by what looks: an entry for each image, in order."""
    seen: dict[str, list[Any]] = {"refinement": [], "teacher": [], "student": []}

    def spy(module: ModuleType, name: str, note: Callable[[tuple[Any, ...], Any], None]) -> None:
        real = getattr(module, name)

        def watched(*args: Any) -> Any:
            answer = real(*args)
            note(args, answer)
            return answer

        setattr(module, name, watched)

    spy(mimicdet.refinement, "sample", lambda _, chosen: seen["refinement"].append(chosen))
    spy(mimicdet.detector, "sample_rois", lambda args, chosen: seen["teacher"].append(args[0].position[chosen]))
    spy(
        mimicdet.detector,
        "mine_boxes",
        lambda args, mined: seen["student"].extend(
            mined.position.split(torch.bincount(mined.image, minlength=len(args[0])).tolist())
        ),
    )
    return seen


def fail(rank: int, world: int, dataset: CocoDataset, folder: Path) -> None:
    """The first of the last rank's images is broken, and is not in the last of the parts it is put through in."""
    trained = engine(PLAIN, 1, seed=0)
    before = {name: value.clone() for name, value in trained.detector.state_dict().items()}
    batch = batches(dataset, rank, world)[0]
    if rank == world - 1:
        batch.images[0] = batch.images[0] * math.nan
    try:
        trained.train_step(batch)
        message = ""
    except NonFiniteLossError as error:
        message = str(error)
    same = all(torch.equal(value, before[name]) for name, value in trained.detector.state_dict().items())
    torch.save({"message": message, "ids": batch.image_ids, "same": same}, folder / f"failed-{rank}.pt")


FORK = multiprocessing.get_context("fork")
MEETINGS = itertools.count()


def together(folder: Path, world: int, work: Callable[..., None], *args: Any) -> None:
    """Run `work(rank, world, ...)` in a new process for each rank, and wait for all."""
    meeting = f"file://{folder / f'meeting-{next(MEETINGS)}'}"
    processes = [FORK.Process(target=as_rank, args=(rank, world, meeting, work, *args)) for rank in range(world)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(120)
    finally:
        for process in processes:
            process.kill()
    codes = [process.exitcode for process in processes]
    assert codes == [0] * world, codes


def as_rank(rank: int, world: int, meeting: str, work: Callable[..., None], *args: Any) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    work(rank, world, *args)
    if world > 1:
        dist.destroy_process_group()


def main(folder: Path) -> None:
    paths = generate_scenes(folder / "scenes", seed=0, num_train=12, num_val=1, size=64)
    dataset = read_coco(paths.train_annotations, paths.train_images)
    for world in (1, 2, 3):
        whole, stopped = folder / f"whole-{world}", folder / f"stopped-{world}"
        whole.mkdir()
        stopped.mkdir()
        together(folder, world, train, dataset, whole, 0, NUM_STEPS)
        for start, stop in itertools.pairwise((0, *STOPS, NUM_STEPS)):
            together(folder, world, train, dataset, stopped, start, stop)
    together(folder, 1, begin, dataset, folder)
    for world in sorted({world for world, _ in CASES}):
        together(folder, world, compare, dataset, folder)
    together(folder, 2, fail, dataset, folder)


# ---- what is expected of them ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("worlds")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, __file__, str(path)], env=environment, start_new_session=True)
    try:
        assert process.wait(500) == 0
    finally:
        with suppress(ProcessLookupError):  # nobody is left, as it should be
            os.killpg(process.pid, signal.SIGKILL)
    return path


def records(folder: Path, name: str, world: int) -> list[dict[str, Any]]:
    """What each rank saw."""
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(world)]


def assert_same_bits(ours: Any, theirs: Any, where: str = "") -> None:
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in ours.items():
            assert_same_bits(value, theirs[key], f"{where}/{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for index, value in enumerate(ours):
            assert_same_bits(value, theirs[index], f"{where}/{index}")
    else:
        assert ours == theirs, where


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_run_that_was_stopped_ends_with_the_same_bits(folder: Path, world: int, name: str) -> None:
    whole = records(folder / f"whole-{world}", f"{name}-{NUM_STEPS}-rank", world)
    stops = [records(folder / f"stopped-{world}", f"{name}-{stop}-rank", world) for stop in (*STOPS, NUM_STEPS)]
    for rank in range(world):
        assert whole[rank]["step"] == NUM_STEPS
        assert_same_bits([mean for stop in stops for mean in stop[rank]["means"]], whole[rank]["means"])
        for key in ("step", "weights", "state"):
            assert_same_bits(stops[-1][rank][key], whole[rank][key], f"{key} of rank {rank}")
            assert_same_bits(whole[rank][key], whole[0][key], f"{key} of ranks {rank} and 0")


def test_what_is_stopped_has_something_to_lose(folder: Path) -> None:
    (average,) = records(folder / "whole-1", f"adamw, average-{NUM_STEPS}-rank", 1)
    name = "student.deltas.weight"
    assert not torch.equal(average["weights"][name], average["state"]["detector"][name])
    (half,) = records(folder / "whole-1", f"sgd, fp16, parts-{NUM_STEPS}-rank", 1)
    assert len({float(means["loss_scale"]) for means in half["means"]}) > 1
    assert {"grad_norm" in means for means in half["means"]} == {False, True}
    assert len({float(means["lr"]) for means in half["means"]}) > 2


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_all_ranks_hear_at_the_same_step_what_one_has_to_say(folder: Path, world: int, name: str) -> None:
    for start, stop in itertools.pairwise((0, *STOPS, NUM_STEPS)):
        for record in records(folder / f"stopped-{world}", f"{name}-{stop}-rank", world):
            assert record["signals"] == [0.0] * (stop - start - 1) + [1.0]


@pytest.mark.parametrize(("world", "micro_batch"), CASES)
def test_every_world_shows_and_looks_at_the_same(folder: Path, world: int, micro_batch: int | None) -> None:
    (alone,) = records(folder, "compared-1-None", 1)
    ranks = records(folder, f"compared-{world}-{micro_batch}", world)
    sizes = {shown["image"].shape for step in alone["steps"] for shown in step["shown"]}
    assert len(sizes) > 2  # so that padding matters
    for step, expected in enumerate(alone["steps"]):
        # The teacher's boxes are drawn twice for each image: to learn from and to be mimicked.
        counts = {name: len(entries) / GLOBAL_BATCH for name, entries in expected.items()}
        assert counts == {"shown": 1, "refinement": 1, "teacher": 2, "student": 1}
        for name, entries in expected.items():
            assert_same_bits([each for rank in ranks for each in rank["steps"][step][name]], entries, name)


@pytest.mark.parametrize(("world", "micro_batch"), CASES)
def test_every_world_takes_the_same_step(folder: Path, world: int, micro_batch: int | None) -> None:
    (alone,) = records(folder, "compared-1-None", 1)
    for rank in records(folder, f"compared-{world}-{micro_batch}", world):
        for part in ("gradients", "weights"):
            assert rank[part].keys() == alone[part].keys()
            for name, expected in alone[part].items():
                assert expected.dtype == torch.float64
                assert float((rank[part][name] - expected).norm()) <= 1e-9 * float(expected.norm()), name


def test_a_loss_that_is_not_finite_in_one_part_stops_all_ranks_before_the_weights_move(folder: Path) -> None:
    first, second = records(folder, "failed", 2)
    assert first["message"] == second["message"]
    assert first["message"].startswith("step 1: loss is nan")
    assert first["message"].endswith(f"the images that broke: [{second['ids'][0]}]")
    assert first["same"]
    assert second["same"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
