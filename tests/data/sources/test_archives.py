"""Hostile and damaged archives: each is answered in one line, or the member is left out and listed."""

import gzip
import io
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from maskgit_pl.data.samples import UnreadableSample
from maskgit_pl.data.sources.archives import Entries
from maskgit_pl.data.sources.image_folder import ImageFolder
from maskgit_pl.data.sources.shards import open_source
from maskgit_pl.data.writer import make_shards
from tests.data.conftest import less_memory_than
from tests.data.sources.test_image_folder import all_samples
from tests.hostile_images import save


def png(number: int) -> bytes:
    return save(Image.new("RGB", (9, 8), (number, 1, 2)), "PNG")


GOOD = [(f"{'ab'[number % 2]}/{number}.png", png(number)) for number in range(20)]
NO_FILE = "that are links, devices, sparse, encrypted or compressed other than by deflate"
BAD_NAMES = ["../a/up.png", "a/../../up.png"]


def write_zip(path: Path, members: list[tuple[str, bytes]], **fields: object) -> Path:
    """Writes a zip; ``fields`` are attributes of the last member."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, (name, data) in enumerate(members, 1):
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            if number == len(members):
                for field, value in fields.items():
                    setattr(info, field, value)
            archive.writestr(info, data)
    return path


def write_tar(path: Path, members: list[tuple[str, bytes]], **fields: object) -> Path:
    with tarfile.open(path, "w") as archive:
        for number, (name, data) in enumerate(members, 1):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if number == len(members):
                for field, value in fields.items():
                    setattr(info, field, value)
            archive.addfile(info, io.BytesIO(data))
    return path


WRITERS = {"photos.zip": write_zip, "photos.tar": write_tar}


def samples_of(path: Path) -> dict[str, object]:
    return all_samples(ImageFolder(path, val_fraction=0.3))


@pytest.mark.parametrize("name", WRITERS)
def test_names_that_lead_out_are_left_out_and_nothing_is_written(name, tmp_path):
    (tmp_path / "in").mkdir()
    path = WRITERS[name](tmp_path / "in" / name, [*GOOD, *((bad, png(1)) for bad in BAD_NAMES), ("/a/0.png", png(0))])
    source = open_source(path, val_fraction=0.3)
    assert source.left_out == ("2 hidden (../a/up.png, a/../../up.png)",)
    make_shards(source, tmp_path / "out")
    assert {file.name for file in tmp_path.iterdir()} == {"in", "out"}
    assert [file.name for file in (tmp_path / "in").iterdir()] == [name]
    assert samples_of(path).keys() == {name for name, _ in GOOD}


@pytest.mark.parametrize("name", WRITERS)
def test_a_name_of_thousands_of_folders_takes_no_more_memory_than_its_length(name, tmp_path):
    path = WRITERS[name](tmp_path / name, [*GOOD, ("a/" + "x/" * 30_000 + "long.png", png(1))])
    with less_memory_than(2**22):
        assert Entries(path).folders == {"a", "b", "a/x", "a/x/x"}


@pytest.mark.filterwarnings("ignore:Duplicate name")  # zipfile's
@pytest.mark.parametrize("name", WRITERS)
def test_of_members_with_one_name_the_last_one_counts(name, tmp_path):
    path = WRITERS[name](tmp_path / name, [("a/0.png", png(99)), *GOOD])
    assert samples_of(path)["a/0.png"].data == png(0)


@pytest.mark.parametrize("name", WRITERS)
def test_links_and_archives_inside_and_files_of_macos_are_left_out(name, tmp_path):
    more = [("a/inner.zip", b"PK"), ("__MACOSX/a/._0.png", b"x"), ("a/.DS_Store", b"x"), ("a/link.png", b"/etc/passwd")]
    if name.endswith("zip"):
        path = write_zip(tmp_path / name, [*GOOD, *more], external_attr=(stat.S_IFLNK | 0o777) << 16)
    else:
        link = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd", "size": 0}
        path = write_tar(tmp_path / name, [*GOOD, *more], **link)
    assert ImageFolder(path, val_fraction=0.3).left_out == (
        "1 .zip (a/inner.zip)",
        "2 hidden (__MACOSX/a/._0.png, a/.DS_Store)",
        f"1 {NO_FILE} (a/link.png)",
    )


def test_encrypted_files_and_a_compression_other_than_deflate_are_left_out(tmp_path):
    path = write_zip(tmp_path / "photos.zip", [*GOOD, ("a/x.png", png(1))], compress_type=zipfile.ZIP_LZMA)
    assert ImageFolder(path, val_fraction=0.3).left_out == (f"1 {NO_FILE} (a/x.png)",)
    path = write_zip(tmp_path / "photos.zip", [*GOOD, ("a/x.png", png(1))])
    directory_field(path, 8, b"\1\0")
    assert ImageFolder(path, val_fraction=0.3).left_out == (f"1 {NO_FILE} (a/x.png)",)


def directory_field(path: Path, offset: int, value: bytes) -> None:
    """Overwrites bytes of the last entry of a zip's central directory."""
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\1\2")
    data[entry + offset : entry + offset + len(value)] = value
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("offset", "value", "fault"),
    [
        (24, struct.pack("<I", 2**29), "must have at most 268 MB, got 537 MB"),
        (24, struct.pack("<I", 900), "is damaged: 76 bytes in the zip for 900"),
        (42, None, "is damaged: Bad magic number for file header"),
    ],
)
def test_a_member_with_a_wrong_directory_entry_is_unreadable(tmp_path, offset, value, fault):
    path = write_zip(tmp_path / "photos.zip", GOOD)
    with zipfile.ZipFile(path) as archive:
        one_further = struct.pack("<I", archive.getinfo("b/19.png").header_offset + 1)
    directory_field(path, offset, value or one_further)
    samples = samples_of(path)
    assert samples.pop("b/19.png") == UnreadableSample(f"image {path}/b/19.png {fault}")
    assert not [sample for sample in samples.values() if isinstance(sample, UnreadableSample)]


