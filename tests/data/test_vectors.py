"""Vectors of images: what is accepted and refused, and their way from files through shards and back."""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from maskgit_pl.data.images import decode_image, encode_png
from maskgit_pl.data.index import find_shards, index_shards
from maskgit_pl.data.manifest import ShardReader, check_vectors, load_manifest, read_manifest_summary
from maskgit_pl.data.samples import UnreadableSample
from maskgit_pl.data.sources.making import open_source
from maskgit_pl.data.vectors import VectorKind, parse_vector
from maskgit_pl.data.verify import verify_shards
from maskgit_pl.data.writer import make_shards
from maskgit_pl.errors import DataChangedError

DIM = 5


def npy(array: object, **options: bool) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def vector(number: int, dtype: str = "float16") -> np.ndarray:
    return (number + np.arange(DIM) / 8).astype(dtype)


def write_images(folder: Path, *, count: int = 8, dtype: str = "float16") -> Path:
    """Writes images of two classes, whose first pixel is their number, with a vector beside each."""
    for number in range(count):
        place = folder / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = torch.full((1, 4, 4), number, dtype=torch.uint8)
        (place / f"{number}.png").write_bytes(encode_png(pixels))
        np.save(place / f"{number}.npy", vector(number, dtype))
    return folder


def make(source: Path, out: Path, **options: object) -> Path:
    make_shards(open_source(source, val_fraction=0.3), out, shard_size=3, **options)
    return out


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors")
    return make(write_images(folder / "images", count=20), folder / "shards")


