"""Checking a data set: every defect that is planted is found by its name, and nothing else is."""

import json
import math
import os
import re
import shutil
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from rich.console import Console

from mimiclab.cli import main
from mimiclab.data.check import Source, check
from mimiclab.data.coco import read_coco
from mimiclab.data.findings import Finding, Kind
from mimiclab.data.flaws import find_flaws
from mimiclab.data.images import decode
from mimiclab.data.limits import MIN_BOX_SIDE
from mimiclab.data.listing import read_listing
from mimiclab.data.measures import reach
from mimiclab.data.probe import probe_image, probe_images
from mimiclab.data.report import Report
from mimiclab.data.scenes import ScenesPaths, generate_scenes
from mimiclab.errors import UserError
from mimiclab.experiment import load_experiment

DATA = Path(os.environ.get("MIMICLAB_DATA", Path(__file__).parents[3] / "shared" / "data"))
BCCD = DATA / "bccd"
NUM_IMAGES = 24
SIZE = 64
QUIET = Console(quiet=True)

Content = dict[str, Any]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> ScenesPaths:
    return generate_scenes(tmp_path_factory.mktemp("scenes"), seed=3, num_train=NUM_IMAGES, num_val=8, size=SIZE)


@pytest.fixture
def mimiclab(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "150")

    def run(*args: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([*map(str, args)])
        code = caught.value.code
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    return run


def load(path: Path) -> Content:
    content: Content = json.loads(path.read_text())
    return content


def plant(scenes: ScenesPaths, folder: Path) -> tuple[Path, Path, set[tuple[str, Any]]]:
    """A copy of the training scenes with every defect, and each as (kind, id, name or place) that must be found."""
    images = folder / "images"
    shutil.copytree(scenes.train_images, images)
    content = load(scenes.train_annotations)
    entries, annotations, categories = content["images"], content["annotations"], content["categories"]
    full = {annotation["image_id"] for annotation in annotations}
    expected: set[tuple[str, Any]] = {
        ("no-objects", entry["file_name"]) for entry in entries if entry["id"] not in full
    }

    def free() -> Content:
        """An image that has objects and no defect yet."""
        entry: Content = next(entry for entry in entries if entry["id"] in full)
        full.remove(entry["id"])
        return entry

    def rewrite(kind: str | None, suffix: str, mode: str = "RGB", **options: Any) -> Path:
        """Another file for an image; in place of its own."""
        entry = free()
        old = images / entry["file_name"]
        new = old.with_suffix(suffix)
        with Image.open(old) as image:
            pixels = image.convert(mode)
        old.unlink()
        pixels.save(new, **options)
        entry["file_name"] = new.name
        if kind is not None:
            expected.add((kind, new.name))
        return new

    def damage(path: Path, content: bytes) -> None:
        path.write_bytes(content)
        expected.add(("image-unreadable", path.name))

    # Files.
    missing = free()
    (images / missing["file_name"]).unlink()
    expected.add(("image-missing", missing["file_name"]))
    jpeg = rewrite(None, ".jpg")
    damage(jpeg, jpeg.read_bytes()[:-200])
    png = images / free()["file_name"]
    damage(png, png.read_bytes()[: png.stat().st_size // 2])
    damage(images / free()["file_name"], b"no image at all")
    damage(images / free()["file_name"], b"")
    damage(images / free()["file_name"], b"")  # of the same content, which is no finding of its own
    other = free()
    other["width"] += 1
    expected.add(("image-size", other["file_name"]))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    rewrite("image-rotated", ".jpg", exif=exif)
    rewrite("image-one-channel", ".jpg", mode="L")
    rewrite("image-cmyk", ".jpg", mode="CMYK")
    rewrite("image-alpha", ".png", mode="RGBA")
    deep = rewrite("image-deep", ".png")
    Image.fromarray(np.full((SIZE, SIZE), 40_000, dtype=np.uint16)).save(deep)
    expected.add(("image-one-channel", deep.name))
    (images / "deeper").mkdir()
    shutil.copy(images / entries[-1]["file_name"], images / "deeper" / "copy.png")
    (images / "deeper" / "readme.txt").write_text("no image")
    expected.add(("image-unlisted", str(Path("deeper", "copy.png"))))
    first, second = free(), free()
    shutil.copy(images / first["file_name"], images / second["file_name"])
    expected.add(("duplicate-image", first["file_name"]))

    # Entries. What refers to the second image of an id, or to a listed copy, is sound.
    for key in ("width", "height"):
        unsized = free()
        del unsized[key]
        expected.add(("malformed-image", unsized["file_name"]))
    twice = free()
    entries.append({**twice, "id": 900})
    annotations.append({**annotations[-1], "image_id": 900, "id": 900})
    expected.add(("listed-twice", twice["file_name"]))
    repeated = free()
    entries.append({**free(), "id": repeated["id"]})
    expected.add(("duplicate-image-id", repeated["id"]))
    expected.add(("listed-twice", entries[-1]["file_name"]))
    categories += [{"id": 1, "name": "again"}, {"id": 60, "name": categories[1]["name"]}, {"id": 61, "name": "unused"}]
    expected |= {
        ("duplicate-category-id", 1),
        ("duplicate-category-name", categories[1]["id"]),
        ("unused-category", 60),
        ("unused-category", 61),
    }
    expected |= {("malformed-image", f"images[{len(entries)}]"), ("malformed-image", "no-id.png")}
    entries += ["no object", {"file_name": "no-id.png", "width": 1, "height": 1}]
    categories += [{"id": "7", "name": "text"}, {"id": 62, "name": None}]
    annotations.append({**annotations[0], "id": 962, "category_id": 62})
    expected |= {("malformed-category", "categories[7]"), ("malformed-category", 62)}

    # Annotations, each of an image that is sound but for it.
    good = next(item for item in annotations if item["image_id"] == NUM_IMAGES - 2)
    assert good["image_id"] in full
    wrong: dict[int, tuple[str, Content]] = {
        1000: ("box-not-finite", {"bbox": [1, math.nan, 4, 4]}),
        1001: ("box-not-finite", {"bbox": [1, 1, math.inf, 4]}),
        1002: ("box-not-finite", {"bbox": [1, 1, 10**400, 4]}),
        1003: ("box-negative", {"bbox": [9, 9, -4, 4]}),
        1004: ("box-no-area", {"bbox": [9, 9, 4, 0]}),
        1005: ("box-outside", {"bbox": [SIZE, 9, 4, 4]}),
        1006: ("box-outside", {"bbox": [9, -4, 4, 4]}),
        1007: ("box-over-border", {"bbox": [SIZE - 2, 9, 4, 4]}),
        1008: ("box-over-border", {"bbox": [-1, 9, 4, 4]}),
        1009: ("no-such-image", {"image_id": 12345}),
        1010: ("no-such-category", {"category_id": 99}),
        1011: ("crowd", {"iscrowd": 1}),
        1012: ("crowd-flag", {"iscrowd": "0"}),
        1017: ("box-no-area", {"bbox": [9, 9, 4, 5e-4]}),
        1018: ("box-no-area", {"bbox": [-4, 9, 4 + 1e-5, 4]}),
        1019: ("box-no-area", {"bbox": [SIZE - 1e-7, 9, 4, 4]}),
        1013: ("malformed-annotation", {"image_id": "1"}),
        1014: ("malformed-annotation", {"bbox": [1, 2, 3]}),
        1015: ("malformed-annotation", {"bbox": [1, 2, 3, True]}),
        1016: ("malformed-annotation", {"category_id": True}),
        2**53 + 1: ("box-negative", {"bbox": [9, 9, 4, -4]}),
    }
    expected |= {(kind, number) for number, (kind, _) in wrong.items()}
    expected.add(("crowd", 1012))  # what is no empty text is true
    annotations += [{**good, **keys, "id": number} for number, (_, keys) in wrong.items()]
    annotations += [{**good, "id": 2**53}, {**good, "id": 1100}, {**good, "id": 1100}, {**good, "id": 2**63}, []]
    expected.add(("duplicate-annotation-id", 1100))
    expected |= {("malformed-annotation", f"annotations[{position}]") for position in range(len(annotations))[-2:]}
    annotations += [{**good, "id": 1200}]
    del annotations[-1]["bbox"]
    expected.add(("malformed-annotation", 1200))
    path = folder / "planted.json"
    path.write_text(json.dumps(content))
    return path, images, expected


def named(finding: Finding) -> tuple[str, Any]:
    """A finding by its kind and the first that it has of annotation id, file name, image id, category id, place."""
    by_image_id = finding.kind is Kind.DUPLICATE_IMAGE_ID
    names = (finding.annotation_id, finding.image_id if by_image_id else finding.file_name, finding.category_id)
    return finding.kind.label, next((name for name in names if name is not None), finding.position)


def kinds(report: Report) -> set[str]:
    return {finding.kind.label for finding in report.findings}


def test_every_planted_defect_is_found_by_name_and_nothing_else_is(scenes: ScenesPaths, tmp_path: Path) -> None:
    annotations, images, expected = plant(scenes, tmp_path)
    report = check([Source(annotations, images)], QUIET)
    found = Counter(map(named, report.findings))
    assert set(found) == expected
    assert set(found.values()) == {1}
    assert not report.clean
    # Those that need an empty file or a second one have tests of their own.
    assert {kind.label for kind in Kind} - kinds(report) == {"empty", "classes-differ", "leak"}


def test_json_has_what_the_table_has(scenes: ScenesPaths, tmp_path: Path, mimiclab: Run) -> None:
    annotations, images, _ = plant(scenes, tmp_path)
    code, out, _ = mimiclab("data", "check", annotations, "--images", images, "--json")
    document = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert code == 1
    assert document["clean"] is False
    assert Counter(finding["kind"] for finding in document["findings"]) == document["counts"]

    code, out, _ = mimiclab("data", "check", annotations, "--images", images, "--all")
    assert code == 1
    titles = {kind.title: kind for kind in Kind}
    rows = re.findall(r"^ +(?:error|warning|note) +(.+?)  +(\d+)  ", out, flags=re.MULTILINE)
    assert {titles[title].label: int(count) for title, count in rows} == document["counts"]
    for finding in document["findings"]:
        assert f"\n{finding['severity']}: {finding['message']}\n" in out


def test_a_clean_set_has_notes_at_most(scenes: ScenesPaths, mimiclab: Run) -> None:
    code, out, err = mimiclab("data", "check", scenes.train_annotations, "--images", scenes.train_images)
    assert code == 0
    assert err == ""
    assert "images without objects" in out  # every twelfth scene
    code, out, err = mimiclab(
        *("data", "check", scenes.train_annotations, "--images", scenes.train_images),
        *("--val", scenes.val_annotations, "--val-images", scenes.val_images, "--json"),
    )
    assert code == 0
    assert json.loads(out)["counts"] == {"no-objects": NUM_IMAGES // 12}
    assert err == ""


def test_without_a_folder_the_file_alone_is_checked(scenes: ScenesPaths, mimiclab: Run) -> None:
    code, out, _ = mimiclab("data", "check", scenes.val_annotations)
    assert code == 0
    assert "--images names their folder" in out


def test_what_is_an_error_is_what_training_leaves_out(scenes: ScenesPaths, tmp_path: Path) -> None:
    content = load(scenes.val_annotations)
    draw = np.random.default_rng(0)
    numbers = [
        0.0,
        -1.0,
        1e-9,
        5e-4,
        2e-3,
        1.0,
        7.5,
        SIZE - 1e-7,
        float(SIZE),
        SIZE + 1.0,
        -1e-9,
        math.nan,
        math.inf,
        1e39,
        1e308,
    ]
    content["annotations"] = [
        {
            "id": number,
            "image_id": int(draw.choice([1, 2, 99], p=[0.5, 0.45, 0.05])),
            "category_id": int(draw.choice([1, 4, 9], p=[0.5, 0.45, 0.05])),
            "bbox": draw.choice(numbers, 4).tolist(),
        }
        for number in range(2000)
    ]
    path = tmp_path / "drawn.json"
    path.write_text(json.dumps(content))
    left_out = [re.search(r"annotation (\d+) of", text) for text in read_coco(path, scenes.val_images).left_out]
    by_training = {int(match[1]) for match in left_out if match}
    findings, objects = find_flaws(read_listing(path))
    errors = {finding.annotation_id for finding in findings if finding.kind.severity == "error"}
    assert errors == by_training
    assert len(objects.sides) == 2000 - len(errors)
    assert 100 < len(errors) < 1900
    assert (objects.sides.astype(np.float32) >= MIN_BOX_SIDE).all()
    assert (objects.sides <= SIZE).all()


def test_rounding_to_two_decimals_reaches_over_no_border(scenes: ScenesPaths, tmp_path: Path) -> None:
    content = load(scenes.val_annotations)
    content["annotations"] = [
        {"id": number, "image_id": 1, "category_id": 1, "bbox": [0, 0, SIZE + over, SIZE]}
        for number, over in enumerate((0.0, 0.009, 0.02))
    ]
    path = tmp_path / "border.json"
    path.write_text(json.dumps(content))
    over = [item.annotation_id for item in find_flaws(read_listing(path))[0] if item.kind is Kind.BOX_OVER_BORDER]
    assert over == [2]


def test_an_image_in_both_sets_is_found_by_its_content(scenes: ScenesPaths, tmp_path: Path, mimiclab: Run) -> None:
    shutil.copytree(scenes.val_images, tmp_path / "val")
    shutil.copy(scenes.train_images / "000003.png", tmp_path / "val" / "000005.png")
    report = check(
        [Source(scenes.train_annotations, scenes.train_images), Source(scenes.val_annotations, tmp_path / "val")], QUIET
    )
    (leak,) = [finding for finding in report.findings if finding.kind.severity != "note"]
    assert (leak.kind, leak.file_name, leak.image_id) == (Kind.LEAK, "000005.png", 5)
    assert "000003.png" in leak.message
    assert leak.file == str(scenes.val_annotations)


def test_sets_of_one_folder_list_its_files_together(scenes: ScenesPaths, tmp_path: Path, mimiclab: Run) -> None:
    content = load(scenes.train_annotations)
    for name, low, high in (("train", 1, 12), ("val", 13, NUM_IMAGES)):
        part = {
            "images": [item for item in content["images"] if low <= item["id"] <= high],
            "annotations": [item for item in content["annotations"] if low <= item["image_id"] <= high],
            "categories": content["categories"],
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    arguments = ("data", "check", tmp_path / "train.json", "--images", scenes.train_images, "--json")
    code, out, _ = mimiclab(*arguments)
    assert code == 0  # a folder may well hold more than one set
    assert json.loads(out)["counts"]["image-unlisted"] == 12
    code, out, _ = mimiclab(*arguments, "--val", tmp_path / "val.json")
    assert code == 0
    assert "image-unlisted" not in json.loads(out)["counts"]
    # The same files by another folder of theirs.
    part["images"] = [{**item, "file_name": f"train/{item['file_name']}"} for item in part["images"]]
    (tmp_path / "val.json").write_text(json.dumps(part))
    code, out, _ = mimiclab(*arguments, "--val", tmp_path / "val.json", "--val-images", scenes.train_images.parent)
    unlisted = [item["file_name"] for item in json.loads(out)["findings"] if item["kind"] == "image-unlisted"]
    assert unlisted == [f"val/{number:06d}.png" for number in range(1, 9)]


def test_other_classes_in_the_validation_set_are_an_error(scenes: ScenesPaths, tmp_path: Path) -> None:
    content = load(scenes.val_annotations)
    content["categories"][0]["name"] = "circle"
    content["categories"].append({"id": 1, "name": None})
    path = tmp_path / "val.json"
    path.write_text(json.dumps(content))
    report = check([Source(scenes.train_annotations), Source(path)], QUIET)
    (differ,) = [finding for finding in report.findings if finding.kind is Kind.CLASSES_DIFFER]
    assert "circle" in differ.message


def test_a_file_without_anything_to_learn_is_an_error(tmp_path: Path, mimiclab: Run) -> None:
    path = tmp_path / "empty.json"
    path.write_text('{"images": [], "annotations": [], "categories": []}')
    code, out, _ = mimiclab("data", "check", path, "--json")
    assert code == 1
    assert json.loads(out)["counts"] == {"empty": 3}
    code, out, _ = mimiclab("data", "check", path, "--all")
    assert code == 1
    assert "there are no images that can be used" in out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "expected an object on top, found a list"),
        ('{"images": [], "categories": []}', "has no key 'annotations'"),
        ('{"images": {}, "categories": [], "annotations": []}', "images should be a list, found an object"),
        (None, "no such annotation file"),
    ],
)
def test_what_is_no_coco_file_is_a_mistake_of_the_user(
    tmp_path: Path, mimiclab: Run, text: str | None, words: str
) -> None:
    path = tmp_path / "instances.json"
    if text is not None:
        path.write_text(text)
    code, out, err = mimiclab("data", "check", path, "--json")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {path}: ")
    assert words in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to check"),
        (["{val}", "--images", "nowhere"], "nowhere: no such folder of images"),
        (["{val}", "--val", "{val}"], "expected two files"),
        (["{val}", "--val-images", "here"], "--val-images here: expected the annotation file"),
    ],
)
def test_arguments_that_do_not_fit_are_mistakes_of_the_user(
    scenes: ScenesPaths, mimiclab: Run, arguments: list[str], words: str
) -> None:
    code, out, err = mimiclab("data", "check", *(text.format(val=scenes.val_annotations) for text in arguments))
    assert (code, out) == (2, "")
    assert words in err


