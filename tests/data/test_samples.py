""""""

import json

import numpy as np
import pytest

from maskgit_pl.data.samples import (
    ALWAYS_ALLOWED,
    MAX_IN_A_ROW,
    DataBudgetError,
    Labels,
    Unreadable,
    UnreadableImages,
    parse_class_names,
    write_unreadable,
)


@pytest.mark.parametrize("content", [" ant\n\nbee \r\n", "\ufeffant\r\nbee\r\n"], ids=["plain", "byte order mark"])
def test_names_stand_after_commas_or_one_a_line_of_a_file(tmp_path, content):
    (tmp_path / "names.txt").write_bytes(content.encode())
    assert parse_class_names("ant, bee") == parse_class_names(str(tmp_path / "names.txt")) == ["ant", "bee"]
    assert len(parse_class_names(",".join(map(str, range(1000))))) == 1000  # too long for a path


@pytest.mark.parametrize("given", ["ant,,bee", "ant,bee,ant", ""])
def test_names_that_are_empty_or_come_twice_are_refused(given):
    with pytest.raises(ValueError, match="class names must be unique and not empty"):
        parse_class_names(given)


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path):
    (tmp_path / "names.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"names\.txt must be UTF-8 text"):
        parse_class_names(str(tmp_path / "names.txt"))


@pytest.mark.parametrize("text", [b"1_000", b"", b"-1", b"cat", b"1.0", b"+1", "\u0661".encode(), b"01", b"3"])
def test_a_label_that_is_no_class_is_refused_by_name(text):
    labels = Labels(classes=("a", "b", "c"))
    assert labels.read(b"2\n", name="x.tar:a.cls") == 2
    with pytest.raises(ValueError, match=r"x\.tar:a\.cls must be a (decimal class number|class in \[0, 3\)), got"):
        labels.read(text, name="x.tar:a.cls")


def explain(index: int) -> Unreadable:
    return Unreadable(index, f"shard {index // 10}", f"shard {index // 10}:{index}.jpg", "damaged", "bad code word")


def counter(num_samples: int = 1000, budget: float = 1e-4) -> UnreadableImages:
    return UnreadableImages(explain, num_samples=num_samples, budget=budget)


def add(images: UnreadableImages, *replaced: tuple[int, int], batch: int = 100) -> None:
    """Adds a batch in which some samples were replaced, given as (drawn, shown)."""
    index, replacement = np.arange(batch), np.full(batch, -1)
    for row, (asked, shown) in enumerate(replaced):
        index[row], replacement[row] = asked, shown
    images.add(index, replacement)


def test_everything_passed_over_is_counted_by_shard_and_reason():
    images = counter()
    add(images)
    add(images, (8, 11), (8, 11), (999, 0))
    assert (images.seen, images.count, sorted(images.images)) == (200, 7, [8, 9, 10, 999])
    assert images.by_shard() == {"shard 0": 4, "shard 1": 2, "shard 99": 1}
    assert images.by_reason() == {"damaged": 7}


def test_ten_images_are_allowed_however_often_they_are_met_and_the_eleventh_is_not():
    images = counter()
    for number in range(ALWAYS_ALLOWED):
        add(images, (2 * number, 2 * number + 1), (0, 1))
    with pytest.raises(DataBudgetError, match=r"at most 0.0001 .* 10 in total, got 11 \(21 times in 1100 images\)"):
        add(images, (50, 51))


def test_more_than_ten_are_allowed_within_the_share():
    images = counter(budget=0.02)
    add(images, *((2 * number, 2 * number + 1) for number in range(ALWAYS_ALLOWED)), batch=1000)
    add(images, *((2 * number, 2 * number + 1) for number in range(10, 20)), batch=500)
    assert images.count == 20
    with pytest.raises(DataBudgetError):
        add(images, *((2 * number, 2 * number + 1) for number in range(30, 70)))


def test_budget_0_allows_none():
    add(counter(budget=0.0))
    with pytest.raises(DataBudgetError, match=r"shard 0:5.jpg: damaged: bad code word"):
        add(counter(budget=0.0), (5, 6))


@pytest.mark.parametrize(("num_samples", "length"), [(1000, MAX_IN_A_ROW), (23, 23)])
def test_a_hundred_in_a_row_or_all_end_the_run_whatever_the_budget(num_samples, length):
    add(counter(num_samples, budget=1.0), (5, (5 + length - 1) % num_samples))
    with pytest.raises(DataBudgetError, match=rf"{length} images in a row (.|\n)* and {length - 20} more"):
        add(counter(num_samples, budget=1.0), (5, (5 + length) % num_samples))


def test_the_file_lists_every_image(tmp_path):
    images = counter()
    add(images, (8, 10))
    write_unreadable(tmp_path / "run" / "unreadable.json", {"train": images})
    written = json.loads((tmp_path / "run" / "unreadable.json").read_text())["train"]
    assert (written["seen"], written["unreadable"], written["shards"]) == (100, 2, {"shard 0": 2})
    assert written["images"][1] == {
        "image": "shard 0:9.jpg", "index": 9, "times": 1, "reason": "damaged", "error": "bad code word",
    }  # fmt: skip
