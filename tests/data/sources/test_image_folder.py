"""Folders and archives of images: every form gives the same shards, and odd files are treated alike."""

import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskgit_pl.data.images import decode_image, parse_image_header
from maskgit_pl.data.samples import UnreadableSample
from maskgit_pl.data.sources.image_folder import ImageFolder
from maskgit_pl.data.sources.making import open_source
from maskgit_pl.data.writer import make_shards
from tests.hostile_images import save


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def draw(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 8), (number, 40, 200)).save(path)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Class folders: two classes of 20 images, one of each in a sub-folder, with a vector beside each."""
    folder = tmp_path / "photos"
    for number in range(40):
        path = folder / ("cat", "dog")[number % 2] / ("deep" if number < 2 else "") / f"{number} é.png"
        draw(path, number)
        np.save(path.with_suffix(".npy"), np.full(3, number, np.float32))
    return folder


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    """The folders train/ and test/ with two classes each."""
    folder = tmp_path / "photos"
    for number in range(30):
        draw(folder / ("test" if number % 5 == 0 else "train") / ("cat", "dog")[number % 2] / f"{number}.jpg", number)
    return folder


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for number in range(30):
        draw(folder / f"{number}.JPG", number)
    return folder


def zipped(folder: Path, *, inside: str = "", method: int = zipfile.ZIP_DEFLATED) -> Path:
    path = folder.parent / "archives" / "photos.zip"
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, inside + file.relative_to(folder).as_posix())
    return path


def tarred(folder: Path, *, inside: str = "", ending: str = ".tar") -> Path:
    path = folder.parent / "archives" / f"photos{ending}"
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w:gz" if ending.endswith("gz") else "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.add(file, inside + file.relative_to(folder).as_posix(), recursive=False)
    return path


ARCHIVES: dict[str, Callable[[Path], Path]] = {
    "zip": zipped,
    "zip, stored": lambda folder: zipped(folder, method=zipfile.ZIP_STORED),
    "zip of the folder itself": lambda folder: zipped(folder, inside="photos/"),
    "tar": tarred,
    "tar of ./": lambda folder: tarred(folder, inside="./"),
    "tar.gz": lambda folder: tarred(folder, ending=".tar.gz"),
    "tgz of the folder itself": lambda folder: tarred(folder, inside="photos/", ending=".tgz"),
}


@pytest.mark.slow
@pytest.mark.parametrize("archive", ARCHIVES)
@pytest.mark.parametrize("form", ["classes", "splits", "flat"])
def test_an_archive_gives_the_data_folder_of_its_files_byte_for_byte(form, archive, request, tmp_path):
    folder = request.getfixturevalue(form)
    path = ARCHIVES[archive](folder)
    fraction = None if form == "splits" else 0.3
    make_shards(open_source(folder, val_fraction=fraction), tmp_path / "of-folder", shard_size=7)
    make_shards(open_source(path, val_fraction=fraction), tmp_path / "of-archive", shard_size=7)
    assert contents(tmp_path / "of-folder") == contents(tmp_path / "of-archive")
    assert not make_shards(open_source(path, val_fraction=fraction), tmp_path / "of-folder", shard_size=7)


def rows(folder: Path, root: Path) -> list[tuple[str, str]]:
    return [(file.relative_to(root).as_posix(), file.parent.name) for file in sorted(folder.rglob("*.jpg"))]


def write_csv(folder: Path, root: Path) -> None:
    lines = [f'"{name}",{label}\r\n' for name, label in rows(folder, root)]
    (root / "metadata.csv").write_text("\ufefffile_name,label\r\n" + "".join(lines))


def write_jsonl(folder: Path, root: Path) -> None:
    numbers = {"cat": 0, "dog": 1}
    lines = [f'{{"label": {numbers[label]}, "file_name": "./{name}"}}\n' for name, label in rows(folder, root)]
    (root / "metadata.jsonl").write_text("".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize("pack", [None, "zip", "tar.gz"])
@pytest.mark.parametrize("write", [write_csv, write_jsonl])
@pytest.mark.parametrize("each_split", [True, False], ids=["a file per split", "one file"])
def test_metadata_with_the_labels_of_the_folders_give_the_same_shards(splits, tmp_path, write, each_split, pack):
    make_shards(open_source(splits), tmp_path / "of-folder")
    for root in (splits / "train", splits / "test") if each_split else (splits,):
        write(root, root)
    path = splits if pack is None else ARCHIVES[pack](splits)
    names = None if write is write_csv else ["cat", "dog"]
    make_shards(open_source(path, classes=names), tmp_path / "of-metadata")
    expected, found = contents(tmp_path / "of-folder"), contents(tmp_path / "of-metadata")
    assert expected.pop("made_from.json") != found.pop("made_from.json")  # it records the labels
    assert expected == found


def test_a_flat_folder_has_one_class_with_its_name_or_the_given_one(flat):
    for path in (flat, zipped(flat), tarred(flat, ending=".tar.gz")):
        source = open_source(path, val_fraction=0.3)
        assert source.classes == ("photos",)
        assert {sample.label for sample in source.samples("train", range(30))} == {0}
    assert open_source(flat, classes=["face"], val_fraction=0.3).classes == ("face",)
    with pytest.raises(ValueError, match=r"1 class name must be given .* got 2; make one sub-folder per class"):
        open_source(flat, classes=["a", "b"])


def test_a_webdataset_tar_is_sent_to_the_index(tars, tmp_path):
    path = tars.write(tmp_path / "train-000000.tar", tars.samples(4))
    with pytest.raises(ValueError, match=r"got \.cls files beside them.*use maskgit data index"):
        open_source(path)


def saved(mode: str, suffix: str, **options: object) -> bytes:
    image = Image.new(mode, (6, 4))
    image.putpixel((0, 0), 200 if len(image.getbands()) == 1 else tuple([200] * len(image.getbands())))
    return save(image, suffix, **options)


def with_orientation() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    return saved("RGB", "JPEG", exif=exif)


def animated(kind: str) -> bytes:
    return saved("RGB", kind, save_all=True, append_images=[Image.new("RGB", (6, 4), "red")])


# name of the file: its bytes, and (height, width, channels) or a text of the error
ODD_IMAGES: dict[str, tuple[bytes, tuple[int, int, int] | str]] = {
    "cmyk.jpg": (saved("CMYK", "JPEG"), (4, 6, 3)),
    "16-bit.png": (saved("I;16", "PNG"), (4, 6, 1)),
    "palette-with-alpha.png": (saved("P", "PNG", transparency=0), (4, 6, 3)),
    "grey-with-alpha.png": (saved("LA", "PNG"), (4, 6, 1)),
    "rotated-by-exif.jpg": (with_orientation(), (6, 4, 3)),
    "upper.JPEG": (saved("L", "JPEG"), (4, 6, 1)),
    "content-decides.jpg": (saved("RGB", "PNG"), (4, 6, 3)),
    "line\nbreak.webp": (saved("RGB", "WEBP"), (4, 6, 3)),
    os.fsdecode(b"caf\xe9.png"): (saved("RGB", "PNG"), (4, 6, 3)),
    "animated.png": (animated("PNG"), "must be a still image"),
    "animated.webp": (animated("WEBP"), "must be a still image"),
    "empty.png": (b"", "is empty"),
    "text.png": (b"hello world", "must be a JPEG, PNG or WebP file"),
    "cut.png": (saved("RGB", "PNG")[:60], "is truncated"),
}
ODD_FILES = {"image.gif": saved("P", "GIF"), "image.dat": saved("RGB", "PNG"), "image": saved("RGB", "PNG")}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd") / "photos"
    for number in range(20):
        draw(folder / "ac"[number % 2] / f"{number}.png", number)
    for name, (data, _) in ODD_IMAGES.items():
        (folder / "a" / name).write_bytes(data)
    for name, data in ODD_FILES.items():
        (folder / "a" / name).write_bytes(data)
    for name in (".hidden.png", "._0.png", ".cache/0.png"):
        draw(folder / "a" / name, 1)
    shutil.copy(folder / "c" / "1.png", folder / "a" / "copy-of-1.png")
    (folder / "a" / "link.png").symlink_to("../c/1.png")
    (folder / "a" / "broken.png").symlink_to("nothing.png")
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "b").symlink_to(folder / "a")
    return folder


def all_samples(source: ImageFolder) -> dict[str, object]:
    samples = [sample for split, count in source.counts.items() for sample in source.samples(split, range(count))]
    names = [file.name for files in source._files.values() for file in files]
    return dict(zip(names, samples, strict=True))


FORMS = {"folder": lambda folder: folder, "zip": zipped, "tar": tarred, "tar.gz": ARCHIVES["tar.gz"]}


@pytest.mark.parametrize("form", FORMS)
def test_odd_images_are_read_or_named_with_their_fault_in_every_form(odd, form, tmp_path):
    folder = shutil.copytree(odd, tmp_path / "photos", symlinks=True)
    if form == "zip":  # a zip made here cannot have names that are not UTF-8
        (folder / "a" / os.fsdecode(b"caf\xe9.png")).unlink()
    for link in ("loop", "broken.png"):
        if form == "zip":  # ZipFile.write follows links
            (folder / "a" / link).unlink()
    samples = {
        name.rpartition("/")[2]: sample for name, sample in all_samples(ImageFolder(FORMS[form](folder))).items()
    }
    for name, (data, expected) in ODD_IMAGES.items():
        if form == "zip" and name not in samples:
            continue
        sample = samples.pop(name)
        if isinstance(expected, str):
            assert isinstance(sample, UnreadableSample)
            assert expected in sample.error
            assert "\n" not in sample.error
        else:
            header = parse_image_header(sample.data, name=name)
            assert sample.data == data
            assert (header.height, header.width, header.channels) == expected
            assert decode_image(sample.data, channels=3, name=name).shape == (3, *expected[:2])
    regular = {*(f"{number}.png" for number in range(20)), "copy-of-1.png"}
    assert samples.keys() - {"link.png"} == regular  # which is left out of a tar
    assert samples["copy-of-1.png"].data == samples["1.png"].data


def test_files_that_are_left_out_of_a_folder_are_listed(odd):
    assert ImageFolder(odd).left_out == (
        "1 .dat (a/image.dat)",
        "1 .gif (a/image.gif)",
        "3 hidden (a/._0.png, a/.cache, a/.hidden.png)",
        "2 symbolic links to folders, which are not followed (b, a/loop)",
        "1 that are not regular files (a/broken.png)",
        "1 without an ending (a/image)",
    )


def test_a_link_that_leads_out_of_the_folder_is_refused(classes, tmp_path):
    draw(tmp_path / "photos-2" / "secret.png", 1)
    (classes / "cat" / "0 out.png").symlink_to(tmp_path / "photos-2" / "secret.png")
    with pytest.raises(ValueError, match=r"photos must have no links that lead out of it, got cat/0 out\.png; replace"):
        open_source(classes)


def test_a_table_does_not_lead_out_of_the_folder_by_a_link(flat, tmp_path):
    draw(tmp_path / "secrets" / "0.png", 1)
    (flat / "inner").symlink_to(tmp_path / "secrets")
    lines = [f"{number}.JPG,a\n" for number in range(30)]
    (flat / "metadata.csv").write_text("file_name,label\ninner/0.png,a\n" + "".join(lines))
    samples = all_samples(ImageFolder(flat, val_fraction=0.3))
    assert "inner/0.png cannot be read: No such file or directory" in samples["inner/0.png"].error


def test_a_folder_without_images_says_what_it_has(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "inner.zip").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"must hold .jpg, .jpeg, .png, .webp files, got 1 .zip \(inner.zip\)$"):
        open_source(tmp_path / "photos")
    (tmp_path / "photos" / "train-0.tar").write_bytes(b"x")
    with pytest.raises(
        ValueError,
        match=r"1 .tar \(train-0.tar\), 1 .zip \(inner.zip\); unpack archives inside it, or use maskgit data index",
    ):
        open_source(tmp_path / "photos")


def test_a_new_file_moves_no_other_to_another_split(classes):
    def split_of(folder):
        source = ImageFolder(folder, val_fraction=0.3)
        return {file.name: split for split, files in source._files.items() for file in files}

    before = split_of(classes)
    draw(classes / "cat" / "new.png", 1)
    after = split_of(classes)
    assert set(before.values()) == {"train", "val"}
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize(
    ("name", "message"), [("test/bird", "lacks bird"), ("train/a\nb", r"a UTF-8 name on one line, got 'a\\nb'; rename")]
)
def test_a_class_folder_of_one_split_or_with_an_odd_name_is_refused(splits, name, message):
    (splits / name).mkdir()
    with pytest.raises(ValueError, match=message):
        ImageFolder(splits)
