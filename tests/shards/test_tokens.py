import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from maskgit_pl.shards.tokens import StoreDescription, StoreParts, TokenReader, is_complete, open_store

DESCRIPTION = StoreDescription((2, 3), 256, 28, "tokenizer", "data", ("a", "b"), {"train": 10, "val": 3})
LABELS = np.arange(10) % 2
VIEWS = dataclasses.replace(DESCRIPTION, crops=2, flip=True)


def rows(part, mirrors: int) -> np.ndarray:
    """(samples, mirrors, 6): each row another, known by split, sample and view."""
    first = (100 if part.split == "val" else 0) + np.arange(part.start, part.stop) * 10 + part.crop * mirrors
    return (first[:, None, None] + np.arange(mirrors)[:, None] + np.zeros(6, np.int64)) % 256


def make(folder: Path, description=DESCRIPTION, *, part_samples: int = 4, share=slice(None)) -> bool:
    parts = StoreParts(folder, description, part_samples=part_samples)
    for part in parts.parts()[share]:
        if not parts.is_done(part):
            parts.write(part, rows(part, description.mirrors_of(part.split)), LABELS[part.start : part.stop])
    return parts.finish()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_rows_come_back_as_written(tmp_path):
    assert make(tmp_path)
    reader = open_store(tmp_path, data="data", tokenizer="tokenizer")["train"]
    tokens, labels = reader.read(np.array([7, 0, 7]))
    assert tokens.dtype == labels.dtype == np.int64
    assert tokens.tolist() == [[70] * 6, [0] * 6, [70] * 6]
    assert labels.tolist() == [1, 0, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "store.json", "train-labels.npy", "train-tokens.npy", "val-labels.npy", "val-tokens.npy"
    ]  # fmt: skip


