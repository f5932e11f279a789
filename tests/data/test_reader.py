""""""

import itertools
import os
import random

import pytest
from braceexpand import braceexpand

from maskgit_pl.data import ShardData, ShardDataConfig
from maskgit_pl.data.manifest import load_manifest
from maskgit_pl.data.reader import ShardReader, expand_braces, find_shards, locate_shards, most_names, split_shards
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
        ValueError, match=rf"labels must be in \[0, 3\), got {label} in {split}-000000.tar:00000003.jpg, the first of 1"
    ):
        ShardData(ShardDataConfig(str(folder), global_batch=2)).setup()


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


PIECES = ["{", "}", ",", "\\", "a", "1", "..", "{1..3}", "{c..a}", "{Y..b}", "{x,y}", "{03..1..2}", "{-2..2..0}"]


def test_patterns_have_no_more_names_than_their_bound():
    chance, refused = random.Random(0), 0
    for _ in range(5_000):
        pattern = "".join(chance.choice(PIECES) for _ in range(chance.randrange(1, 8)))
        try:
            count = len(list(itertools.islice(braceexpand(pattern), 20_000)))
        except ValueError:
            refused += 1
            with pytest.raises(ValueError, match="braces must close"):
                expand_braces(pattern)
        else:
            assert most_names(pattern) >= count, pattern
    assert 500 < refused < 4_500


@pytest.mark.parametrize(("pattern", "most"), [("a{x,y}{3..1}", 6), ("{a..c}", 3), ("{Y..b}", 10), (r"\{a,b}", 1)])
def test_the_bound_is_exact_for_ranges_and_lists(pattern, most):
    assert most_names(pattern) == most


def test_names_come_in_order():
    assert expand_braces("{train,val}-{00..02}.tar") == [f"{s}-0{n}.tar" for s in ("train", "val") for n in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern",
    [
        "{0..1099511627776}.tar",
        "{-600000..600000}.tar",
        "{0..999999}{a,b}.tar",
        "{a,b}" * 60,
        "{{a,b}" + "{a,b}" * 60 + ",c}.tar",
        "{" + ",".join(["{0..999999}"] * 200) + "}.tar",
        "{0..999999}" + "x" * 4000,
        "{0..1}" * 683,
        "x" * 5000,
        "{" * 2000 + "}" * 2000,
        "{" + "9" * 3000 + ".." + "8" * 1000 + "}",
    ],
    ids=lambda pattern: pattern[:20],
)
def test_what_would_fill_memory_is_refused_before_it_is_expanded(pattern, tmp_path):
    with pytest.raises(ValueError, match=r"(a pattern|braces) must .*got"):
        expand_braces(pattern)
    with pytest.raises(ValueError, match=r"shard pattern: (a pattern|braces) must .*got"):
        find_shards(tmp_path, pattern)


def test_test_shards_beside_val_shards_are_neither(tars, tmp_path):
    for name in ("imagenet1k-train-0000", "imagenet1k-validation-00", "imagenet1k-test-00"):
        tars.write(tmp_path / f"{name}.tar", tars.samples(1))
    shards, _ = split_shards(*locate_shards(str(tmp_path)))
    assert {split: [path.name for path in paths] for split, paths in shards.items()} == {
        "train": ["imagenet1k-train-0000.tar"],
        "val": ["imagenet1k-validation-00.tar"],
    }


def test_shards_that_would_be_both_or_none_are_refused(tars, tmp_path):
    tars.write(tmp_path / "a.tar", tars.samples(1))
    with pytest.raises(ValueError, match="must have at least 2 shards"):
        split_shards(*locate_shards(str(tmp_path)))
    tars.write(tmp_path / "b.tar", tars.samples(1))
    with pytest.raises(ValueError, match=r"a\.tar must not be both"):
        split_shards(*locate_shards(str(tmp_path)), train="*.tar", val="a.tar")
    with pytest.raises(ValueError, match="train must have at least 1 shard"):
        split_shards(*locate_shards(str(tmp_path)), val="*.tar")
    with pytest.raises(ValueError, match="val_fraction"):
        split_shards(*locate_shards(str(tmp_path)), val_fraction=1.5)


@pytest.mark.parametrize("place", ["pipe:curl https://x/a.tar", "https://x/{0..3}.tar", "s3://bucket/a.tar"])
def test_urls_and_commands_are_refused_by_name(place):
    with pytest.raises(ValueError, match="local files, got"):
        locate_shards(place)


def test_patterns_take_braces_and_refuse_paths_and_gaps(folder):
    names = ["train-000000.tar", "train-000001.tar"]
    assert [p.name for p in find_shards(folder, "train-{000000..000001}.tar")] == names
    assert [p.name for p in locate_shards(f"{folder}/{{train,val}}-*.tar")[1]] == [*names, "val-000000.tar"]
    with pytest.raises(ValueError, match="train-000002"):
        find_shards(folder, "train-{000000..000002}.tar")
    for pattern in ("../*.tar", "/etc/*"):
        with pytest.raises(ValueError, match="got a path outside"):
            find_shards(folder, pattern)
    with pytest.raises(ValueError, match="nowhere"):
        locate_shards(f"{folder}/nowhere/*.tar")
