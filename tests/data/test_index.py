import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskgit_pl.data.index import index_shards
from maskgit_pl.data.manifest import load_manifest, read_manifest_summary
from maskgit_pl.data.reader import ShardReader, locate_shards, split_shards
from maskgit_pl.data.samples import parse_label
from tests.data_folders import spy_on_disk


def index_one(path, **options):
    return index_shards(path.parent, {"train": [path]}, **options).manifests["train"]


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.endswith(".tar")}


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (value, value, value)).save(buffer, "JPEG")
    return buffer.getvalue()


# layouts of others


@pytest.mark.parametrize("extension", ["jpg", "JPG", "jpeg", "png", "PNG", "webp"])
def test_image_extensions_in_any_case(tars, tmp_path, extension):
    manifest = index_one(tars.write(tmp_path / "x.tar", [(f"a.{extension}", jpeg(9)), ("a.CLS", b"2\n")]))
    assert ShardReader(manifest).labels(np.arange(1)).tolist() == [2]
    assert manifest.images.height == (6, 6)


def img2dataset(tars, folder, shards=3):
    for shard in range(shards):
        keys = [f"{shard:05d}{number:04d}" for number in range(4)]
        members = [
            member
            for number, key in enumerate(keys)
            for member in (
                (f"{key}.jpg", jpeg(number)),
                (f"{key}.txt", b"a caption"),
                (f"{key}.json", json.dumps({"caption": "a caption", "label": number % 2, "width": 8}).encode()),
            )
        ]
        tars.write(folder / f"{shard:05d}.tar", members)
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": 5, "successes": 4}))
        (folder / f"{shard:05d}.parquet").write_bytes(b"ignored")
    return folder


def test_img2dataset_without_labels(tars, tmp_path):
    folder, found = locate_shards(str(img2dataset(tars, tmp_path)))
    shards, how = split_shards(folder, found)
    assert how == "the last 1 of 3 shards are val (--val-fraction 0.1)"
    with pytest.raises(ValueError, match=r"3 of 3 shards[\s\S]*4 without a label \(first 0000[\s\S]*--no-labels"):
        index_shards(folder, shards)
    manifests = index_shards(folder, shards, labels="none").manifests
    summary = read_manifest_summary(tmp_path)
    assert summary.samples == {"train": 8, "val": 4}
    assert summary.classes == ("image",)
    assert manifests["train"].labels == "none"


def test_img2dataset_with_labels_in_json(tars, tmp_path):
    folder, found = locate_shards(f"{img2dataset(tars, tmp_path)}/{{00000..00002}}.tar")
    shards, _ = split_shards(folder, found, val_fraction=0.6)
    assert [len(shards[split]) for split in ("train", "val")] == [1, 2]
    manifests = index_shards(folder, shards, labels="json:label", classes=["odd", "even"]).manifests
    assert ShardReader(manifests["train"]).labels(np.arange(4)).tolist() == [0, 1, 0, 1]
    with pytest.raises(
        ValueError, match=r"label .*'caption' must be a class number or one of the class names, got 'a caption'"
    ):
        index_shards(folder, shards, labels="json:caption")
    named = index_shards(folder, shards, labels="json:caption", classes=["other", "a caption"]).manifests
    assert ShardReader(named["train"]).labels(np.arange(4)).tolist() == [1, 1, 1, 1]


def test_splits_in_sub_folders(tars, tmp_path):
    for split, start in (("train", 0), ("test", 20)):
        for shard in range(2):
            tars.write(tmp_path / split / f"{shard}.tar", tars.samples(3, start=start + 3 * shard))
    folder, found = locate_shards(str(tmp_path))
    shards, how = split_shards(folder, found)
    assert how == "val shards were found by their names"
    manifest = index_shards(folder, shards).manifests["val"]
    assert [shard.name for shard in manifest.shards] == ["test/0.tar", "test/1.tar"]
    value = Image.open(io.BytesIO(ShardReader(load_manifest(tmp_path, "val")).read(5))).getpixel((0, 0))
    assert value == 25


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("sizes.json", '{"x.tar": 5}', r"x\.tar: 3 samples, sizes\.json states 5"),
        ("x_stats.json", '{"successes": 2}', r"x\.tar: 3 samples, x_stats\.json states 2"),
        ("__len__", "7\n", r"__len__: states b'7' samples, the shards have 3"),
    ],
)
def test_counts_that_disagree_with_the_tar_are_named(tars, tmp_path, file, text, message):
    path = tars.write(tmp_path / "x.tar", tars.samples(3))
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        index_one(path)
    indexed = index_shards(tmp_path, {"train": [path]}, lenient=True)
    assert len(indexed.notes) == 1
    (tmp_path / file).write_text(text.replace("5", "3").replace("2", "3").replace("7", "3"))
    assert not index_shards(tmp_path, {"train": [path]}).notes
    (tmp_path / "sizes.json").write_text("{")
    with pytest.raises(ValueError, match=r"sizes\.json is not valid JSON"):
        index_one(path)


