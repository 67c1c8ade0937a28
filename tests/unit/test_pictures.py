import numpy as np
import pytest
from PIL import Image, ImageColor

from mimiclab.pictures import PALETTE, Panel, side_by_side

CLASSES = ["cell", "platelet"]
STRIP = 20  # the title's height over a panel of 320 pixels
GREY = (90, 90, 90)


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 90, np.uint8)


def panel_of(picture: Image.Image, index: int, width: int = 320) -> Image.Image:
    """One panel's image without its title."""
    left = index * (width + 4)
    return picture.crop((left, STRIP, left + width, picture.height))


def colour(label: int) -> tuple[int, ...]:
    return ImageColor.getrgb(PALETTE[label])


def test_each_panel_shows_its_own_boxes_in_the_colours_of_their_classes() -> None:
    truth = Panel("ground truth", [[40, 60, 140, 160]], [0])
    student = Panel("student", [[180, 100, 300, 220]], [1], [0.9])
    picture = side_by_side(grey(240, 320), [truth, student], CLASSES)
    assert picture.size == (320 + 4 + 320, STRIP + 240)

    first, second = panel_of(picture, 0), panel_of(picture, 1)
    for point in ((90, 60), (40, 110), (140, 110), (90, 160)):  # the middle of every side
        assert first.getpixel(point) == colour(0)
        assert second.getpixel(point) == GREY
    for point in ((240, 100), (180, 160), (300, 160), (240, 220)):
        assert first.getpixel(point) == GREY
        assert second.getpixel(point) == colour(1)
    assert first.getpixel((90, 110)) == GREY, "a box is drawn as an outline"


def test_a_small_image_is_enlarged_with_its_boxes_and_a_large_one_reduced() -> None:
    small = side_by_side(grey(60, 80), [Panel("p", [[20, 20, 60, 40]], [0])], CLASSES)
    assert small.size == (320, STRIP + 240)
    assert panel_of(small, 0).getpixel((160, 80)) == colour(0)
    assert panel_of(small, 0).getpixel((160, 160)) == colour(0)

    large = side_by_side(grey(960, 1280), [Panel("p", [[200, 200, 600, 600]], [0])], CLASSES)
    assert large.width == 640
    assert large.getpixel((200, large.height - 480 + 100)) == colour(0)


@pytest.mark.parametrize(
    ("height", "width", "size"), [(2, 3000, (640, 1)), (3000, 2, (2, 2560)), (12000, 3, (1, 2560)), (1, 1, (320, 320))]
)
def test_images_of_any_shape_make_a_picture_of_bounded_size(height: int, width: int, size: tuple[int, int]) -> None:
    picture = side_by_side(grey(height, width), [Panel("p", [[0, 0, width, height]], [0])], CLASSES)
    assert (picture.width, picture.height - (STRIP if picture.width < 480 else 23)) == size


def test_names_and_scores_are_written_over_the_box_and_stay_inside_of_the_image() -> None:
    def label_pixels(boxes: list[list[float]], scores: list[float] | None) -> int:
        picture = panel_of(side_by_side(grey(240, 320), [Panel("p", boxes, [0], scores)], CLASSES), 0)
        return int((np.asarray(picture) == colour(0)).all(-1).sum())

    inside = [[100.0, 100.0, 140.0, 140.0]]
    outline = 2 * 2 * 40
    assert label_pixels(inside, None) > outline + 100
    assert label_pixels(inside, [0.87]) > label_pixels(inside, None) + 50, "the score makes the label longer"
    over_the_edge = [[-30.0, -30.0, 140.0, 140.0]]
    picture = panel_of(side_by_side(grey(240, 320), [Panel("p", over_the_edge, [0])], CLASSES), 0)
    assert picture.getpixel((0, 0)) == colour(0)


def test_low_scores_are_left_out_but_truth_is_always_shown() -> None:
    boxes, labels = [[40, 60, 140, 160], [180, 100, 300, 220]], [0, 1]
    panels = [Panel("student", boxes, labels, [0.29, 0.31]), Panel("truth", boxes, labels)]
    picture = side_by_side(grey(240, 320), panels, CLASSES, min_score=0.3)
    assert panel_of(picture, 0).getpixel((90, 160)) == GREY
    assert panel_of(picture, 0).getpixel((240, 220)) == colour(1)
    assert panel_of(picture, 1).getpixel((90, 160)) == colour(0)


def test_the_best_detection_lies_on_top() -> None:
    same = [[40, 60, 140, 160]] * 2
    for scores, top in (([0.9, 0.5], 0), ([0.5, 0.9], 1)):
        picture = side_by_side(grey(240, 320), [Panel("student", same, [0, 1], scores)], CLASSES)
        assert panel_of(picture, 0).getpixel((90, 160)) == colour(top)


@pytest.mark.parametrize("box", [[np.nan, 0, 9, 9], [0, 0, np.inf, 9], [50, 0, 9, 9]])
def test_boxes_of_a_diverged_model_do_not_stop_the_picture(box: list[float]) -> None:
    picture = side_by_side(grey(240, 320), [Panel("student", [box], [0], [0.9])], CLASSES)
    assert (np.asarray(panel_of(picture, 0)) == GREY).all()


def test_a_panel_without_boxes_has_a_title_only() -> None:
    picture = side_by_side(grey(240, 320), [Panel("student", np.zeros((0, 4)), [], [])], CLASSES)
    assert (np.asarray(panel_of(picture, 0)) == GREY).all()
    assert (np.asarray(picture.crop((0, 0, 320, STRIP))) > 200).any(), "a white title"
