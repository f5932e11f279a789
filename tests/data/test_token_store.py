import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from maskgit_pl.data.token_store import StoreDescription, is_complete, open_store
from maskgit_pl.data.tokenizing import StoreParts
from tests.data.conftest import contents

DESCRIPTION = StoreDescription((2, 3), 256, 28, "tokenizer", "data", ("a", "b"), {"train": 10, "val": 3})
LABELS = np.arange(10) % 2
VIEWS = dataclasses.replace(DESCRIPTION, crops=2, flip=True)


def rows(part, mirrors: int) -> np.ndarray:
    """Returns tokens (samples, mirrors, 6): each row is different, and determined by split, sample and view."""
    first = (100 if part.split == "val" else 0) + np.arange(part.start, part.stop) * 10 + part.crop * mirrors
    return (first[:, None, None] + np.arange(mirrors)[:, None] + np.zeros(6, np.int64)) % 256


def make(folder: Path, description=DESCRIPTION, *, part_size: int = 4, share=slice(None)) -> bool:
    parts = StoreParts(folder, description, part_size=part_size)
    for part in parts.parts()[share]:
        if not parts.is_done(part):
            parts.write(part, rows(part, description.mirrors_of(part.split)), LABELS[part.start : part.stop])
    return parts.finish()


def test_view_v_of_sample_i_is_row_i_v_and_validation_has_one(tmp_path):
    assert [make(tmp_path, VIEWS, share=slice(rank, None, 3)) for rank in (2, 0, 1)] == [False, False, True]
    arrays = [f"{split}-{name}.npy" for split in ("train", "val") for name in ("labels", "tokens")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store.json", *arrays]
    stored = np.load(tmp_path / "train-tokens.npy")
    assert stored[:, 0].tolist() == [(10 * sample + view) % 256 for sample in range(10) for view in range(4)]
    readers = open_store(tmp_path, data="data")
    assert (readers["train"].views, readers["val"].views) == (4, 1)
    tokens, labels = readers["train"].read(np.array([7, 2]), np.array([3, 1]))
    assert (tokens[:, 0].tolist(), labels.tolist()) == ([73, 21], [1, 0])
    assert np.load(tmp_path / "val-tokens.npy")[:, 0].tolist() == [100, 110, 120]


def test_tokens_have_the_smallest_type_that_holds_every_code():
    sizes = {2**16: np.uint16, 2**16 + 1: np.uint32}
    assert {size: dataclasses.replace(DESCRIPTION, codebook_size=size).dtype for size in sizes} == sizes


def test_all_that_differs_from_the_wanted_origin_is_named_at_once(tmp_path):
    assert not make(tmp_path, share=slice(2))
    with pytest.raises(FileNotFoundError, match=r"not finished.*maskgit tokenize"):
        open_store(tmp_path, data="data")
    make(tmp_path)
    with pytest.raises(ValueError, match=r"data must be new, got data; its tokenizer must be me, got tok"):
        open_store(tmp_path, data="new", tokenizer="me")


class Killed(BaseException):
    """A kill: no code runs after it except ``with`` and ``finally``, which have nothing to undo."""


@pytest.mark.slow
@pytest.mark.parametrize("point", ["replace", "fsync", "unlink"])
def test_a_kill_at_any_moment_costs_a_part_and_changes_no_byte(tmp_path, monkeypatch, point):
    make(tmp_path / "older")
    make(tmp_path / "whole", VIEWS, part_size=10)
    original, kills = getattr(os, point), 0
    for moment in range(100):
        calls = iter(range(1000))

        def killing(*args, calls=calls, moment=moment, **options):
            if next(calls) == moment:
                raise Killed
            return original(*args, **options)

        folder = tmp_path / str(moment)
        shutil.copytree(tmp_path / "older", folder)  # must give way
        with monkeypatch.context() as patch:
            patch.setattr(os, point, killing)
            try:
                make(folder, VIEWS, part_size=10)
            except Killed:
                kills += 1
        if not is_complete(folder, VIEWS) and not is_complete(folder, DESCRIPTION):  # neither the new nor the older
            with pytest.raises((FileNotFoundError, ValueError), match=r"not finished|changed since|must be"):
                open_store(folder, data="data")
        assert make(folder, VIEWS, part_size=10)
        assert contents(folder) == contents(tmp_path / "whole")
        if next(calls) <= moment:
            break
    assert moment < 99
    assert kills >= (1 if point == "unlink" else 8)


def test_parts_of_another_tokenizer_are_not_used(tmp_path):
    make(tmp_path, share=slice(2))
    other = StoreParts(tmp_path, dataclasses.replace(DESCRIPTION, tokenizer="other"), part_size=4)
    assert not any(other.is_done(part) for part in other.parts())


def overwrite(path: Path, row: int, value: int) -> None:
    """Changes one value of an array on disk."""
    array = np.load(path, mmap_mode="r+")
    array[row] = value
    array.flush()


FIELDS = {  # word in the message -> changed field; None removes it
    "must have format 3": {"format": [[]]},
    "grid ": {"grid": [2, "x"]},
    "codebook_size": {"codebook_size": None},
    "classes": {"classes": {"a": 1}},
    "data": {"data": None},
    "extra": {"extra": 1},
}


@pytest.mark.parametrize("case", [*FIELDS, b"", b"[1]"])
def test_a_broken_description_is_refused_in_one_line_with_file_and_key(tmp_path, case):
    make(tmp_path)
    path = tmp_path / "store.json"
    if isinstance(case, bytes):
        path.write_bytes(case)
    else:
        fields = json.loads(path.read_text()) | FIELDS[case]
        path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    key = "" if isinstance(case, bytes) else case.strip()
    with pytest.raises(ValueError, match=rf"store\.json.*{key}") as caught:
        open_store(tmp_path, data="data")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600 + 2 * len(str(tmp_path))


SPOILS = {
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "gone": os.unlink,
    "pickled": lambda path: np.save(path, np.array([{}], dtype=object), allow_pickle=True),
    "a changed value": lambda path: overwrite(path, 0, 71),
    "a FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("name", ["val-tokens.npy", "train-labels.npy"])
@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_a_spoilt_array_is_refused_by_name_when_the_store_is_opened(tmp_path, spoil, name):
    make(tmp_path)
    path = tmp_path / name
    spoil(path)
    assert not is_complete(tmp_path, DESCRIPTION)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(name)):
        open_store(tmp_path, data="data")
    if path.is_fifo():  # a store replaces no device or pipe
        path.unlink()
    assert make(tmp_path)
    assert is_complete(tmp_path, DESCRIPTION)
