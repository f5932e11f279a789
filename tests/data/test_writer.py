import errno
import os
import tarfile
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from maskgit_pl.data import writer
from maskgit_pl.data.manifest import read_manifest_summary
from maskgit_pl.data.sources.image_folder import ImageFolder
from maskgit_pl.data.sources.public import IdxFiles
from maskgit_pl.data.writer import LEFT_OUT, RECORD, make_shards
from tests.data.conftest import contents


@pytest.fixture
def tree(tmp_path):
    """A folder of two classes, 30 PNG and 30 JPEG files, one of each in a sub-folder."""
    folder = tmp_path / "tree"
    for kind, suffix, colour in (("cat", "png", "red"), ("dog", "jpeg", "blue")):
        (folder / kind / "more").mkdir(parents=True)
        for number in range(30):
            path = folder / kind / ("more" if number == 0 else ".") / f"{number}.{suffix}"
            Image.new("RGB", (10 + number % 2, 8), colour).save(path)
    return folder


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's
def test_webdataset_reads_what_we_write(idx, tmp_path):
    make_shards(IdxFiles(idx), tmp_path / "out", shard_size=5)
    shards = f"{tmp_path}/out/train-{{000000..000002}}.tar"
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("png", "cls", "__key__"))
    assert [label for _, label, _ in samples] == [0, 1, 2] * 4
    assert [image.getpixel((0, 0)) for image, _, _ in samples] == [(i, i, i) for i in range(12)]
    assert [key for _, _, key in samples] == [f"{i:08d}" for i in range(12)]


def test_size_makes_squares_of_the_same_format(tree, tmp_path):
    Image.new("RGB", (9, 8)).save(tree / "cat" / "a.webp")  # becomes PNG
    make_shards(ImageFolder(tree), tmp_path / "out", image_size=4)
    images = read_manifest_summary(tmp_path / "out").images
    assert (images.height, images.width) == ((4, 4), (4, 4))
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as archive:
        extensions = {name.split(".")[1] for name in archive.getnames()}
    assert extensions == {"png", "jpg", "cls"}


def test_second_run_does_nothing_and_the_same_input_gives_the_same_bytes(idx, tmp_path):
    assert make_shards(IdxFiles(idx), tmp_path / "out")
    before = contents(tmp_path / "out")
    assert not make_shards(IdxFiles(idx), tmp_path / "out")
    assert make_shards(IdxFiles(idx), tmp_path / "again")
    assert contents(tmp_path / "out") == contents(tmp_path / "again") == before


def test_other_data_is_never_overwritten(idx, tree, tmp_path):
    make_shards(IdxFiles(idx), tmp_path / "out")
    for source, options in ((ImageFolder(tree), {}), (IdxFiles(idx), {"image_size": 3})):
        with pytest.raises(ValueError, match="another --out"):
            make_shards(source, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="another --out"):
        make_shards(IdxFiles(idx), tree)


@pytest.fixture
def written(monkeypatch) -> list[tuple[str, int]]:
    """The split and number of each shard that is written, in order."""
    write_job, jobs = writer._write_job, []
    monkeypatch.setattr(writer, "_write_job", lambda plan, job: jobs.append(job) or write_job(plan, job))
    return jobs


def test_an_interrupted_run_leaves_no_data_folder_and_resumes(idx, tmp_path, written):
    make_shards(IdxFiles(idx), tmp_path / "alone", shard_size=3)
    samples = []

    def interrupt(split, count):
        samples.append(count)
        if sum(samples) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_shards(IdxFiles(idx), tmp_path / "out", shard_size=3, on_samples=interrupt)
    assert not (tmp_path / "out").exists()
    partial = tmp_path / ".out.partial"
    (partial / f".train-000002.tar.{'0f' * 16}.partial").write_bytes(b"half")  # what kill -9 leaves
    written.clear()
    assert make_shards(IdxFiles(idx), tmp_path / "out", shard_size=3)
    assert written == [("train", 2), ("train", 3), ("val", 0), ("val", 1)]
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert not partial.exists()