HUGE_HEADER = b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little") + b"{'descr': '<f4'}"
HOSTILE = {
    "pickle": (pickle.dumps([1]), r"must be a \.npy file"),
    "objects": (
        npy(np.array([{}], dtype=object), allow_pickle=True),
        "must hold float16 or float32 values, got pickled Python objects",
    ),
    "a header of 2 GiB": (HUGE_HEADER, r"must be a \.npy file"),
    "a header that is code": (npy(vector(0)).replace(b"'descr'", b"exit(1)"), r"must be a \.npy file"),
    "empty": (b"", r"must be a \.npy file"),
    "NaN": (npy(np.array([1, np.nan, 2], np.float32)), "must have finite values, got nan at place 1"),
    "infinity": (npy(np.array([np.inf], np.float16)), "must have finite values, got inf at place 0"),
    "float64": (npy(np.zeros(3)), "must hold little-endian float16 or float32 values, got <f8"),
    "integers": (npy(np.zeros(3, np.int64)), "must hold little-endian float16 or float32 values, got <i8"),
    "big-endian": (npy(np.zeros(3, ">f4")), "must hold little-endian float16 or float32 values, got >f4"),
    "two dimensions": (npy(np.zeros((1, 3), np.float32)), r"must have 1 dimension, got shape \(1, 3\)"),
    "a number": (npy(np.float32(1)), r"must have 1 dimension, got shape \(\)"),
    "no values": (npy(np.zeros(0, np.float32)), "must have 1 to 65536 values, got 0"),
    "too many values": (npy(np.zeros(2**16 + 1, np.float16)), "must have 1 to 65536 values, got 65537"),
    "truncated": (npy(vector(0))[:-1], "must hold 5 float16 values, 10 bytes, got 9 bytes"),
    "longer": (npy(vector(0)) + b"x", "must hold 5 float16 values, 10 bytes, got 11 bytes"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_that_is_no_vector_is_refused_by_name(kind: str) -> None:
    data, message = HOSTILE[kind]
    with pytest.raises(ValueError, match=rf"vector a/1\.npy {message}"):
        parse_vector(data, name="a/1.npy")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_values_start_where_the_header_says(dtype: str, version: tuple[int, int]) -> None:
    file = io.BytesIO()
    np.lib.format.write_array(file, vector(3, dtype), version=version)
    kind, start = parse_vector(file.getvalue(), name="v")
    assert kind == VectorKind(DIM, dtype)
    assert np.array_equal(np.frombuffer(file.getvalue(), dtype, offset=start), vector(3, dtype))


def test_a_vector_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = write_images(tmp_path / "images", count=20) / "a" / "0.npy"
    os.truncate(path, 2**40)
    source = open_source(tmp_path / "images", val_fraction=0.3)
    samples = [sample for split, count in source.counts.items() for sample in source.samples(split, range(count))]
    faults = [sample.error for sample in samples if isinstance(sample, UnreadableSample)]
    assert faults == [f"vector {path} must have at most 266 kB, got 1.1 TB"]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_each_image_keeps_its_vector_through_make_verify_and_read(tmp_path: Path, dtype: str) -> None:
    folder = make(write_images(tmp_path / "images", count=20, dtype=dtype), tmp_path / "shards", size=4)
    assert read_manifest_summary(folder).vectors == VectorKind(DIM, dtype)
    assert verify_shards(folder).bad == ()
    seen = set()
    for split in ("train", "val"):
        manifest = load_manifest(folder, split)
        check_vectors(manifest)
        reader, vectors = ShardReader(manifest), manifest.vector_reader()
        for index in range(len(reader)):
            number = int(decode_image(reader.read(index), channels=1, name="")[0, 0, 0])
            (read,) = vectors.read(np.array([index]))
            assert read.dtype == np.float32
            assert np.array_equal(read, vector(number, dtype).astype(np.float32))
            seen.add(number)
    assert seen == set(range(20))


def test_without_vectors_the_record_and_the_fingerprint_are_those_of_plain_images(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", count=20)
    make_shards(open_source(images, val_fraction=0.3, vectors=False), tmp_path / "ignored")
    for path in images.rglob("*.npy"):
        path.unlink()
    make_shards(open_source(images, val_fraction=0.3), tmp_path / "plain")
    assert read_manifest_summary(tmp_path / "ignored") == read_manifest_summary(tmp_path / "plain")
    assert "vector" not in (tmp_path / "plain" / "train.json").read_text()
    assert "vectors" not in json.loads((tmp_path / "plain" / "made_from.json").read_text())["source"]


def test_an_image_without_a_vector_is_named_or_left_out(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", count=20)
    (images / "a" / "0.npy").unlink()
    (images / "b" / "1.npy").write_bytes(npy(np.zeros(DIM + 1, np.float16)))
    with pytest.raises(ValueError, match=r"must have the vector 0\.npy beside it, got none") as error:
        make(images, tmp_path / "shards")
    assert "1.npy must have 5 float16 values" in str(error.value)
    assert "--no-vectors" in str(error.value)
    folder = make(images, tmp_path / "shards", lenient=True)
    assert sum(read_manifest_summary(folder).samples.values()) == 18


def tar_folder(tmp_path: Path, tars, members: dict[str, list[tuple[str, bytes]]]) -> Path:
    for split, extra in members.items():
        samples = [member for member in tars.samples(3) if member[0] not in dict(extra)]
        by_key = sorted([*samples, *extra], key=lambda member: member[0].split(".")[0])
        tars.write(tmp_path / f"{split}-0.tar", by_key)
    return tmp_path


def index(folder: Path, **options: object):
    return index_shards(folder, {split: find_shards(folder, f"{split}-*.tar") for split in ("train", "val")}, **options)


def three(**changed: bytes) -> list[tuple[str, bytes]]:
    """Returns a vector member for each of three samples, some of them replaced."""
    return [(f"{n:04d}.npy", changed.get(f"k{n}", npy(vector(n)))) for n in range(3)]


def test_all_faulty_vectors_are_listed_with_the_way_out(tmp_path: Path, tars) -> None:
    bad = npy(np.zeros((1, DIM), np.float16))
    folder = tar_folder(tmp_path, tars, {"train": three(k1=bad), "val": three()[:2]})
    with pytest.raises(ValueError, match="1 with a vector that cannot be used") as error:
        index(folder)
    for part in ("train-0.tar:0001.npy must have 1 dimension", "1 without a vector (first val-0.tar:0002", "--lenient",
                 "--no-vectors ignores .npy members"):  # fmt: skip
        assert part in str(error.value)
    kept = index(folder, lenient=True)
    assert {split: manifest.samples for split, manifest in kept.items()} == {"train": 2, "val": 2}
    assert kept["val"].left_out == {"without a vector": 1}
    assert verify_shards(folder).bad == ()
    assert index(folder, vectors=False)["train"].vectors is None


def test_vectors_of_two_sizes_are_refused_within_and_between_shards(tmp_path: Path, tars) -> None:
    other = npy(vector(0, "float32"))
    folder = tar_folder(tmp_path, tars, {"train": three(k2=other), "val": three()})
    with pytest.raises(ValueError, match=r"0002\.npy must have 5 float16 values as those before it, got 5 float32"):
        index(folder)
    tar_folder(tmp_path, tars, {"val": [(name, other) for name, _ in three()], "train": three()})
    with pytest.raises(ValueError, match="vectors must have 5 float16 values, as those of the first shard, got 5 flo"):
        index(folder, lenient=True)


def copy(folder: Path, to: Path) -> Path:
    return shutil.copytree(folder, to)


def test_verify_names_changed_vectors(shards: Path, tmp_path: Path) -> None:
    folder = copy(shards, tmp_path / "shards")
    array = np.load(folder / "train-vectors.npy")
    array[1, 2] += 1
    np.save(folder / "train-vectors.npy", array)
    load_manifest(folder, "train")  # the quick check does not read it
    (bad,) = verify_shards(folder).bad
    assert bad.name == "train-vectors.npy"
    assert "changed since they were indexed" in bad.reason
    with pytest.raises(ValueError, match=r"train-vectors\.npy changed since they were indexed"):
        check_vectors(load_manifest(folder, "train"))


def test_a_missing_or_truncated_array_is_found_before_it_is_read(shards: Path, tmp_path: Path) -> None:
    folder = copy(shards, tmp_path / "shards")
    reader = load_manifest(folder, "train").vector_reader()
    reader.read(np.array([0]))
    with open(folder / "train-vectors.npy", "r+b") as file:
        file.truncate(130)
    with pytest.raises(DataChangedError, match="was truncated"):
        reader.read(np.array([0]))
    with pytest.raises(ValueError, match=r"train-vectors\.npy"):
        load_manifest(folder, "train")
    (folder / "train-vectors.npy").unlink()
    with pytest.raises(ValueError, match=r"train-vectors\.npy: no such file"):
        load_manifest(folder, "train")


@pytest.mark.parametrize(("key", "value"), [("vector_dim", 0), ("vector_dim", DIM + 1), ("vector_dtype", "float64")])
def test_a_manifest_of_other_vectors_is_refused(shards: Path, tmp_path: Path, key: str, value: object) -> None:
    folder = copy(shards, tmp_path / "shards")
    content = json.loads((folder / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps(content | {key: value}))
    with pytest.raises(ValueError, match=r"train-vectors\.npy must be"):
        load_manifest(folder, "train")
