"""What a detector refuses, by message, and what it takes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mimicdet import MimicDet, ModelConfig
from mimicdet.config import (
    BackboneConfig,
    MimicConfig,
    PyramidConfig,
    RefinementConfig,
    StudentConfig,
    TeacherConfig,
)
from mimicdet.inputs import check_images, check_targets

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_CLASSES = 3
TINY = ModelConfig(
    backbone=BackboneConfig(name="resnet18", width=8),
    pyramid=PyramidConfig(channels=8, max_level=5),
    refinement=RefinementConfig(num_samples=16, num_proposals=40),
    student=StudentConfig(head_width=8, offset_channels=(4, 4), num_samples=12),
    teacher=TeacherConfig(num_rois=10, num_convs=1, pooled_size=3),
    mimic=MimicConfig(warmup_steps=3),
)
HEIGHT, WIDTH = 40, 64
META = torch.device("meta")


@pytest.fixture(scope="module")
def model() -> MimicDet:
    torch.manual_seed(0)
    model = MimicDet(TINY, NUM_CLASSES).train()
    model.at_step(1)
    return model


def image(height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    return torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def target(**other: Any) -> dict[str, Tensor]:
    own = {
        "boxes": torch.tensor([[5.0, 4, 36, 37], [30, 2, 60, 33]]),
        "labels": torch.tensor([1, 2]),
        "iscrowd": torch.tensor([False, False]),
        "key": torch.tensor(7),
    }
    return {name: value for name, value in {**own, **other}.items() if value is not None}


def boxes(*second: float) -> Tensor:
    return torch.tensor([[5.0, 4, 36, 37], second])


def losses(model: MimicDet, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    answer = model.loss_terms(images, targets).losses
    assert all(value.isfinite().all() for value in answer.values())
    return answer


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def refusal(ask: Callable[..., object], *args: Any, **options: Any) -> str:
    """Message of the error that a call ends with."""
    with pytest.raises(ValueError) as caught:
        ask(*args, **options)
    return str(caught.value)


# ---- images ----

SIDES = "expected sides of 2 pixels or more, found "
CHANNELS = "expected 3 channels as (3, H, W), found "
LARGE = "expected at most 8 megapixels, found "
DTYPE = "expected uint8, or floating point in [0, 1], found "
BAD_IMAGES = [
    pytest.param(image(1, 1), SIDES + "1 x 1", id="one pixel"),
    pytest.param(image(1, 500), SIDES + "1 x 500", id="one row"),
    pytest.param(image(500, 1), SIDES + "500 x 1", id="one column"),
    pytest.param(torch.zeros(3, 0, 64), SIDES + "0 x 64", id="no rows"),
    pytest.param(torch.zeros(1, 40, 64), CHANNELS + "(1, 40, 64)", id="one channel"),
    pytest.param(torch.zeros(4, 40, 64), CHANNELS + "(4, 40, 64)", id="four channels"),
    pytest.param(torch.zeros(40, 64, 3), CHANNELS + "(40, 64, 3)", id="channels last"),
    pytest.param(torch.zeros(40, 64), CHANNELS + "(40, 64)", id="two dimensions"),
    pytest.param(torch.zeros(1, 3, 40, 64), CHANNELS + "(1, 3, 40, 64)", id="a batch"),
    pytest.param(torch.zeros(()).expand(3, 4001, 2000), LARGE + "4001 x 2000; resize it first", id="large"),
    pytest.param(torch.zeros(()).expand(3, 2, 4_000_001), LARGE + "2 x 4000001; resize it first", id="long"),
    pytest.param(image().int(), DTYPE + "torch.int32", id="int32"),
    pytest.param(image().bool(), DTYPE + "torch.bool", id="bool"),
    pytest.param(torch.zeros(3, 40, 64, dtype=torch.complex64), DTYPE + "torch.complex64", id="complex"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_IMAGES)
@pytest.mark.parametrize("place", [0, 1])
def test_images_that_mean_nothing_are_refused_by_their_place(
    model: MimicDet, bad: Tensor, message: str, place: int
) -> None:
    images = [image(), image()]
    images[place] = bad
    for ask in (
        lambda: check_images(images),
        lambda: model.loss_terms(images, [target(), target()]),
        lambda: model.detect(images),
        lambda: model.detect_heads(images, topk=10),
    ):
        assert refusal(ask) == f"image {place}: {message}"


def test_images_of_the_smallest_and_the_largest_size_are_taken() -> None:
    check_images([image(2, 2), image(2, 500), torch.zeros(()).expand(3, 4000, 2000)])


def test_no_images_are_refused(model: MimicDet) -> None:
    for ask in (lambda: check_images([]), lambda: model.loss_terms([], []), lambda: model.detect([])):
        assert refusal(ask) == "the detector needs at least one image, found an empty list"


def test_images_of_a_batch_share_their_device(model: MimicDet) -> None:
    images = [image(), image(), torch.empty(3, 40, 64, device=META)]
    for ask in (lambda: check_images(images), lambda: model.detect(images)):
        assert refusal(ask) == "image 2 is on meta, expected cpu as image 0"
    check_images([torch.empty(3, 40, 64, device=META)] * 2)


# ---- targets ----

ORDER = "expected x1 < x2 and y1 < y2"
OUTSIDE = "it lies outside of the image of 40 x 64"
FINITE = "expected finite numbers"
BAD_TARGETS = [
    *(
        pytest.param({"boxes": boxes(*box)}, f", box 1: {message}, found {[float(side) for side in box]}", id=f"{box}")
        for box, message in [
            ((torch.nan, 2, 60, 33), FINITE),
            ((30, 2, 60, torch.nan), FINITE),
            ((30, 2, torch.inf, 33), FINITE),
            ((-torch.inf, 2, 60, 33), FINITE),
            ((30, 2, 30, 33), ORDER),
            ((30, 2, 60, 2), ORDER),
            ((60, 2, 30, 33), ORDER),
            ((30, 33, 60, 2), ORDER),
            ((64, 2, 70, 33), OUTSIDE),
            ((30, 40, 60, 50), OUTSIDE),
            ((-9, 2, 0, 33), OUTSIDE),
            ((30, -9, 60, 0), OUTSIDE),
        ]
    ),
    # Sound in fp64, not in the precision of the losses.
    pytest.param(
        {"boxes": torch.tensor([[30.0, 2, 30.0000001, 33]] * 2, dtype=torch.float64)},
        f", box 0: {ORDER}, found [30.0, 2.0, 30.0000001, 33.0]",
        id="thin in fp32",
    ),
    pytest.param(
        {"boxes": torch.tensor([[30.0, 2, 1e39, 33]] * 2, dtype=torch.float64)},
        f", box 0: {FINITE}, found [30.0, 2.0, 1e+39, 33.0]",
        id="infinite in fp32",
    ),
    pytest.param(
        {"boxes": boxes(0.0, 2, 1e-44, 33)},
        f", box 1: {ORDER}, found {boxes(0.0, 2, 1e-44, 33)[1].tolist()}",
        id="thin",
    ),
    pytest.param(
        {"boxes": torch.ones(2, 4, dtype=torch.complex64)},
        ": expected real numbers, found torch.complex64 boxes and torch.int64 labels",
        id="complex boxes",
    ),
    *(
        pytest.param({"key": key}, f": expected key as an integer scalar, found {found}", id=f"key of {found}")
        for key, found in [
            (torch.tensor(1.0), "torch.float32 of shape ()"),
            (torch.tensor([1, 2]), "torch.int64 of shape (2,)"),
            (torch.tensor(True), "torch.bool of shape ()"),
        ]
    ),
    *(
        pytest.param({name: 5}, f": expected {name} as a tensor, found int", id=f"{name} as a number")
        for name in target()
    ),
    *(
        pytest.param(
            {"labels": torch.tensor([0, label], dtype=dtype)},
            f", box 1: expected a label from 0 to 2, found {label}",
            id=f"label {label} of {dtype}",
        )
        for label, dtype in [(3, torch.int64), (-1, torch.int64), (255, torch.uint8), (-100, torch.int32)]
    ),
    *(
        pytest.param(
            {"labels": torch.tensor([1, 0]).to(dtype)},
            f": expected labels of an integer type, found {dtype}",
            id=f"labels of {dtype}",
        )
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bool)
    ),
    *(
        pytest.param({"boxes": torch.ones(shape)}, f": expected boxes (M, 4), found {shape}", id=f"boxes of {shape}")
        for shape in [(2, 5), (4,), (1, 2, 4), (0,)]
    ),
    *(
        pytest.param(
            {key: torch.zeros(shape, dtype=torch.int64)},
            f": expected 2 {key} for as many boxes, found {shape}",
            id=f"{key} of {shape}",
        )
        for key in ("labels", "iscrowd")
        for shape in [(1,), (3,), (2, 1), ()]
    ),
    *(
        pytest.param(
            dict.fromkeys(missing), f": expected boxes and labels, found {found}", id=f"without {', '.join(missing)}"
        )
        for missing, found in [
            (["boxes"], "labels, iscrowd, key"),
            (["labels"], "boxes, iscrowd, key"),
            (list(target()), "nothing"),
        ]
    ),
    *(
        pytest.param(
            {key: target()[key].to(META)},
            ": expected all of it on one device, found "
            + ", ".join(f"{name} on {'meta' if name == key else 'cpu'}" for name in target()),
            id=f"{key} elsewhere",
        )
        for key in target()
    ),
]


@pytest.mark.parametrize(("other", "message"), BAD_TARGETS)
def test_targets_that_mean_nothing_are_refused_by_their_place(
    model: MimicDet, other: dict[str, Tensor | None], message: str
) -> None:
    images, targets = [image(), image()], [target(), target(**other)]
    for ask in (
        lambda: check_targets(targets, images, NUM_CLASSES, torch.float32),
        lambda: model.loss_terms(images, targets),
    ):
        assert refusal(ask) == "target 1" + message


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_boxes_of_any_precision_are_checked(dtype: torch.dtype) -> None:
    wrong = boxes(30, 2, 60, torch.nan).to(dtype)
    message = refusal(check_targets, [target(boxes=wrong)], [image()], NUM_CLASSES, torch.float32)
    assert message == "target 0, box 1: expected finite numbers, found [30.0, 2.0, 60.0, nan]"


def test_the_first_wrong_box_is_named_and_crowds_count_too() -> None:
    def refused(corners: list[list[float]], *labels: int) -> str:
        crowd = torch.tensor([False, True, True])
        wrong = target(boxes=torch.tensor(corners), labels=torch.tensor(labels), iscrowd=crowd)
        return refusal(check_targets, [wrong], [image()], NUM_CLASSES, torch.float32)

    good, turned, outside = [5.0, 4, 36, 37], [30.0, 2, 20, 33], [0.0, 50, 9, 60]
    assert refused([good, turned, turned], 0, 0, 0).startswith("target 0, box 1: expected x1 < x2")
    assert refused([good, good, outside], 0, 9, 0).startswith("target 0, box 2: it lies outside")
    assert refused([good, good, good], 0, 9, -1) == "target 0, box 1: expected a label from 0 to 2, found 9"


def test_a_box_is_outside_of_its_own_image_whatever_the_batch_is_padded_to(model: MimicDet) -> None:
    images, targets = [image(40, 64), image(40, 30)], [target(), target()]
    message = refusal(model.loss_terms, images, targets, pad_to=(64, 64))
    assert message.startswith("target 1, box 1: it lies outside of the image of 40 x 30, found [30.0")


@pytest.mark.parametrize("num", [0, 1, 3])
def test_every_image_needs_a_target(model: MimicDet, num: int) -> None:
    message = refusal(model.loss_terms, [image(), image()], [target()] * num)
    assert message == f"every image needs a target, found 2 images, {num} targets"


def test_a_batch_holds_its_images(model: MimicDet) -> None:
    for pad_to in ((64, 32), (32, 64)):
        message = refusal(model.loss_terms, [image(), image(20, 20)], [target(), nothing()], pad_to=pad_to)
        assert message == f"pad_to {pad_to} is smaller than the largest image, (40, 64)"


def nothing() -> dict[str, Tensor]:
    return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "key": torch.tensor(3)}


def test_after_an_error_nothing_of_the_model_has_changed(model: MimicDet) -> None:
    before = losses(model, [image(), image()], [target(), nothing()])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    keyless = target(key=None)
    for case in BAD_IMAGES:
        refusal(model.loss_terms, [image(), case.values[0]], [keyless, keyless])
    for case in BAD_TARGETS:
        refusal(model.loss_terms, [image(), image()], [keyless, target(**case.values[0])])
    refusal(model.loss_terms, [image(), image()], [keyless])
    refusal(model.loss_terms, [image(), image()], [target(), target()], pad_to=(32, 32))
    assert model.training
    assert_same(model.state_dict(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    # No key was drawn for what was refused.
    assert torch.equal(torch.get_rng_state(), generator)
    assert_same(losses(model, [image(), image()], [target(), nothing()]), before)


# ---- what is taken ----


@pytest.mark.parametrize(
    "other",
    [
        {"labels": torch.tensor([1, 2], dtype=torch.int32)},
        {"labels": torch.tensor([1, 2], dtype=torch.uint8)},
        {"boxes": target()["boxes"].double()},
        {"boxes": target()["boxes"].half()},
        {"boxes": target()["boxes"].long()},
        {"iscrowd": None},
        {"iscrowd": torch.tensor([0, 0])},
    ],
    ids=["int32 labels", "uint8 labels", "fp64 boxes", "fp16 boxes", "int64 boxes", "no iscrowd", "int64 iscrowd"],
)
def test_the_same_target_in_other_types_has_the_same_losses(model: MimicDet, other: dict[str, Tensor]) -> None:
    assert_same(losses(model, [image()], [target(**other)]), losses(model, [image()], [target()]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_images_may_be_of_any_floating_type(model: MimicDet, dtype: torch.dtype) -> None:
    pixels = image() / 255
    wanted = losses(model, [image()], [target()])
    for name, value in losses(model, [pixels.to(dtype)], [target()]).items():
        assert torch.allclose(value, wanted[name], rtol=1e-2 if dtype == torch.float16 else 1e-4), name


@pytest.mark.parametrize("box", [(-20, -20, 20, 20), (50, 30, 90, 90), (-99, -99, 99, 99), (63.5, 39.5, 64.5, 40.5)])
def test_boxes_may_lie_partly_outside(model: MimicDet, box: tuple[float, ...]) -> None:
    losses(model, [image()], [target(boxes=boxes(*box))])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_a_target_may_be_empty(model: MimicDet, dtype: torch.dtype) -> None:
    empty = {**nothing(), "labels": torch.zeros(0, dtype=dtype)}
    answer = losses(model, [image()], [empty])
    assert float(answer["refine_box"].detach()) == float(answer["student_box"].detach()) == 0
    assert_same(losses(model, [image()], [{**empty, "iscrowd": torch.zeros(0, dtype=torch.bool)}]), answer)


def test_a_key_is_drawn_from_the_generator_where_there_is_none(model: MimicDet) -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return losses(model, [image()], [target(key=None)])

    assert_same(drawn(1), drawn(1))
    assert not torch.equal(drawn(1)["refine_cls"], drawn(2)["refine_cls"])


def test_what_a_caller_hands_in_stays_as_it_is(model: MimicDet) -> None:
    images, targets = [image()], [target(key=None, iscrowd=None)]
    losses(model, images, targets)
    assert torch.equal(images[0], image())
    assert targets[0].keys() == {"boxes", "labels"}
    assert_same(targets[0], target(key=None, iscrowd=None))


def test_keys_of_other_libraries_are_left_alone(model: MimicDet) -> None:
    plain = losses(model, [image()], [target()])
    more = {"image_id": 5, "area": torch.ones(9), "masks": torch.ones(2, 4, 4, device=META)}
    assert_same(losses(model, [image()], [target(**more)]), plain)


def test_a_key_is_a_number_whatever_its_type(model: MimicDet) -> None:
    wide, narrow = (
        losses(model, [image()], [target(key=torch.tensor(7, dtype=t))]) for t in (torch.int64, torch.int32)
    )
    assert_same(wide, narrow)
