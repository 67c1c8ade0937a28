"""`mimiclab data view` and `data scenes`: what a person sees of a data set."""

import json
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimiclab.cli import main
from mimiclab.data.coco import read_coco
from mimiclab.data.scenes import CLASSES
from mimiclab.data.view import contact_sheet
from mimiclab.pictures import PALETTE

Verb = Callable[..., tuple[int, str, str]]

GREY, RED = (60, 60, 60), (200, 20, 20)


@pytest.fixture
def mimiclab(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Verb:
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(args)
        assert isinstance(caught.value.code, int)
        return caught.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Three images of 160 x 80, grey with a red object on the left; an annotation file and an experiment."""
    images, annotations = [], []
    (tmp_path / "images").mkdir()
    for number in range(3):
        pixels = np.full((80, 160, 3), GREY, dtype=np.uint8)
        pixels[20:60, 10:50] = RED
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 160, "height": 80})
        crowd = int(number == 2)
        box = [10, 20, 40, 40]
        annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": box, "iscrowd": crowd})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "block"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    split = "{annotations: a.json, images: images}"
    (tmp_path / "x.yaml").write_text(
        f"name: x\ndata:\n  train: {split}\n  val: {split}\n  flip: 1\n  resize: {{short: 80, long: 160}}\n"
        "optim: {global_batch: 2}\n"
    )
    return tmp_path


def colour_at(sheet: Path, x: int, y: int) -> tuple[int, ...]:
    with Image.open(sheet) as image:
        pixel = image.convert("RGB").getpixel((x, y))
    assert isinstance(pixel, tuple)
    return pixel


def test_an_experiment_is_shown_before_and_after_augmentation(mimiclab: Verb, files: Path) -> None:
    code, out, err = mimiclab("data", "view", "x.yaml", "--num", "1")
    assert (code, err) == (0, "")
    assert out == f"sheet.png: 1 samples of {files / 'a.json'} from step 0, before and after augmentation\n"
    with Image.open(files / "sheet.png") as sheet:
        # Two panels of 320 x 160, twice the images, under a strip with their titles.
        assert sheet.size == (644, 180)
    sheet_path = files / "sheet.png"
    # Stored: the object is on the left. Mirrored in training: on the right.
    assert colour_at(sheet_path, 60, 20 + 80) == RED
    assert colour_at(sheet_path, 260, 20 + 80) == GREY
    assert colour_at(sheet_path, 324 + 60, 20 + 80) == GREY
    assert colour_at(sheet_path, 324 + 260, 20 + 80) == RED
    # The box is drawn around it in both.
    green = PALETTE[0]
    outline = tuple(int(green[i : i + 2], 16) for i in (1, 3, 5))
    assert colour_at(sheet_path, 20, 20 + 80) == outline
    assert colour_at(sheet_path, 324 + 300, 20 + 80) == outline


def test_samples_are_those_of_the_step_and_of_the_next_ones(mimiclab: Verb, files: Path) -> None:
    # Every image has a brightness of its own, so that a picture tells which one it shows.
    for number in range(3):
        Image.new("RGB", (160, 80), (50 * number + 50,) * 3).save(files / "images" / f"{number}.png")
    from mimiclab.data.order import Order

    order = Order(3, 2, seed=0)
    for step in (0, 5):
        assert mimiclab("data", "view", "x.yaml", "--num", "4", "--step", str(step), "--output", "s.png")[0] == 0
        expected = [slot.index for each in (step, step + 1) for slot in order.slots(each)]
        with Image.open("s.png") as sheet:
            columns = (sheet.width + 16) // (644 + 16)
        found = []
        for place in range(4):
            row, column = divmod(place, columns)
            before = colour_at(Path("s.png"), 660 * column + 200, 196 * row + 140)
            after = colour_at(Path("s.png"), 660 * column + 324 + 120, 196 * row + 140)
            assert before == after
            found.append((before[0] - 50) // 50)
        assert found == expected


def test_overrides_change_what_training_does(mimiclab: Verb, files: Path) -> None:
    assert mimiclab("data", "view", "x.yaml", "--num", "1", "--set", "data.flip=0")[0] == 0
    assert colour_at(files / "sheet.png", 324 + 60, 100) == RED


def test_an_annotation_file_is_shown_as_an_experiment_would_by_default(mimiclab: Verb, files: Path) -> None:
    code, out, _ = mimiclab("data", "view", "a.json", "--images", "images", "--output", "b.jpg")
    assert code == 0
    assert out.startswith("b.jpg: 16 samples of a.json from step 0")
    with Image.open("b.jpg") as sheet:
        assert sheet.format == "JPEG"
        assert sheet.height < 2 * sheet.width < 4 * sheet.height


def test_a_packed_set_is_shown_like_its_files(mimiclab: Verb, files: Path) -> None:
    assert mimiclab("data", "pack", "a.json", "packed", "--images", "images", "--workers", "1")[0] == 0
    assert mimiclab("data", "view", "packed", "--num", "3", "--output", "packed.png")[0] == 0
    assert mimiclab("data", "view", "a.json", "--images", "images", "--num", "3")[0] == 0
    assert (files / "packed.png").read_bytes() == (files / "sheet.png").read_bytes()


def test_images_of_any_shape_fit_into_the_sheet() -> None:
    pictures = [Image.new("RGB", (100, height), "red") for height in (10, 300, 40, 50, 60)]
    sheet = contact_sheet(pictures)
    # Four in a row, then one; each row as high as its highest.
    assert sheet.size == (4 * 100 + 3 * 16, 300 + 16 + 60)
    assert sheet.getpixel((50, 350)) == (255, 0, 0)
    assert sheet.getpixel((150, 350)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no.yaml"], "no.yaml: no such file; expected an experiment file"),
        (["no.json", "--images", "images"], "no.json: no such annotation file"),
        (["a.json"], "a.json: --images must say which folder its images are in"),
        (["a.json", "--images", "no"], "no: no such folder of images"),
        (["x.yaml", "--images", "images"], "--images goes with an annotation file (.json) only, found x.yaml"),
        (["a.json", "--images", "images", "--set", "seed=1"], "--set goes with an experiment (.yaml) only"),
        (["images"], "images/manifest.json"),
        (["no"], "no/manifest.json"),
        (["x.yaml", "--output", "no/sheet.png"], "--output no/sheet.png: cannot be written: expected a file in a"),
        (["x.yaml", "--output", "images"], "--output images: found the suffix '', expected one of .png"),
        (["x.yaml", "--output", "s.txt"], "--output s.txt: found the suffix '.txt', expected one of .png"),
        (["x.yaml", "--output", "s.pdf"], "--output s.pdf: found the suffix '.pdf', expected one of .png, .jpg"),
        (["x.yaml", "--output", "d.png"], "--output d.png: cannot be written: expected a file in a folder"),
        (["x.yaml", "--output", "n" * 300 + "/s.png"], f"--output {'n' * 300}/s.png: cannot be written: expected a"),
        (["x.yaml", "--output", "n" * 300 + ".png"], f"--output {'n' * 300}.png: cannot be written: File name too"),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing(
    mimiclab: Verb, files: Path, args: list[str], message: str
) -> None:
    (files / "d.png").mkdir()
    before = sorted(files.rglob("*"))
    code, out, err = mimiclab("data", "view", *args)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert sorted(files.rglob("*")) == before


def test_what_was_there_stays_when_the_disk_is_full(mimiclab: Verb, files: Path) -> None:
    (files / "sheet.png").write_bytes(b"an older one")
    before = sorted(files.rglob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        code, _, err = mimiclab("data", "view", "x.yaml")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, err) == (2, "error: --output sheet.png: cannot be written: File too large\n")
    assert (files / "sheet.png").read_bytes() == b"an older one"
    assert sorted(files.rglob("*")) == before


def test_a_damaged_image_is_named(mimiclab: Verb, files: Path) -> None:
    for path in (files / "images").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    code, _, err = mimiclab("data", "view", "x.yaml")
    assert code == 2
    assert "cannot be read as an image" in err
    assert not (files / "sheet.png").exists()


def test_scenes_are_drawn_where_the_verb_says(mimiclab: Verb, tmp_path: Path) -> None:
    code, out, err = mimiclab("data", "scenes", "d", "--train", "3", "--val", "2", "--size", "48", "--seed", "9")
    assert (code, err) == (0, "")
    for name, num_images, line in zip(("train", "val"), (3, 2), out.splitlines(), strict=True):
        what, annotations, images = line.replace(", images in ", ": ").split(": ")
        assert what == name
        dataset = read_coco(tmp_path / annotations, tmp_path / images)
        assert dataset.classes == CLASSES
        assert [(image.width, image.height) for image in dataset.images] == [(48, 48)] * num_images
    assert mimiclab("data", "scenes", "d", "--train", "3", "--val", "2", "--size", "48", "--seed", "9")[1] == out


def test_scenes_that_cannot_be_drawn_are_refused(mimiclab: Verb, tmp_path: Path) -> None:
    for option, value, expected in (
        ("--size", 8, "size must be 32 or more"),
        ("--seed", -1, "seed must be 0 or more"),
        ("--seed", 2**32, f"seed must be {2**32 - 1} or less"),
    ):
        said = mimiclab("data", "scenes", "d", option, str(value), "--train", "1", "--val", "1")
        assert said == (2, "", f"error: scenes: {expected}, found {value}\n")
    assert not (tmp_path / "d").exists()
    (tmp_path / "file").touch()
    code, _, err = mimiclab("data", "scenes", "file", "--train", "1", "--val", "1")
    assert code == 2
    assert "cannot write the scenes there" in err
