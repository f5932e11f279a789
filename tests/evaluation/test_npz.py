import io
import struct
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

from maskgit_pl.evaluation.npz import ArrayFile, open_samples

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)
SAVE = {"stored": np.savez, "compressed": np.savez_compressed}


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", SAVE)
def test_samples_are_read_in_parts(tmp_path: Path, save: str) -> None:
    SAVE[save](tmp_path / "samples.npz", IMAGES, np.arange(7))
    samples = open_samples(tmp_path / "samples.npz")
    assert len(samples) == 7
    assert isinstance(samples.images, np.memmap) == (save == "stored")
    assert samples.labels.tolist() == list(range(7))
    rows = samples.read(range(2, 5))
    assert rows.shape == (3, 3, 4, 5)
    assert np.array_equal(rows.permute(0, 2, 3, 1).numpy(), IMAGES[2:5])


def test_labels_may_be_missing_and_columns_may_lie_first(tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", np.asfortranarray(IMAGES))
    samples = open_samples(tmp_path / "samples.npz")
    assert samples.labels is None
    assert np.array_equal(samples.read(range(7)).permute(0, 2, 3, 1).numpy(), IMAGES)


def test_grey_images_have_one_channel_and_colour_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "grey.npz", np.repeat(IMAGES[..., :1], 3, axis=3))
    assert open_samples(tmp_path / "grey.npz").read(range(7), channels=1).shape == (7, 1, 4, 5)
    np.savez(tmp_path / "colour.npz", IMAGES)
    with pytest.raises(ValueError, match="must be grey, got colour among images 0 to 6"):
        open_samples(tmp_path / "colour.npz").read(range(7), channels=1)


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"arr_1": np.arange(7)}, "'arr_0': it is missing; the file holds arr_1"),
        ({"arr_0": IMAGES[0]}, r"'arr_0': the shape must be \(n, n, n, 3\), got \(4, 5, 3\)"),
        ({"arr_0": IMAGES[:0]}, r"'arr_0': the shape .* got \(0, 4, 5, 3\)"),
        ({"arr_0": IMAGES / 255}, "'arr_0': the dtype must be uint8, got float64"),
        ({"arr_0": IMAGES, "arr_1": np.arange(6)}, r"'arr_1': the shape must be \(7\), got \(6,\)"),
        ({"arr_0": IMAGES, "arr_1": np.arange(7) / 2}, "'arr_1': the dtype must be integer, got float64"),
        ({"arr_0": IMAGES, "arr_1": np.arange(7) - 1}, "'arr_1': labels must be >= 0, got -1"),
        ({"arr_0": np.zeros(3, dtype=[("a", "u1")])}, "'arr_0': it must hold plain numbers"),
        ({"arr_0": np.array(["text"])}, "'arr_0': the shape"),
    ],
)
def test_other_arrays_are_refused_by_name(tmp_path: Path, arrays: dict, match: str) -> None:
    np.savez(tmp_path / "samples.npz", **arrays)
    with pytest.raises(ValueError, match=rf"samples \S+samples\.npz: array {match}"):
        open_samples(tmp_path / "samples.npz")


@pytest.mark.parametrize("save", SAVE)
def test_objects_are_never_unpickled(tmp_path: Path, save: str) -> None:
    file, canary = tmp_path / "samples.npz", tmp_path / "canary"
    SAVE[save](file, arr_0=IMAGES, extra=np.array([Canary(canary)], dtype=object))
    with pytest.raises(ValueError, match="array 'extra': it must hold plain numbers, got objects"):
        open_samples(file)
    assert not canary.exists()


def test_a_header_that_lies_about_its_size_is_refused_without_memory(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2**50, 4, 4, 3)})
    with zipfile.ZipFile(tmp_path / "samples.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(100))
    with pytest.raises(ValueError, match="its size does not match its shape"):
        open_samples(tmp_path / "samples.npz")


def array_header(shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def npz(*members: bytes, compression: int = zipfile.ZIP_DEFLATED, name: str = "arr_0.npy") -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        for member in members:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of names that come twice
                archive.writestr(name, member)
    return content.getvalue()


def announced_zeros() -> bytes:
    return npz(array_header((2**25, 1, 1, 3)) + bytes(3 * 2**25))


def zeros_that_are_not_said() -> bytes:
    header = array_header((10**5, 1, 1, 3))
    member = header + bytes(2**25)
    return npz(member).replace(struct.pack("<I", len(member)), struct.pack("<I", len(header) + 3 * 10**5))


def nested_header(text: bytes) -> bytes:
    return npz(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)


HOSTILE = {
    "announced zeros": (announced_zeros, "it must expand to at most 67.1 MB, got 101 MB; save it uncompressed"),
    "zeros that are not said": (zeros_that_are_not_said, "it cannot be read: .*CRC"),
    "header of a gibibyte": (
        lambda: npz(b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**30) + bytes(2**24)), "damaged or not an .npz file: EOF"
    ),
    "parentheses": (lambda: nested_header(b"(" * 9_000), "damaged or not an .npz file"),
    "minus signs": (lambda: nested_header(b"-" * 9_000 + b"1"), "damaged or not an .npz file"),
    "lzma": (lambda: npz(array_header((1, 1, 1, 3)) + bytes(3), compression=zipfile.ZIP_LZMA), "stored or deflated"),
    "many arrays": (lambda: npz(*[array_header((3,)) + bytes(3)] * 101), "must have at most 100 entries, got 101"),
    "another name": (lambda: npz(array_header((3,)) + bytes(3), name="\x1b[31m\n"), r"holds \\x1b\[31m\\n"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_small_files_that_expand_are_refused_in_one_line_without_memory(tmp_path: Path, name: str) -> None:
    make, match = HOSTILE[name]
    (tmp_path / "samples.npz").write_bytes(make())
    assert (tmp_path / "samples.npz").stat().st_size < 500_000
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"samples \S+samples\.npz.*{match}") as caught:
            open_samples(tmp_path / "samples.npz")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert peak < 20 * 2**20


def test_of_two_arrays_with_one_name_the_checked_one_is_read(tmp_path: Path) -> None:
    (tmp_path / "samples.npz").write_bytes(npz(*(array_header((1, 1, 1, 3)) + bytes([value] * 3) for value in (1, 2))))
    assert open_samples(tmp_path / "samples.npz").images.ravel().tolist() == [2, 2, 2]


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", IMAGES)
    content = (tmp_path / "whole.npz").read_bytes()
    for name, damaged in (("cut", content[:-40]), ("text", b"nonsense"), ("empty", b"")):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"samples \S+{name} is damaged or not an \.npz file"):
            open_samples(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"other\.npz is damaged or not an \.npz file"):
        open_samples(tmp_path / "other.npz")
    with pytest.raises(ValueError, match=r"must be an existing \.npz file"):
        open_samples(tmp_path / "none.npz")


def test_damaged_numbers_are_found(tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", IMAGES)
    content = bytearray((tmp_path / "samples.npz").read_bytes())
    content[300] ^= 1
    (tmp_path / "samples.npz").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        ArrayFile(tmp_path / "samples.npz", thing="samples").check()
