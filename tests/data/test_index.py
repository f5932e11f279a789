import json
import os

import numpy as np
import pytest

from maskgit_pl.data.index import expand_braces, find_shards, index_shards, locate_shards, split_shards
from maskgit_pl.data.manifest import ShardReader, load_manifest, read_manifest_summary
from tests.data.conftest import contents
from tests.data_folders import spy_on_disk


def index_one(path, **options):
    return index_shards(path.parent, {"train": [path]}, **options)["train"]


def img2dataset(tars, folder, shards=3):
    for shard in range(shards):
        members = []
        for number in range(4):
            key = f"{shard:05d}{number:04d}"
            metadata = json.dumps({"caption": "a caption", "label": number % 2, "width": 8}).encode()
            members += [(f"{key}.jpg", tars.png(number)), (f"{key}.txt", b"a caption"), (f"{key}.json", metadata)]
        tars.write(folder / f"{shard:05d}.tar", members)
        (folder / f"{shard:05d}_stats.json").write_text("{}")
        (folder / f"{shard:05d}.parquet").write_bytes(b"ignored")
    return folder


def test_img2dataset_without_labels(tars, tmp_path):
    folder, paths = locate_shards(str(img2dataset(tars, tmp_path)))
    shards, how = split_shards(folder, paths)
    assert how == "the last 1 of 3 shards are val"
    with pytest.raises(ValueError, match=r"3 of 3 shards[\s\S]*4 without a label \(first 0000[\s\S]*--no-labels"):
        index_shards(folder, shards)
    index_shards(folder, shards, labels="none")
    summary = read_manifest_summary(tmp_path)
    assert summary.samples == {"train": 8, "val": 4}
    assert summary.classes == ("image",)


def test_img2dataset_with_labels_in_json(tars, tmp_path):
    folder, paths = locate_shards(f"{img2dataset(tars, tmp_path)}/{{00000..00002}}.tar")
    shards, _ = split_shards(folder, paths, val="{00001..00002}.tar")
    assert [len(shards[split]) for split in ("train", "val")] == [1, 2]
    manifests = index_shards(folder, shards, labels="json:label", classes=["odd", "even"])
    assert ShardReader(manifests["train"]).labels(np.arange(4)).tolist() == [0, 1, 0, 1]
    with pytest.raises(ValueError, match=r"must be a class number in .* or one of .*, got b\"'a caption'\""):
        index_shards(folder, shards, labels="json:caption")
    named = index_shards(folder, shards, labels="json:caption", classes=["other", "a caption"])
    assert ShardReader(named["train"]).labels(np.arange(4)).tolist() == [1, 1, 1, 1]


def test_all_bad_shards_are_in_one_list(tars, tmp_path):
    tars.write(tmp_path / "a.tar", [("a.png", tars.png()), ("b.png", tars.png()), *tars.samples(1)])
    tars.write(tmp_path / "b.tar", tars.samples(2))
    path = tars.write(tmp_path / "c.tar", tars.samples(2))
    path.write_bytes(path.read_bytes()[:2048])
    (tmp_path / "d.tar").write_bytes(b"")
    tars.write(tmp_path / "e.tar", [("a.txt", b""), ("b.txt", b"")])
    with pytest.raises(ValueError, match="4 of 5 shards are rejected") as caught:
        index_shards(tmp_path, {"train": sorted(tmp_path.glob("*.tar"))})
    assert str(caught.value).splitlines()[1:] == [
        "  a.tar: 2 without a label (first a.tar:a.png)",
        "  c.tar: truncated at byte 2048, the end of the archive is missing",
        "  d.tar: empty file",
        "  e.tar: no image samples",
        "restore damaged tars; --lenient leaves out samples with a fault and counts them; --label-field NAME reads "
        "labels from .json, --no-labels trains without labels",
    ]
    with pytest.raises(ValueError, match="3 of 5 shards"):  # lenient with samples, not with tars
        index_shards(tmp_path, {"train": sorted(tmp_path.glob("*.tar"))}, lenient=True)


