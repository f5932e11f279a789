import pytest

from maskgit_pl.data.reader import find_shards, locate_shards, split_shards


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
def test_urls_and_commands_are_refused_by_name(place, tmp_path):
    with pytest.raises(ValueError, match="local files, got"):
        locate_shards(place)
    with pytest.raises(ValueError, match="local files, got"):
        find_shards(tmp_path, place)


def test_patterns_take_braces_and_refuse_paths_and_gaps(folder):
    names = ["train-000000.tar", "train-000001.tar"]
    assert [p.name for p in find_shards(folder, "train-{000000..000001}.tar")] == names
    assert [p.name for p in locate_shards(f"{folder}/{{train,val}}-*.tar")[1]] == [*names, "val-000000.tar"]
    with pytest.raises(ValueError, match="train-000002"):
        find_shards(folder, "train-{000000..000002}.tar")
    for pattern in ("../*.tar", "/etc/*", "~/x.tar"):
        with pytest.raises(ValueError, match="got a path outside"):
            find_shards(folder, pattern)
    with pytest.raises(ValueError, match="braces must close"):
        find_shards(folder, "{a,b")
    with pytest.raises(ValueError, match="at most"):
        find_shards(folder, "{0..999999999999}.tar")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        locate_shards(f"{folder}/nowhere/*.tar")
