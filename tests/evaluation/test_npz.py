import io
import struct
import tracemalloc
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from maskgit_pl.evaluation.npz import open_samples

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)
SAVE = {"stored": np.savez, "compressed": np.savez_compressed}


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("save", SAVE)
def test_samples_are_read_in_parts(tmp_path: Path, save: str, order: str) -> None:
    SAVE[save](tmp_path / "samples.npz", np.asarray(IMAGES, order=order), np.arange(7))
    samples = open_samples(tmp_path / "samples.npz")
    assert len(samples) == 7
    assert isinstance(samples.images, np.memmap) == (save == "stored")
    assert samples.labels.tolist() == list(range(7))
    rows = samples.read(range(2, 5))
    assert rows.shape == (3, 3, 4, 5)
    assert np.array_equal(rows.permute(0, 2, 3, 1).numpy(), IMAGES[2:5])


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"arr_1": np.arange(7)}, "'arr_0': it is missing; the file holds arr_1"),
        ({"arr_0": IMAGES[0]}, r"'arr_0': the shape must be \(n, n, n, 3\), got \(4, 5, 3\)"),
        ({"arr_0": IMAGES[:0]}, r"'arr_0': the shape .* got \(0, 4, 5, 3\)"),
        ({"arr_0": IMAGES / 255}, "'arr_0': the dtype must be uint8, got float64"),
        ({"arr_0": IMAGES.astype(np.uint16)}, "'arr_0': the dtype must be uint8, got uint16"),
        ({"arr_0": IMAGES, "arr_1": np.arange(6)}, r"'arr_1': the shape must be \(7\), got \(6,\)"),
        ({"arr_0": IMAGES, "arr_1": np.arange(7) / 2}, "'arr_1': the dtype must be integer, got float64"),
        ({"arr_0": IMAGES, "arr_1": np.arange(7) - 1}, "'arr_1': labels must be >= 0, got -1"),
        ({"arr_0": np.zeros((1, 1, 1, 3), dtype=[("a", "u1")])}, "'arr_0': the dtype must be uint8, got"),
        ({"arr_0": np.array(["text"] * 3).reshape(1, 1, 1, 3)}, "'arr_0': the dtype must be uint8, got <U4"),
    ],
)
def test_other_arrays_are_refused_by_name(tmp_path: Path, arrays: dict, match: str) -> None:
    np.savez(tmp_path / "samples.npz", **arrays)
    with pytest.raises(ValueError, match=rf"samples \S+samples\.npz: array {match}"):
        open_samples(tmp_path / "samples.npz")


@pytest.mark.parametrize("save", SAVE)
def test_objects_are_never_unpickled(tmp_path: Path, save: str) -> None:
    file, canary = tmp_path / "samples.npz", tmp_path / "canary"
    SAVE[save](file, arr_0=np.array([Canary(canary)] * 3, dtype=object).reshape(1, 1, 1, 3))
    with pytest.raises(ValueError, match="array 'arr_0': the dtype must be uint8, got object"):
        open_samples(file)
    assert not canary.exists()


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


def claiming(content: bytes, size: int, claimed: int) -> bytes:
    """Returns a file whose headers give another size of a member."""
    return content.replace(struct.pack("<I", size), struct.pack("<I", claimed))


def with_header(text: bytes) -> bytes:
    return npz(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)


def hostile() -> Iterator[tuple[str, bytes, str]]:
    """Yields name, content and error of small files that would take memory, time or another parser."""
    small, zeros = array_header((10**5, 1, 1, 3)), bytes(2**25)
    yield "announced zeros", npz(array_header((2**25, 1, 1, 3)) + bytes(3 * 2**25)), "must expand to at most 67.1 MB"
    yield "hidden zeros", claiming(npz(small + zeros), len(small + zeros), len(small) + 3 * 10**5), "be read: .*CRC"
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        for shape in ((2**50, 4, 4, 3), (2**62, 2**62, 2**62, 3), (5, 1, 1, 3)):
            yield f"claim {shape}", npz(array_header(shape) + bytes(9), compression=compression), "does not match its"
    yield "long header", npz(b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**30) + bytes(2**24)), "cannot be read: EOF"
    for name, text in (("parentheses", b"(" * 9_000), ("minus signs", b"-" * 9_000 + b"1"), ("code", b"exit()")):
        yield name, with_header(text), r"cannot be read: \S"
    yield "version", npz(b"\x93NUMPY\x03\x00" + bytes(99)), "cannot be read"
    for compression in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        yield (
            f"compression {compression}",
            npz(array_header((1, 1, 1, 3)) + bytes(3), compression=compression),
            "must be stored or deflated",
        )
    yield "many arrays", npz(*[array_header((3,)) + bytes(3)] * 101), "at most 100 entries, got 101"
    yield "name", npz(array_header((3,)) + bytes(3), name="\x1b[31m\n"), r"holds \\x1b\[31m\\n"
    yield "text", b"nonsense", r"cannot be read as an \.npz file"
    yield "empty", b"", r"cannot be read as an \.npz file"
    yield "no array", npz(b"hello", name="readme.txt"), r"the file holds readme\.txt"


@pytest.mark.parametrize(("content", "match"), [pytest.param(*rest, id=name) for name, *rest in hostile()])
def test_hostile_files_are_refused_in_one_line_without_memory(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "samples.npz").write_bytes(content)
    assert len(content) < 500_000
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"samples \S+samples\.npz.*{match}") as caught:
            open_samples(tmp_path / "samples.npz")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert peak < 20 * 2**20


@pytest.mark.parametrize("save", SAVE)
def test_a_damaged_file_is_refused_in_one_line_or_gives_images(tmp_path: Path, save: str) -> None:
    file, faults, refused = tmp_path / "samples.npz", [], 0
    SAVE[save](file, IMAGES, np.arange(7))
    whole = file.read_bytes()
    damaged = [whole[: len(whole) * part // 40] for part in range(40)]
    for place in range(0, len(whole), 7):
        damaged += [whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :] for flip in (1, 255)]
    assert len(damaged) > 200
    for number, content in enumerate(damaged):
        file.write_bytes(content)
        try:
            if open_samples(file).images.shape != IMAGES.shape:
                faults.append((number, "another shape"))
        except ValueError as error:
            refused += 1
            if "\n" in str(error) or str(file) not in str(error):
                faults.append((number, str(error)))
    assert not faults
    assert refused > 50


def test_of_two_arrays_with_one_name_the_last_one_is_read(tmp_path: Path) -> None:
    (tmp_path / "samples.npz").write_bytes(npz(*(array_header((1, 1, 1, 3)) + bytes([value] * 3) for value in (1, 2))))
    assert open_samples(tmp_path / "samples.npz").images.ravel().tolist() == [2, 2, 2]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be an existing \.npz file"):
        open_samples(tmp_path / "none.npz")