def test_shards_of_an_interrupted_command_with_other_options_are_not_used(idx, tmp_path):
    def interrupt(split, count):
        if split == "val":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_shards(IdxFiles(idx), tmp_path / "out", image_size=3, on_samples=interrupt)
    make_shards(IdxFiles(idx), tmp_path / "out")
    make_shards(IdxFiles(idx), tmp_path / "alone")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def spoil(tree: Path) -> dict[str, str]:
    """Puts bad images into a folder and returns the expected message about each."""
    whole = (tree / "cat" / "1.png").read_bytes()
    bad = {
        "cat/empty.png": (b"", "is empty"),
        "cat/text.jpg": (b"hello world", "must be a JPEG, PNG or WebP file, got one that begins with b'hello wo'"),
        "dog/cut.png": (whole[:60], "is truncated after 60 bytes"),
        "dog/cut.jpeg": ((tree / "dog" / "2.jpeg").read_bytes()[:-2], "is truncated after"),
        "cat/-rf \n\x1b[31m\u202e.png": (b"x", "must be a JPEG"),
        "cat/" + os.fsdecode(b"caf\xe9.png"): (b"x", "must be a JPEG"),
    }
    for name, (data, _) in bad.items():
        (tree / name).write_bytes(data)
    return {name: f"image {tree}/{repr(name)[1:-1]} {text}" for name, (_, text) in bad.items()}


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])  # 2: processes import torch
def test_all_bad_images_are_named_at_once_each_on_a_line(tree, tmp_path, workers):
    messages = spoil(tree)
    with pytest.raises(ValueError, match=f"{len(messages)} of 66 images cannot be read") as caught:
        make_shards(ImageFolder(tree), tmp_path / "out", shard_size=20, workers=workers)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(messages) + 2
    for text in messages.values():
        assert any(line.startswith(f"  {text}") for line in lines), text
    assert lines[-1] == "replace or remove them, or leave them out with --lenient"
    assert not (tmp_path / "out").exists()


def test_lenient_leaves_bad_images_out_and_lists_them_also_after_a_kill(tree, tmp_path):
    make_shards(ImageFolder(tree, val_fraction=0.3), tmp_path / "good")
    messages = spoil(tree)

    def interrupt(split, count):
        if split == "val":
            raise KeyboardInterrupt

    source = ImageFolder(tree, val_fraction=0.3)
    with pytest.raises(KeyboardInterrupt):
        make_shards(source, tmp_path / "out", shard_size=7, lenient=True, on_samples=interrupt)
    make_shards(source, tmp_path / "out", shard_size=7, lenient=True)
    listed = (tmp_path / "out" / LEFT_OUT).read_text().splitlines()
    assert len(listed) == len(messages)
    assert all(any(line.startswith(text) for line in listed) for text in messages.values())
    assert not list((tmp_path / "out").glob(".left-out-*"))
    expected, summary = (read_manifest_summary(tmp_path / name) for name in ("good", "out"))
    assert summary.samples == expected.samples
    assert not make_shards(source, tmp_path / "out", shard_size=7)


@pytest.fixture
def spoilt(tree, tmp_path) -> dict[Path, bytes]:
    """Maps damaged files of ``tree`` to their bytes before: in shards of 4, all of shard 0 and one of shard 2."""
    names = [file.name for file in ImageFolder(tree)._files["train"]]
    files = {tree / names[place]: (tree / names[place]).read_bytes() for place in (0, 1, 2, 3, 8)}
    make_shards(ImageFolder(tree), tmp_path / "whole", shard_size=4)
    for path, data in files.items():
        path.write_bytes(bytes(len(data)))
    return files


def test_images_that_are_replaced_after_an_error_are_read_again(tree, tmp_path, spoilt, written):
    with pytest.raises(ValueError, match="5 of 60 images cannot be read"):
        make_shards(ImageFolder(tree), tmp_path / "out", shard_size=4)
    first, *others = spoilt
    first.write_bytes(spoilt[first])
    with pytest.raises(ValueError, match="4 of 60 images cannot be read"):
        make_shards(ImageFolder(tree), tmp_path / "out", shard_size=4)
    for path in others:
        path.write_bytes(spoilt[path])
    written.clear()
    make_shards(ImageFolder(tree), tmp_path / "out", shard_size=4)
    assert {shard for _, shard in written} == {0, 2}
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_split_without_a_readable_image_is_refused(tree, tmp_path):
    for split, part in (("train", "cat"), ("val", "dog")):
        (tmp_path / "both" / split).mkdir(parents=True)
        (tree / part).rename(tmp_path / "both" / split / "thing")
    whole = {path: path.read_bytes() for path in (tmp_path / "both" / "val").rglob("*.jpeg")}
    for path, data in whole.items():
        path.write_bytes(bytes(len(data)))
    with pytest.raises(ValueError, match=r"30 of 60 images cannot be read:\n  image .* must be a JPEG"):
        make_shards(ImageFolder(tmp_path / "both"), tmp_path / "out", lenient=True)
    for path, data in whole.items():
        path.write_bytes(data)
    make_shards(ImageFolder(tmp_path / "both"), tmp_path / "out", lenient=True)
    assert read_manifest_summary(tmp_path / "out").samples == {"train": 30, "val": 30}


def test_a_full_disk_is_named_with_the_shard_and_leaves_no_half_of_it(tree, tmp_path, monkeypatch):
    def fail(self, *arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tarfile.TarFile, "addfile", fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*train-000000\.tar'"):
        make_shards(ImageFolder(tree), tmp_path / "out")
    assert [path.name for path in (tmp_path / ".out.partial").iterdir()] == [RECORD]