def test_workers_make_no_difference(tars, tmp_path):
    shards = [tars.write(tmp_path / f"{n}.tar", tars.samples(4 + n, start=10 * n)) for n in range(4)]
    index_shards(tmp_path, {"train": shards[:3], "val": shards[3:]})
    alone = contents(tmp_path)
    index_shards(tmp_path, {"train": shards[:3], "val": shards[3:]}, workers=2)
    assert contents(tmp_path) == alone
    assert set(alone) == {"train.json", "train.npy", "val.json", "val.npy", *(path.name for path in shards)}


@pytest.mark.parametrize("number", range(5))
def test_a_killed_index_leaves_no_half_and_the_next_run_removes_the_rest(tars, tmp_path, monkeypatch, number):
    path, calls = tars.write(tmp_path / "x.tar", tars.samples(3)), []

    def kill(name, path):
        calls.append(name)
        if len(calls) > number:
            os._exit(1)

    child = os.fork()
    if not child:
        spy_on_disk(monkeypatch, kill)
        index_one(path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert any(file.suffix == ".partial" for file in tmp_path.iterdir()) == (number != 2)
    assert not (tmp_path / "train.json").exists()
    assert index_one(path) == load_manifest(tmp_path, "train")
    assert {file.name for file in tmp_path.iterdir()} == {"x.tar", "train.json", "train.npy"}


@pytest.mark.parametrize("pattern", ["{0..1.tar", "0}.tar", "{a,b"])
def test_a_pattern_whose_braces_do_not_close_is_refused(pattern, tmp_path):
    with pytest.raises(ValueError, match=r"shard pattern must have braces that close and are not nested, got"):
        find_shards(tmp_path, pattern)


def test_test_shards_beside_val_shards_are_neither(tars, tmp_path):
    for name in ("imagenet1k-train-0000", "imagenet1k-validation-00", "imagenet1k-test-00"):
        tars.write(tmp_path / f"{name}.tar", tars.samples(1))
    shards, _ = split_shards(*locate_shards(str(tmp_path)))
    assert {split: [path.name for path in paths] for split, paths in shards.items()} == {
        "train": ["imagenet1k-train-0000.tar"],
        "val": ["imagenet1k-validation-00.tar"],
    }


@pytest.mark.parametrize(("count", "val"), [(2, 1), (14, 1), (16, 2), (20, 2)])
def test_the_last_tenth_of_unnamed_shards_is_val(tmp_path, count, val):
    shards = [tmp_path / f"{number:04d}.tar" for number in range(count)]
    assert split_shards(tmp_path, shards)[0] == {"train": shards[:-val], "val": shards[-val:]}


def test_shards_that_are_all_val_are_refused(tars, tmp_path):
    tars.write(tmp_path / "a.tar", tars.samples(1))
    for val in (None, "*.tar"):
        with pytest.raises(ValueError, match=r"must have a shard for train beside those of val, got none.*--val"):
            split_shards(*locate_shards(str(tmp_path)), val=val)


@pytest.mark.parametrize("pattern", ["x-{0..99999999}.tar", "{a,b}" * 40, "{0..99}" * 9, "x" * 2**20 + "{0..99}"])
def test_a_pattern_of_more_names_than_fit_is_refused_before_it_is_expanded(pattern):
    with pytest.raises(ValueError, match=r"^x must name at most [\d,]+ shards, got "):
        expand_braces(pattern, name="x")


def test_patterns_take_braces_and_refuse_paths_and_gaps(folder):
    names = ["train-000000.tar", "train-000001.tar"]
    assert [p.name for p in find_shards(folder, "train-{000000..000001}.tar")] == names
    assert expand_braces("{a,b}-{0..1}", name="x") == ["a-0", "a-1", "b-0", "b-1"]  # the order of a shell
    assert [p.name for p in locate_shards(f"{folder}/{{train,val}}-*.tar")[1]] == [*names, "val-000000.tar"]
    with pytest.raises(ValueError, match="train-000002"):
        find_shards(folder, "train-{000000..000002}.tar")
    for pattern in ("../*.tar", "/etc/*"):
        with pytest.raises(ValueError, match="got another path"):
            find_shards(folder, pattern)
    for place in (f"{folder}/nowhere/*.tar", "pipe:curl https://x/a.tar", "https://x/{0..3}.tar"):
        with pytest.raises(ValueError, match=r"no file in .* matches"):
            locate_shards(place)