def test_a_file_too_large_for_the_memory_is_refused_before_it_is_read(
    scenes: ScenesPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = scenes.train_annotations.stat().st_size
    memory = SimpleNamespace(available=10 * size)
    monkeypatch.setattr("mimiclab.data.json_file.psutil.virtual_memory", lambda: memory)
    read_listing(scenes.train_annotations)
    memory.available -= 1
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda _: pytest.fail("it was read"))
        with pytest.raises(UserError, match=r"instances_train.json: [\d.e-]+ GiB .* about [\d.e-]+ GiB, .* available"):
            read_listing(scenes.train_annotations)


def test_a_container_s_limit_counts_where_it_leaves_less_than_the_machine_has(
    scenes: ScenesPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 10 * scenes.train_annotations.stat().st_size
    monkeypatch.setattr("mimiclab.data.json_file._CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{needed + 700}\n")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 700\ninactive_file 300\n")
    read_listing(scenes.train_annotations)
    (tmp_path / "memory.current").write_text("1001\n")
    with pytest.raises(UserError, match="too much for the memory"):
        read_listing(scenes.train_annotations)
    (tmp_path / "memory.max").write_text("max\n")
    read_listing(scenes.train_annotations)


def test_a_name_that_no_terminal_and_no_file_system_takes_is_found(
    scenes: ScenesPaths, tmp_path: Path, mimiclab: Run
) -> None:
    content = load(scenes.val_annotations)
    content["images"][0]["file_name"] = "half \ud83d.png"
    content["images"][1]["file_name"] = "zero \0.png"
    content["images"][2]["file_name"] = "long" * 100 + ".png"
    path = tmp_path / "names.json"
    path.write_text(json.dumps(content))
    code, out, _ = mimiclab("data", "check", path, "--images", scenes.val_images, "--all")
    assert code == 1
    assert "half \\ud83d.png" in out
    _, out, _ = mimiclab("data", "check", path, "--images", scenes.val_images, "--json")
    found = {(item["file_name"], item["kind"]) for item in json.loads(out)["findings"] if item["severity"] == "error"}
    assert found == {
        ("half \ud83d.png", "image-missing"),
        ("zero \0.png", "image-missing"),
        ("long" * 100 + ".png", "image-unreadable"),
    }


def test_of_a_large_group_a_message_names_three(scenes: ScenesPaths, tmp_path: Path) -> None:
    content = load(scenes.val_annotations)
    source = scenes.val_images / content["images"][0]["file_name"]
    content["images"] += [
        {"id": 100 + number, "file_name": f"same-{number:02d}.png", "width": SIZE, "height": SIZE}
        for number in range(20)
    ]
    shutil.copytree(scenes.val_images, tmp_path / "images")
    for number in range(20):
        shutil.copy(source, tmp_path / "images" / f"same-{number:02d}.png")
    content["annotations"] += [
        {**content["annotations"][0], "id": 900, "image_id": 100 + number} for number in range(5)
    ]
    path = tmp_path / "same.json"
    path.write_text(json.dumps(content))
    both = [Source(path, tmp_path / "images"), Source(scenes.val_annotations, scenes.val_images)]
    findings = {finding.kind: finding for finding in check(both, QUIET).findings}
    names = "000001.png, same-00.png, same-01.png and 18 more"
    assert findings[Kind.DUPLICATE_IMAGE].message == f"{tmp_path / 'images'}: {names} hold the same bytes"
    leak = check(both, QUIET).findings
    assert {f"000001.png holds the same bytes as {names} of the training set"} <= {
        finding.message.partition(": ")[2] for finding in leak if finding.kind is Kind.LEAK
    }
    assert findings[Kind.DUPLICATE_ANNOTATION_ID].message.endswith("5 times: of images 100, 101, 102 and 2 more")


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


@pytest.mark.parametrize(("colour", "channels", "alpha"), [(2, 3, False), (6, 4, True)])
def test_16_bits_are_found_where_pillow_gives_8(tmp_path: Path, colour: int, channels: int, alpha: bool) -> None:
    path = tmp_path / "deep.png"
    header = struct.pack(">IIBBBBB", 5, 4, 16, colour, 0, 0, 0)
    pixels = zlib.compress((b"\0" + bytes(range(5 * 2 * channels))) * 4)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    facts = probe_image(path)
    assert (facts.problem, facts.size, facts.deep) == (None, (5, 4), True)
    assert (facts.one_channel, facts.alpha) == (False, alpha)


def test_what_turns_itself_upright_is_read_as_training_reads_it(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for suffix in (".tif", ".jpg"):
        path = (tmp_path / "turned").with_suffix(suffix)
        Image.new("RGB", (8, 5)).save(path, exif=exif)
        facts = probe_image(path)
        height, width = decode(path.read_bytes(), str(path)).shape[:2]
        assert facts.size == (width, height)
        assert facts.orientation == (6 if (width, height) == (8, 5) else 1)


def test_an_interrupt_ends_the_threads(scenes: ScenesPaths) -> None:
    paths = sorted(scenes.train_images.iterdir()) * 20
    before, done = threading.active_count(), []

    def interrupt(num: int) -> None:
        done.append(num)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probe_images(paths, interrupt)
    assert 0 < sum(done) < len(paths)
    assert threading.active_count() == before


def experiment(folder: Path, scenes: ScenesPaths, model: str = "{}") -> Path:
    path = folder / "x.yaml"
    path.write_text(
        "name: x\ndata:\n"
        f"  train: {{annotations: {scenes.train_annotations}, images: {scenes.train_images}}}\n"
        f"  val: {{annotations: {scenes.val_annotations}, images: {scenes.val_images}}}\n"
        f"  resize: {{short: {2 * SIZE}, long: {2 * SIZE}}}\nmodel: {model}\n"
    )
    return path


def test_boxes_below_the_reach_of_the_smallest_anchor_are_counted_by_class(
    scenes: ScenesPaths, tmp_path: Path, mimiclab: Run
) -> None:
    # An anchor of 4 x 8 = 32 px at twice the size: squares from 16 / sqrt(2) = 11.3 px on, as stored, reach IoU 0.5.
    content = load(scenes.train_annotations)
    boxes = {1: [[0, 0, 11, 11], [0, 0, 12, 12], [0, 0, 4, 40]], 2: [[0, 0, 4, 30]], 3: [[60, 60, 30, 30]]}
    content["annotations"] = [
        {"id": 10 * category + number, "image_id": 1, "category_id": category, "bbox": box}
        for category, several in boxes.items()
        for number, box in enumerate(several)
    ]
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps(content))
    code, out, _ = mimiclab("data", "check", path, "--experiment", experiment(tmp_path, scenes), "--json")
    document = json.loads(out)
    assert code == 1  # the box that reaches over the border counts with what is inside
    (only,) = document["sets"]
    assert [(row["objects"], row["images"], row["too_small"]) for row in only["classes"]] == [
        (3, 1, 1),
        (1, 1, 1),
        (1, 1, 1),
        (0, 0, 0),
    ]
    bounds = document["side_bounds"]
    assert only["classes"][0]["sizes"] == [3 if bound == 8 else 0 for bound in bounds]
    assert only["classes"][2]["sizes"] == [1 if bound == 0 else 0 for bound in bounds]
    assert document["anchor"] == {"side": 32, "least_side": pytest.approx(22.627417), "short": 128, "long": 128}
    _, out, _ = mimiclab("data", "check", path, "--experiment", experiment(tmp_path, scenes))
    assert "1 (33.3%)" in out
    assert "3 (60.0%)" in out


@pytest.mark.parametrize(
    ("model", "side"),
    [
        ("{anchors: {scale: 2}, pyramid: {min_level: 4}}", 32.0),
        ("{detector: retinanet, anchors: {scale: 3}}", 24.0),
        ("{detector: faster_rcnn, anchors: {scale: 4}, pyramid: {min_level: 4}}", 32.0),
        ("{detector: fcos}", None),
    ],
)
def test_the_smallest_anchor_is_that_of_the_detector(
    scenes: ScenesPaths, tmp_path: Path, model: str, side: float | None
) -> None:
    found = reach(load_experiment(experiment(tmp_path, scenes, model)).experiment)
    assert (found and found.anchor) == side


def test_an_experiment_names_both_sets(scenes: ScenesPaths, tmp_path: Path, mimiclab: Run) -> None:
    file = experiment(tmp_path, scenes)
    own = [str(scenes.train_annotations), str(scenes.val_annotations)]
    for arguments in ([], [scenes.train_annotations]):
        code, out, _ = mimiclab("data", "check", *arguments, "--experiment", file, "--json")
        assert code == 0
        sets = json.loads(out)["sets"]
        assert [each["annotations"] for each in sets] == own
        assert [each["images"] for each in sets] == [str(scenes.train_images), str(scenes.val_images)]
    _, out, _ = mimiclab("data", "check", scenes.val_annotations, "--experiment", file, "--json")
    (only,) = json.loads(out)["sets"]
    assert (only["annotations"], only["images"]) == (own[1], None)


@pytest.mark.skipif(not BCCD.is_dir(), reason=f"BCCD is not at {BCCD}")
def test_bccd_has_a_box_without_area_in_each_split(mimiclab: Run) -> None:
    code, out, err = mimiclab(
        *("data", "check", BCCD / "annotations" / "instances_train.json", "--images", BCCD / "train"),
        *("--val", BCCD / "annotations" / "instances_val.json", "--val-images", BCCD / "val", "--json"),
    )
    document = json.loads(out)
    assert (code, err) == (1, "")
    assert document["counts"] == {"box-no-area": 2}
    assert [(item["annotation_id"], item["file_name"]) for item in document["findings"]] == [
        (2288, "BloodImage_00343.jpg"),
        (887, "BloodImage_00338.jpg"),
    ]
    assert [sum(row["objects"] for row in each["classes"]) for each in document["sets"]] == [2804, 1137]
