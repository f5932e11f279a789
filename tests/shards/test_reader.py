import pytest

from maskgit_pl.data import ShardData
from maskgit_pl.shards.manifest import load_manifest
from maskgit_pl.shards.reader import ShardReader
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
        ValueError, match=rf"labels in \[0, 3\) are needed.*\n.*{split}-000000.tar:00000003.jpg: {label}\n"
    ):
        ShardData(str(folder), global_batch=2).setup()


def test_many_wrong_labels_are_counted_and_the_first_are_named(tmp_path):
    reader = ShardReader(load_manifest(save_data(tmp_path, {"train": [(b"", 7)] * 50}), "train"))
    with pytest.raises(ValueError, match=r"in 50 samples(.|\n)*and 30 more"):
        reader.labels([0])