# samples with a fault

FAULTS = {
    "half: no label": ([("x.png", None)], "1 without a label (first x.tar:x.png)"),
    "half: no image": ([("x.cls", b"0")], "1 without an image (first x.tar:x.cls)"),
    "two images": ([("x.png", None), ("x.jpg", None), ("x.cls", b"0")], "1 with two images (first x.tar:x.jpg)"),
    "two labels": ([("x.png", None), ("x.cls", b"0"), ("x.cls", b"1")], "1 with two labels (first x.tar:x.cls)"),
    "doubled key": (
        [("x.png", None), ("x.cls", b"0"), ("y.png", None), ("y.cls", b"1"), ("x.png", None), ("x.cls", b"2")],
        "1 of a key that comes twice (first x.tar:x.png)",
    ),
    "interleaved": (
        [("x.png", None), ("y.png", None), ("x.cls", b"0"), ("y.cls", b"0")],
        "2 whose members do not lie side by side (first x.tar:x.png)",
    ),
    "html for an image": ([("x.png", b"<html>"), ("x.cls", b"0")], "1 with an image that cannot be read (first image"),
    "empty image": (
        [("x.png", b""), ("x.cls", b"0")],
        "1 with an image that cannot be read (first x.tar:x.png: size must be 1 to",
    ),
    "label 1_000": ([("x.png", None), ("x.cls", b"1_000")], "1 with a label that is no class (first label x.tar:x.cls"),
    "label too high": ([("x.png", None), ("x.cls", b"999999")], "1 with a label that is no class (first label x.tar:"),
    "path out": ([("../x.png", None), ("../x.cls", b"0")], "1 with an unsafe member name (first x.tar:../x.png)"),
    "absolute path": ([("/x.png", None), ("/x.cls", b"0")], "1 with an unsafe member name (first x.tar:/x.png)"),
    "control character": ([("x\x1b[2J.png", None)], r"1 with an unsafe member name (first x.tar:x\x1b[2J.png)"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_samples_with_a_fault_are_counted_and_refused_or_left_out(tars, tmp_path, case):
    members, message = FAULTS[case]
    bad = [(name, tars.png() if data is None else data) for name, data in members]
    path = tars.write(tmp_path / "x.tar", [*tars.samples(2), *bad, *tars.samples(2, start=10)])
    with pytest.raises(ValueError, match="--lenient") as caught:
        index_one(path)
    assert f"x.tar: {message}" in str(caught.value)
    manifest = index_one(path, lenient=True)
    between = [1] if case == "doubled key" else []  # y is whole
    assert manifest.index()["label"].tolist() == [0, 1, *between, 1, 2]
    count, _, fault = message.partition(" (")[0].partition(" ")
    assert manifest.left_out[fault] == int(count)
    assert load_manifest(tmp_path, "train").left_out == manifest.left_out


def test_all_bad_shards_stand_in_one_list(tars, tmp_path):
    tars.write(tmp_path / "a.tar", [("a.png", tars.png()), ("b.png", tars.png()), *tars.samples(1)])
    tars.write(tmp_path / "b.tar", tars.samples(2))
    path = tars.write(tmp_path / "c.tar", tars.samples(2))
    path.write_bytes(path.read_bytes()[:2048])
    (tmp_path / "d.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="3 of 4 shards are rejected") as caught:
        index_shards(tmp_path, {"train": sorted(tmp_path.glob("*.tar"))})
    lines = str(caught.value).splitlines()
    assert lines[1:4] == [
        "  a.tar: 2 without a label (first a.tar:a.png)",
        "  c.tar: truncated at byte 2048, the end of the archive is missing",
        "  d.tar: empty file",
    ]
    with pytest.raises(ValueError, match="2 of 4 shards"):  # lenient with samples, not with tars
        index_shards(tmp_path, {"train": sorted(tmp_path.glob("*.tar"))}, lenient=True)


def test_members_without_a_key_do_not_divide_a_sample(tars, tmp_path):
    # macOS adds ._NAME before each file that has extended attributes; webdataset passes over both kinds.
    members = []
    for number in range(3):
        for name, data in ((f"a/{number}.cls", b"0"), (f"a/{number}.png", tars.png(number))):
            members += [(name.replace("a/", "a/._"), b"\0\5\x16\7"), (name, data), ("README", b"")]
    tars.write(tmp_path / "x.tar", members)
    indexed = index_shards(tmp_path, {"train": [tmp_path / "x.tar"]})
    assert indexed.manifests["train"].samples == 3
    assert indexed.ignored["train"] == {".": 12}


def test_endless_members_without_a_key_are_refused(tars, tmp_path, monkeypatch):
    monkeypatch.setattr("maskgit_pl.data.scan._MAX_IGNORED", 5)
    tars.write(tmp_path / "x.tar", [*tars.samples(1), *[("README", b"")] * 6])
    with pytest.raises(ValueError, match=r"more than 5 members are not images: 6 \.\n"):
        index_one(tmp_path / "x.tar")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused_as_images_and_passed_over_elsewhere(tars, tmp_path, kind):
    def write(name):
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            odd = tarfile.TarInfo(name)
            odd.type, odd.linkname = kind, "/etc/passwd"
            archive.addfile(odd)
            for member_name, data in tars.samples(1):
                member = tarfile.TarInfo(member_name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return tmp_path / "x.tar"

    with pytest.raises(ValueError, match=r"1 with a link, a device or a sparse file \(first x\.tar:a\.png"):
        index_one(write("a.png"))
    assert index_one(write("a.dat")).samples == 1


def test_code_in_members_is_never_run_and_is_counted(tars, tmp_path):
    canary = tmp_path / "canary"
    pickle = b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    members = [(f"0000.{kind}", pickle) for kind in ("pkl", "pyd", "pth", "npy")]
    path = tars.write(tmp_path / "x.tar", [*tars.samples(1), *members, ("other.pkl", pickle)])
    with pytest.raises(ValueError, match=r"x\.tar:0000\.npy must be a \.npy file"):
        index_shards(tmp_path, {"train": [path]})
    indexed = index_shards(tmp_path, {"train": [path]}, vectors=False)
    assert indexed.ignored["train"] == {".npy": 1, ".pkl": 2, ".pth": 1, ".pyd": 1}
    assert not canary.exists()


@pytest.mark.parametrize("text", [b"1_000", b"", b"-1", b"cat", b"1.0", b"+1", "\u0661".encode(), b"01"])
def test_label_that_is_not_a_class_number_is_refused_by_name(text):
    with pytest.raises(ValueError, match=r"x\.tar:a\.cls"):
        parse_label(text, name="x.tar:a.cls")


def test_label_beyond_the_class_names_is_refused():
    assert parse_label(b"2", name="a", num_classes=3) == 2
    with pytest.raises(ValueError, match=r"in \[0, 3\)"):
        parse_label(b"3", name="a", num_classes=3)


def test_class_names_of_unlabelled_data(tars, tmp_path):
    path = tars.write(tmp_path / "x.tar", tars.samples(2, label=False))
    assert index_one(path, labels="none", classes=["photo"]).classes == ("photo",)
    with pytest.raises(ValueError, match="must have 1 name, got 2"):
        index_one(path, labels="none", classes=["a", "b"])
    with pytest.raises(ValueError, match="cls, json:FIELD or none"):
        index_one(path, labels="json")


# in parallel, and killed


def test_workers_make_no_difference(tars, tmp_path):
    shards = [tars.write(tmp_path / f"{n}.tar", tars.samples(4 + n, start=10 * n)) for n in range(4)]
    index_shards(tmp_path, {"train": shards[:3], "val": shards[3:]})
    alone = content(tmp_path)
    index_shards(tmp_path, {"train": shards[:3], "val": shards[3:]}, workers=2)
    assert content(tmp_path) == alone
    assert set(alone) == {"train.json", "train.npy", "val.json", "val.npy"}
    with pytest.raises(ValueError, match="workers"):
        index_shards(tmp_path, {"train": shards}, workers=0)


def test_an_index_is_on_disk_before_the_manifest_that_makes_it_valid(tars, tmp_path, monkeypatch):
    path, calls = tars.write(tmp_path / "x.tar", tars.samples(3)), []
    spy_on_disk(monkeypatch, lambda name, path: calls.append((name, re.sub(r"\.[0-9a-f]{32}\.partial", "", path.name))))
    index_one(path)
    in_folder = ("sync", tmp_path.name)
    assert calls == [
        *[("sync", ".train.npy"), ("rename", "train.npy"), in_folder],
        *[("sync", ".train.json"), ("rename", "train.json")],
    ]


@pytest.mark.parametrize("number", range(5))
def test_a_killed_index_leaves_no_half_of_one_and_the_next_run_removes_what_it_left(
    tars, tmp_path, monkeypatch, number
):
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


@pytest.mark.slow  # 6 s
def test_workers_end_when_the_command_is_killed(tars, tmp_path):
    for number in range(40):
        tars.write(tmp_path / f"{number}.tar", tars.samples(200, start=200 * number))
    command = [sys.executable, "-m", "maskgit_pl", "data", "index", str(tmp_path), "--num-workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    children = []
    while len(children) < 2:
        assert process.poll() is None
        time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in children):
        assert time.monotonic() < deadline, "workers outlive the command"
        time.sleep(0.1)
    assert not (tmp_path / "train.json").exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert sum(read_manifest_summary(tmp_path).samples.values()) == 8000