@pytest.mark.parametrize("stated", [0, 100])
def test_no_more_of_a_member_is_decompressed_than_the_directory_states(tmp_path, stated):
    path = write_zip(tmp_path / "photos.zip", [*GOOD, ("b/bomb.png", bytes(2**25))])
    directory_field(path, 24, struct.pack("<I", stated))
    with less_memory_than(2**22):
        assert "is damaged: Bad CRC-32" in samples_of(path)["b/bomb.png"].error


DAMAGE = {
    "photos.zip": [
        (lambda data: data[: len(data) // 3] + data[-22:], "must be a complete zip, got: "),
        (lambda data: data.replace(b"PK\1\2", b"PK\1\3"), "must be a complete zip, got: "),
    ],
    "photos.tar": [
        (lambda data: data[:9999], "got: truncated "),
        (lambda data: data[:1024] + b"\xff" * 512 + data[1536:], "got: damaged member header at byte 1024"),
        (lambda data: b"", "got: empty file"),
        (gzip.compress, "got: not an uncompressed tar, "),
    ],
    "text.jpg": [
        (lambda data: b"hello world", "a zip or a tar of images, got: not an uncompressed tar, .* b'hello wo'")
    ],
}


@pytest.mark.parametrize(("name", "number"), [(name, n) for name, cases in DAMAGE.items() for n in range(len(cases))])
def test_a_damaged_archive_is_refused_in_one_line(name, number, tmp_path):
    path = WRITERS.get(name, write_tar)(tmp_path / name, GOOD)
    damage, text = DAMAGE[name][number]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=text) as caught:
        open_source(path)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_zip_that_states_too_many_bytes_is_refused_before_any_is_read(tmp_path):
    path = write_zip(tmp_path / "photos.zip", GOOD)
    data = path.read_bytes()
    path.write_bytes(data.replace(data[data.index(b"PK\1\2") :][20:28], struct.pack("<II", 60, 2**28)))
    with pytest.raises(ValueError, match=r"must hold at most 1.07 GB, which is 100 times its length or 1 GiB, got 5"):
        open_source(path)


def write_directory(path: Path, entries: bytes, size: int) -> Path:
    """Writes a zip with a directory of ``size`` bytes that begins with ``entries`` and is otherwise a hole of zeros."""
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 0xFFFF, 0xFFFF, size, 4)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, 4 + size, 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    with path.open("wb") as file:
        file.write(b"PK\3\4" + entries)
        file.seek(4 + size)
        file.write(end64 + locator + end)
    return path


ENTRY = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, *[0] * 15)  # without a name


@pytest.mark.parametrize(
    ("count", "size", "rule"),
    [
        (1, 2**30 + 1, "a directory of at most 1.07 GB, got one of 1.07 GB"),
        (1001, 1001 * len(ENTRY), "at most 1,000 entries, got 1,001"),
    ],
)
def test_a_zip_with_too_large_a_directory_is_refused_before_it_is_parsed(tmp_path, monkeypatch, count, size, rule):
    monkeypatch.setattr("maskgit_pl.data.sources.archives._MAX_ENTRIES", 1000)
    path = write_directory(tmp_path / "photos.zip", ENTRY * count, size)
    match = rf"photos\.zip must have {rule}; extract it and name the folder"
    with less_memory_than(2**20), pytest.raises(ValueError, match=match):
        open_source(path)
