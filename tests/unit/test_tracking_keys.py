"""Names from the data as keys: MLflow takes each, and no two are the same."""

import pytest
from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH, _validate_metric_name

from mimiclab.tracking.keys import as_key, metric_keys, picture_keys
from mimiclab.tracking.protocol import check_picture, make_rows

CLASSES = (
    "traffic light-2.x",
    "猫",
    "狗",
    "Größe",
    "Grüße",
    "किताब",  # its vowel signs are no letters
    "cone (traffic)",
    "cone [traffic]",
    "a/b",
    "a:b",
    "a//b/",
    "../a",
    ".",
    "..",
    "",
    "a\nb",
    "a\0b",
    "x" * 239,
    "x" * 240,
    "x" * 239 + "y",
    "猫" * 300,
    "\ud800",  # half of a character, which JSON can hold
    "\udfff",
)


def test_mlflow_takes_the_key_of_every_class_and_each_has_its_own() -> None:
    names = [f"student/AP/{name}" for name in CLASSES]
    keys = metric_keys(names)
    assert list(keys) == names
    assert len(set(keys.values())) == len(CLASSES)
    for key in keys.values():
        _validate_metric_name(key)
        assert len(key) <= MAX_ENTITY_KEY_LENGTH  # of the columns too, which PostgreSQL counts in characters
        assert key.count("/") == 2
    assert len(make_rows(0, dict.fromkeys(keys.values(), 0.5))) == len(CLASSES)
    assert metric_keys(names[::-1]) == keys, "the same in any order"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("student/AP/traffic light-2.x", "student/AP/traffic light-2.x"),
        ("student/AP/cone (traffic), a+b/c:d", "student/AP/cone _traffic__ a_b_c_d"),
        ("student/AP/猫", "student/AP/猫"),
        ("student/AP/" + "x" * 239, "student/AP/" + "x" * 239),
        ("student/errors/missed", "student/errors/missed"),
        ("epoch", "epoch"),
    ],
)
def test_a_metric_keeps_what_mlflow_takes_of_its_name(name: str, key: str) -> None:
    assert metric_keys([name]) == {name: key}


def test_names_that_are_alike_or_long_end_with_a_hash_and_no_others_do_whatever_the_head() -> None:
    keys = metric_keys([f"{head}/AP/{name}" for head in ("student", "teacher") for name in ("a(b", "a[b", "c(d")])
    assert list(keys.values())[:3] == ["student/AP/a_b-38d5ec2d", "student/AP/a_b-cd40a0ba", "student/AP/c_d"]
    assert list(keys.values())[3:] == ["teacher/AP/a_b-38d5ec2d", "teacher/AP/a_b-cd40a0ba", "teacher/AP/c_d"]


def test_pictures_have_keys_of_their_own_that_are_short_enough_for_a_file() -> None:
    names = ("000001", "000001", "猫", "狗", "größe+1", "..", "y" * 139, "y" * 140, "y" * 250, "a b-c.d")
    keys = picture_keys(dict(enumerate(names, start=7)))
    assert len(set(keys.values())) == len(names)
    for key in keys.values():
        check_picture(f"validation/{key}", 0)
        assert "/" not in key
    assert keys[11] == "gr__e_1"
    assert keys[13] == "y" * 139
    assert keys[14].startswith("y" * 120)
    assert keys[16] == "a b-c.d"


def test_a_name_becomes_one_part_of_any_key() -> None:
    assert as_key("cone (traffic), größe/a+b") == "cone _traffic__ gr__e_a_b"
    assert as_key("traffic light-2.x") == "traffic light-2.x"
