import os

import pytest

from maskgit_pl.data import ShardData, ShardDataConfig
from maskgit_pl.data.manifest import load_manifest
from maskgit_pl.data.reader import ShardReader
from maskgit_pl.errors import DataChangedError
from tests.data_folders import save_data


def test_a_sample_is_named_by_its_shard_and_member(tmp_path):
    folder = save_data(tmp_path, {"train": [(b"image", 0)] * 12})
    reader = ShardReader(load_manifest(folder, "train"))
    assert (reader.name(0), reader.name(11)) == ("train-000000.tar:00000000.jpg", "train-000001.tar:00000011.jpg")
    assert (reader.read(11), reader.shard(11)) == (b"image", "train-000001.tar")


@pytest.mark.parametrize("label", [-1, 3, 9999])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_label_that_is_no_class_is_refused_by_name_before_training(tmp_path, split, label):
    samples = [(b"", 0), (b"", 1), (b"", 2)]
    splits = {"train": samples, "val": samples}
    folder = save_data(tmp_path, {**splits, split: [*samples, (b"", label)]})
    with pytest.raises(
        ValueError, match=rf"labels must be in \[0, 3\), got others.*\n.*{split}-000000.tar:00000003.jpg: {label}\n"
    ):
        ShardData(ShardDataConfig(str(folder), global_batch=2)).setup()


def test_many_wrong_labels_are_counted_and_the_first_are_named(tmp_path):
    reader = ShardReader(load_manifest(save_data(tmp_path, {"train": [(b"", 7)] * 50}), "train"))
    with pytest.raises(ValueError, match=r"in 50 samples(.|\n)*and 30 more"):
        reader.labels([0])


def cut(path):
    os.truncate(path, 700)


def replaced(path):
    path.rename(path.with_suffix(".old"))
    path.write_bytes(b"another file")


def removed(path):
    path.unlink()


@pytest.mark.parametrize("change", [cut, replaced, removed])
def test_a_shard_that_is_changed_while_it_is_read_is_named(tmp_path, change):
    reader = ShardReader(load_manifest(save_data(tmp_path, {"train": [(b"image", 0)] * 12}), "train"))
    reader.read(11)  # the second shard is open, the first is not
    change(tmp_path / "train-000000.tar")
    for _ in range(2):
        with pytest.raises(DataChangedError, match=r"train-000000\.tar changed while .*maskgit data verify"):
            reader.read(3)
    assert reader.read(11) == b"image"


def test_an_open_shard_that_is_cut_is_named_and_one_that_is_removed_is_read_on(tmp_path):
    reader = ShardReader(load_manifest(save_data(tmp_path, {"train": [(b"image", 0)] * 2}), "train"))
    reader.read(0)
    (tmp_path / "train-000000.tar").rename(tmp_path / "moved.tar")
    assert reader.read(1) == b"image"
    cut(tmp_path / "moved.tar")
    with pytest.raises(DataChangedError, match=r"train-000000\.tar changed .*5 bytes expected at byte 2\d+, got 0"):
        reader.read(1)


def test_an_index_that_is_cut_while_it_is_read_ends_the_run_and_does_not_kill_it(tmp_path):
    reader = ShardReader(load_manifest(save_data(tmp_path, {"train": [(b"image", 0)] * 2}), "train"))
    reader.read(0)
    os.truncate(tmp_path / "train.npy", 100)
    with pytest.raises(DataChangedError, match=r"train\.npy changed .*the file was truncated"):
        reader.read(1)
