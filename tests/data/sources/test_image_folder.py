"""Folders and archives of images: their classes and labels, and odd files, are the same in every form."""

import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from maskgit_pl.data.images import decode_image, parse_image_header
from maskgit_pl.data.samples import UnreadableSample
from maskgit_pl.data.sources.image_folder import ImageFolder
from maskgit_pl.data.sources.shards import open_source
from maskgit_pl.data.writer import make_shards
from tests.data.conftest import contents
from tests.hostile_images import save
from tests.hostile_images import saved as many_frames


def draw(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 8), (number, 40, 200)).save(path)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Class folders: two classes of 20 images, one of each in a sub-folder."""
    folder = tmp_path / "photos"
    for number in range(40):
        path = folder / ("cat", "dog")[number % 2] / ("deep" if number < 2 else "") / f"{number} é.png"
        draw(path, number)
    return folder


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    """The folders train/ and test/ with two classes each."""
    folder = tmp_path / "photos"
    for number in range(30):
        draw(folder / ("test" if number % 5 == 0 else "train") / ("cat", "dog")[number % 2] / f"{number}.jpg", number)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(20):
        draw(tmp_path / "photos" / f"{number}.png", number)
    return tmp_path / "photos"


def zipped(folder: Path, *, inside: str = "", method: int = zipfile.ZIP_DEFLATED) -> Path:
    path = folder.parent / "archives" / "photos.zip"
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, inside + file.relative_to(folder).as_posix())
    return path


def tarred(folder: Path, *, inside: str = "") -> Path:
    path = folder.parent / "archives" / "photos.tar"
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.add(file, inside + file.relative_to(folder).as_posix(), recursive=False)
    return path


ARCHIVES: dict[str, Callable[[Path], Path]] = {
    "zip": zipped,
    "zip of the folder itself": lambda folder: zipped(folder, inside="photos/"),
    "tar": tarred,
    "tar of ./": lambda folder: tarred(folder, inside="./"),
}


@pytest.mark.slow
@pytest.mark.parametrize("archive", ARCHIVES)
@pytest.mark.parametrize("form", ["classes", "splits"])
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


@pytest.mark.slow
@pytest.mark.parametrize("each_split", [True, False])
def test_metadata_with_the_labels_of_the_folders_give_the_same_data_folder(splits, tmp_path, each_split):
    make_shards(open_source(splits), tmp_path / "of-folder")
    for root in (splits / "train", splits / "test") if each_split else (splits,):
        write_csv(root, root)
    assert not make_shards(open_source(zipped(splits)), tmp_path / "of-folder")


def test_a_flat_folder_has_one_class_with_its_name_or_the_given_one(photos):
    for path in (photos, zipped(photos), tarred(photos)):
        source = open_source(path, val_fraction=0.3)
        assert source.classes == ("photos",)
        assert {sample.label for sample in source.samples("train", range(30))} == {0}
    assert open_source(photos, classes=["face"], val_fraction=0.3).classes == ("face",)
    with pytest.raises(ValueError, match=r"photos: label must be one of the class names, got 'photos'"):
        open_source(photos, classes=["a", "b"])


def test_class_names_order_the_class_folders_and_may_be_more(classes):
    source = open_source(classes, classes=["dog", "bird", "cat"], val_fraction=0.3)
    assert source.classes == ("dog", "bird", "cat")
    assert all(name.startswith(label) for name, label in labels_of(source).items())
    with pytest.raises(ValueError, match=r"photos: label must be one of the class names, got 'dog'"):
        open_source(classes, classes=["cat"])


def test_a_webdataset_tar_is_sent_to_the_index(tars, tmp_path):
    path = tars.write(tmp_path / "train-000000.tar", tars.samples(4))
    with pytest.raises(ValueError, match=r"got \.cls files beside them.*use maskgit data index"):
        open_source(path)


def saved(mode: str, suffix: str, **options: object) -> bytes:
    image = Image.new(mode, (6, 4))
    image.putpixel((0, 0), 200 if len(image.getbands()) == 1 else tuple([200] * len(image.getbands())))
    return save(image, suffix, **options)


TURNED = Image.Exif()
TURNED[0x0112] = 6  # by 90 degrees
# name of the file: its bytes, and (height, width, channels) or a text of the error
ODD_IMAGES: dict[str, tuple[bytes, tuple[int, int, int] | str]] = {
    "cmyk.jpg": (saved("CMYK", "JPEG"), (4, 6, 3)),
    "grey-with-alpha.png": (saved("LA", "PNG"), (4, 6, 1)),
    "rotated-by-exif.jpg": (saved("RGB", "JPEG", exif=TURNED), (6, 4, 3)),
    "content-decides.jpg": (saved("RGB", "PNG"), (4, 6, 3)),
    "line\nbreak.webp": (saved("RGB", "WEBP"), (4, 6, 3)),
    os.fsdecode(b"caf\xe9.png"): (saved("RGB", "PNG"), (4, 6, 3)),
    "animated.png": (many_frames("PNG", frames=2), "must be a still image"),
    "animated.webp": (many_frames("WEBP", frames=300), "must be a still image"),
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


@pytest.mark.parametrize("pack", [lambda folder: folder, tarred], ids=["folder", "tar"])
def test_odd_images_are_read_or_named_with_their_fault(odd, pack, tmp_path):
    folder = shutil.copytree(odd, tmp_path / "photos", symlinks=True)
    named = all_samples(ImageFolder(pack(folder)))
    samples = {name.rpartition("/")[2]: sample for name, sample in named.items()}
    for name, (data, expected) in ODD_IMAGES.items():
        sample = samples.pop(name)
        if isinstance(expected, str):
            assert isinstance(sample, UnreadableSample)
            assert expected in sample.error
            assert "\n" not in sample.error
        else:
            header = parse_image_header(sample.data, name=name)
            assert (sample.data, header.height, header.width, header.channels) == (data, *expected)
            assert decode_image(sample.data, channels=3, name=name).shape == (3, *expected[:2])
    regular = {*(f"{number}.png" for number in range(20)), "copy-of-1.png"}
    assert samples.keys() == regular
    assert samples["copy-of-1.png"].data == samples["1.png"].data


def test_files_that_are_left_out_of_a_folder_are_listed(odd):
    assert ImageFolder(odd).left_out == (
        "1 .dat (a/image.dat)",
        "1 .gif (a/image.gif)",
        "3 hidden (a/._0.png, a/.cache, a/.hidden.png)",
        "4 that are links or devices (b, a/broken.png, a/link.png, ...)",
        "1 without an ending (a/image)",
    )


def test_a_folder_without_images_says_what_it_has(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "inner.zip").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"must hold .jpg, .jpeg, .png, .webp files, got 1 .zip \(inner.zip\)$"):
        open_source(tmp_path / "photos")
    (tmp_path / "photos" / "train-0.tar").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"1 .zip \(inner.zip\); unpack archives inside it, or use maskgit data index"):
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


def test_a_class_folder_with_an_odd_name_is_refused(splits):
    (splits / "train" / "a\nb").mkdir()
    with pytest.raises(ValueError, match=r"a UTF-8 name on one line, got 'a\\nb'; rename"):
        ImageFolder(splits)


def write_table(folder: Path, lines: list[str], *, header: str = "file_name,label") -> None:
    (folder / "metadata.csv").write_text("\n".join([header, *lines]), encoding="utf-8")


def labels_of(source: ImageFolder) -> dict[str, str]:
    return {file.name: source.classes[file.label] for files in source._files.values() for file in files}


def test_names_are_classes_in_alphabetical_or_in_the_given_order(photos):
    write_table(photos, [f"{number}.png,{'dog' if number % 2 else 'cat'}" for number in range(20)])
    expected = {f"{number}.png": "dog" if number % 2 else "cat" for number in range(20)}
    for given, classes in ((None, ("cat", "dog")), (["dog", "cat", "bird"], ("dog", "cat", "bird"))):
        source = open_source(photos, classes=given, val_fraction=0.3)
        assert source.classes == classes
        assert labels_of(source) == expected
    with pytest.raises(ValueError, match="label must be one of the class names, got 'cat'"):
        open_source(photos, classes=["dog"])


def test_whole_numbers_are_class_numbers(photos):
    write_table(photos, [f"{number}.png,{number % 3}" for number in range(20)])
    assert open_source(photos, val_fraction=0.3).classes == ("0", "1", "2")
    assert open_source(photos, classes=["a", "b", "c", "d"], val_fraction=0.3).classes == ("a", "b", "c", "d")
    with pytest.raises(ValueError, match=r"metadata metadata.csv: 2.png: label must be in \[0, 2\), got 2"):
        open_source(photos, classes=["a", "b"])
    for wrong in (-1, 2**40):
        write_table(photos, ["0.png,0", f"1.png,{wrong}"])
        with pytest.raises(ValueError, match=rf"csv: 1.png: label must be in \[0, 100000\), got {wrong}"):
            open_source(photos)


def test_missing_files_are_unreadable_and_files_without_a_row_are_left_out(photos):
    (photos.parent / "outside.png").write_bytes((photos / "0.png").read_bytes())
    write_table(photos, [f"{number}.png,a" for number in range(2, 22)] + ["2.png,a", "../outside.png,a"])
    (photos / "notes.txt").write_text("x")
    source = ImageFolder(photos, val_fraction=0.3)
    samples = all_samples(source).values()
    faults = sorted(sample.error for sample in samples if isinstance(sample, UnreadableSample))
    missing = ("../outside", "20", "21")
    assert faults == [f"image {photos}/{name}.png cannot be read: No such file or directory" for name in missing]
    assert len(samples) == 21
    assert source.left_out == ("1 .txt (notes.txt)", "2 without a label (0.png, 1.png)")


def test_another_column_may_hold_the_labels(photos):
    write_table(photos, [*(f"{n}.png,{'ab'[n % 2]}" for n in range(20)), ""], header="file_name,species")
    assert open_source(photos, label_field="species", val_fraction=0.3).classes == ("a", "b")
    with pytest.raises(ValueError, match="must have one column 'label', got file_name, species; set it with"):
        open_source(photos)


CSV_FAULTS = {
    "file_name,label\n0.png": "line 2 must have a file_name, a label and 2 values in all",
    "file_name,label\n0.png,a,b": "line 2 must have a file_name, a label and 2 values in all",
    "": "must have one column 'file_name', got none",
    "file_name,label,label\n0.png,a,b": "must have one column 'label', got file_name, label, label; set it with",
    "file_name,label\n0.png,": "line 2 must have a file_name, a label and",
    "file_name,label\n0.png,a\n./0.png,b": "line 3: 0.png must have one label, got 'a' and 'b'",
    'file_name,label\n"0.png,a': "got: unexpected end of data",
    'file_name,label\n0.png,"a\nb"': "a class must have a UTF-8 name on one line, got 'a\\\\nb'",
    "file_name,label\n0.png," + "9" * 200_000: "got: field larger than field limit",
}


@pytest.mark.parametrize("folder", [".", "train", "test"])
def test_labels_in_another_format_are_refused_and_not_lost(splits, folder):
    (splits / folder / "metadata.jsonl").write_text('{"file_name": "0.png", "label": 1}\n')
    with pytest.raises(ValueError, match=r"must have its labels in metadata\.csv, got .*metadata\.jsonl; write"):
        ImageFolder(splits)
    write_table(splits, [f"{path.relative_to(splits)},a" for path in splits.rglob("*.jpg")])
    assert ImageFolder(splits).classes == ("a",)


@pytest.mark.parametrize("text", CSV_FAULTS)
def test_faulty_metadata_are_refused_in_one_line(photos, text):
    (photos / "metadata.csv").write_text(text)
    with pytest.raises(ValueError, match=CSV_FAULTS[text]) as caught:
        open_source(photos)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