def test_arrays_are_what_numpy_would_save(tmp_path):
    make(tmp_path)
    np.save(tmp_path / "expected.npy", np.repeat(np.arange(10, dtype=np.uint16)[:, None] * 10, 6, axis=1))
    assert (tmp_path / "train-tokens.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()


def test_view_v_of_sample_i_is_row_i_v_and_validation_has_one(tmp_path):
    make(tmp_path, VIEWS)
    stored = np.load(tmp_path / "train-tokens.npy")
    assert stored[:, 0].tolist() == [(10 * sample + view) % 256 for sample in range(10) for view in range(4)]
    readers = open_store(tmp_path, data="data")
    assert (readers["train"].views, readers["val"].views) == (4, 1)
    tokens, labels = readers["train"].read(np.array([7, 2]), np.array([3, 1]))
    assert (tokens[:, 0].tolist(), labels.tolist()) == ([73, 21], [1, 0])
    assert np.load(tmp_path / "val-tokens.npy")[:, 0].tolist() == [100, 110, 120]


@pytest.mark.parametrize(("num_codes", "bytes_a_token"), [(2**16, 2), (2**16 + 1, 4)])
def test_token_width_follows_the_codebook(tmp_path, num_codes, bytes_a_token):
    make(tmp_path, dataclasses.replace(DESCRIPTION, num_codes=num_codes))
    assert np.load(tmp_path / "train-tokens.npy").dtype.itemsize == bytes_a_token


@pytest.mark.parametrize("wanted", [{"data": "other"}, {"tokenizer": "other"}, {"image_size": 32}])
def test_foreign_store_is_refused_with_the_way_out(tmp_path, wanted):
    make(tmp_path)
    with pytest.raises(ValueError, match=r"must be .* got .*make tokenize"):
        open_store(tmp_path, **{"data": "data", **wanted})


def test_everything_that_differs_is_named_at_once(tmp_path):
    make(tmp_path)
    with pytest.raises(ValueError, match=r"data must be new, got data; its tokenizer must be me, got tokenizer; make"):
        open_store(tmp_path, data="new", tokenizer="me")


def test_store_of_before_there_were_views_opens(tmp_path):
    make(tmp_path)
    path = tmp_path / "store.json"
    fields = json.loads(path.read_text())
    for later in ("crops", "flip", "precision"):
        del fields[later]
    path.write_text(json.dumps(fields))
    assert open_store(tmp_path, data="data")["train"].description == DESCRIPTION
    assert is_complete(tmp_path, DESCRIPTION)


@pytest.mark.parametrize("spoil", ["cut", "gone", "longer", "garbage", "pickled"])
def test_spoilt_array_is_refused_by_name_when_the_store_is_opened(tmp_path, spoil):
    make(tmp_path)
    path = tmp_path / "val-tokens.npy"
    if spoil == "cut":
        os.truncate(path, path.stat().st_size - 1)
    elif spoil == "gone":
        path.unlink()
    elif spoil == "longer":
        np.save(path, np.zeros((4, 6), np.uint16))
    elif spoil == "pickled":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(b"\0" * 200)
    assert not is_complete(tmp_path, DESCRIPTION)
    with pytest.raises((ValueError, FileNotFoundError), match=r"token store .*val.*make tokenize"):
        open_store(tmp_path, data="data")
    assert make(tmp_path)
    assert is_complete(tmp_path, DESCRIPTION)


class Killed(BaseException):
    """Nothing that runs afterwards, except what ``with`` and ``finally`` do, and these have nothing to undo."""


@pytest.mark.parametrize("point", ["replace", "fsync", "unlink"])
def test_a_kill_at_any_moment_costs_a_part_and_changes_no_byte(tmp_path, monkeypatch, point):
    make(tmp_path / "older")
    make(tmp_path / "whole", VIEWS, part_samples=10)
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
                make(folder, VIEWS, part_samples=10)
            except Killed:
                kills += 1
        if not is_complete(folder, VIEWS) and not is_complete(folder, DESCRIPTION):  # neither the new nor the older
            with pytest.raises(FileNotFoundError, match="not finished"):
                open_store(folder, data="data")
        assert make(folder, VIEWS, part_samples=10)
        assert content(folder) == content(tmp_path / "whole")
        if next(calls) <= moment:
            break
    assert moment < 99
    assert kills >= (1 if point == "unlink" else 8)


def test_the_share_that_is_done_last_finishes_and_the_bytes_are_those_of_one_process(tmp_path):
    make(tmp_path / "one", VIEWS)
    many = tmp_path / "many"
    assert [make(many, VIEWS, share=slice(rank, None, 3)) for rank in (2, 0, 1)] == [False, False, True]
    assert content(many) == content(tmp_path / "one")
    assert not list(many.glob(".parts-*"))


def test_a_process_that_joins_at_the_same_time_finds_the_store_finished(tmp_path, monkeypatch):
    late = StoreParts(tmp_path, DESCRIPTION, part_samples=4)
    for part in late.parts():
        late.write(part, rows(part, 1), LABELS[part.start : part.stop])
    join = StoreParts._join

    def overtaken(self, split):
        if self is late:
            assert StoreParts(tmp_path, DESCRIPTION, part_samples=4).finish()
        join(self, split)

    monkeypatch.setattr(StoreParts, "_join", overtaken)
    assert late.finish()
    assert open_store(tmp_path, data="data")["train"].read(np.array([3]))[0].tolist() == [[30] * 6]


def test_parts_of_another_tokenizer_are_not_gone_on_with(tmp_path):
    make(tmp_path, share=slice(2))
    other = StoreParts(tmp_path, dataclasses.replace(DESCRIPTION, tokenizer="other"), part_samples=4)
    assert not any(other.is_done(part) for part in other.parts())
    assert len(list(tmp_path.glob(".parts-*"))) == 1


def test_an_unfinished_store_is_refused(tmp_path):
    assert not make(tmp_path, share=slice(2))
    with pytest.raises(FileNotFoundError, match=r"not finished.*make tokenize"):
        open_store(tmp_path, data="data")


def test_finished_store_is_known_and_a_new_one_takes_it_back(tmp_path):
    make(tmp_path)
    other = dataclasses.replace(DESCRIPTION, data="other")
    assert is_complete(tmp_path, DESCRIPTION)
    assert not is_complete(tmp_path, other)
    StoreParts(tmp_path, other, part_samples=4)
    assert not is_complete(tmp_path, DESCRIPTION)


def test_a_damaged_part_is_named_and_made_again(tmp_path):
    make(tmp_path, share=slice(None, -1))
    part = next(tmp_path.glob(".parts-*/train-0-0000000004.npy"))
    part.write_bytes(part.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"train-0-0000000004\.npy is damaged .* again"):
        make(tmp_path)
    assert make(tmp_path)


def test_wrong_rows_are_refused(tmp_path):
    parts = StoreParts(tmp_path, DESCRIPTION, part_samples=4)
    part = parts.parts()[0]
    good = rows(part, 1)
    for bad in (good[..., :5], good + 250, good - 1, good[:3]):
        with pytest.raises(ValueError, match="tokens"):
            parts.write(part, bad, LABELS[:4])
    with pytest.raises(ValueError, match="at least 1"):
        StoreParts(tmp_path, DESCRIPTION, part_samples=0)


def test_reader_is_mapped_in_each_process_that_reads(tmp_path):
    make(tmp_path)
    reader = open_store(tmp_path, data="data")["train"]
    assert isinstance(reader.arrays()[0], np.memmap)
    assert reader.__getstate__()["_arrays"] is None
    assert isinstance(reader, TokenReader)
