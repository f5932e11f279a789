"""Vectors of images: files that are accepted and refused, and their way through shards and stores to batches."""

import io
import itertools
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from maskgit_pl.data import (
    ShardData,
    ShardDataConfig,
    StreamConfig,
    TokenizingConfig,
    describe_store,
    tokenize,
)
from maskgit_pl.data.images import decode_image, encode_png
from maskgit_pl.data.index import find_shards, index_shards
from maskgit_pl.data.manifest import (
    ShardReader,
    VectorReader,
    check_vectors,
    load_manifest,
    read_manifest_summary,
)
from maskgit_pl.data.samples import Sample, UnreadableSample
from maskgit_pl.data.sources.shards import open_source
from maskgit_pl.data.vectors import VectorKind, open_array, parse_vector
from maskgit_pl.data.verify import verify_shards
from maskgit_pl.data.writer import make_shards
from tests.data_folders import OnRank, open_data, save_data, save_samples, top_row

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


def header(shape: str) -> bytes:
    """Returns a float32 array of 4 bytes whose header states another shape."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(4)


NO_NPY = r"must be a \.npy file"
HOSTILE = {
    "pickle": (pickle.dumps([1]), NO_NPY),
    "objects": (npy(np.array([{}], dtype=object), allow_pickle=True), rf"{NO_NPY}, got Object arrays cannot be loaded"),
    "a header of 2 GiB": (HUGE_HEADER, NO_NPY),
    "a header that is code": (npy(vector(0)).replace(b"'descr'", b"exit(1)"), NO_NPY),
    "empty": (b"", NO_NPY),
    "NaN": (npy(np.array([1, np.nan, 2], np.float32)), "must have finite values"),
    "float64": (npy(np.zeros(3)), r"must hold .* float16 or float32 values, got the shape \(3,\) of <f8"),
    "two dimensions": (npy(np.zeros((1, 3), np.float32)), r"must hold 1 to 65536 .*, got the shape \(1, 3\)"),
    "too many values": (npy(np.zeros(2**16 + 1, np.float16)), r"must hold 1 to 65536 .*, got the shape \(65537,\)"),
    "40 GB of values": (header(f"({10**10},)"), NO_NPY),
    "1e3000 values": (header(f"(1{'0' * 3000},)"), NO_NPY),
    "truncated": (npy(vector(0))[:-1], rf"{NO_NPY}, got EOF: reading array data, expected 10 bytes got 9"),
    "too long": (npy(vector(0)) + b"x", r"must hold .*, got the shape \(5,\) of <f2 in 139 bytes"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_that_is_no_vector_is_refused_by_name(kind: str) -> None:
    data, message = HOSTILE[kind]
    with pytest.raises(ValueError, match=rf"vector a/1\.npy {message}"):
        parse_vector(data, name="a/1.npy")


@pytest.mark.parametrize("shape", ["(True, 1)", "(-1,)", "(1.0,)", f"({10**30},)", "(4294967296, 4294967296)"])
def test_an_array_whose_header_states_an_odd_shape_is_refused_in_one_line(tmp_path: Path, shape: str) -> None:
    (tmp_path / "a.npy").write_bytes(header(shape))
    with pytest.raises(ValueError, match=r"^\S+a\.npy: cannot be read \(.+\)$"):
        open_array(tmp_path / "a.npy")


def test_a_vector_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = write_images(tmp_path / "images", count=20) / "a" / "2.npy"
    os.truncate(path, 2**40)
    source = open_source(tmp_path / "images", val_fraction=0.3)
    samples = [sample for split, count in source.counts.items() for sample in source.samples(split, range(count))]
    faults = [sample.error for sample in samples if isinstance(sample, UnreadableSample)]
    assert faults == [f"vector {path} must have at most 266 kB, got 1.1 TB"]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_each_image_keeps_its_vector_through_make_verify_and_read(tmp_path: Path, dtype: str) -> None:
    folder = make(write_images(tmp_path / "images", count=20, dtype=dtype), tmp_path / "shards", image_size=4)
    assert read_manifest_summary(folder).vectors == VectorKind(DIM, dtype)
    assert verify_shards(folder).faults == ()
    seen = set()
    for split in ("train", "val"):
        manifest = load_manifest(folder, split)
        check_vectors(manifest)
        reader, vectors = ShardReader(manifest), VectorReader(manifest)
        for index in range(len(reader)):
            number = int(decode_image(reader.read(index), channels=1, name="")[0, 0, 0])
            (read,) = vectors.read(np.array([index]))
            assert read.dtype == np.float32
            assert np.array_equal(read, vector(number, dtype).astype(np.float32))
            seen.add(number)
    assert seen == set(range(20))


def test_data_without_vectors_have_the_fingerprint_of_plain_images(tmp_path: Path) -> None:
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
    for part in ("train-0.tar:0001.npy must hold 1 to 65536", "1 without a vector (first val-0.tar:0002", "--lenient",
                 "--no-vectors ignores .npy members"):  # fmt: skip
        assert part in str(error.value)
    kept = index(folder, lenient=True)
    assert {split: manifest.samples for split, manifest in kept.items()} == {"train": 2, "val": 2}
    assert kept["val"].left_out == {"without a vector": 1}
    assert verify_shards(folder).faults == ()
    assert index(folder, vectors=False)["train"].vectors is None


NUM_TRAIN, NUM_VAL = 23, 11


def image(number: int) -> torch.Tensor:
    """Returns (1, 4, 4) uint8, whose first pixel is the number."""
    return (number + torch.arange(16).reshape(1, 4, 4)).to(torch.uint8)


def sample(number: int) -> Sample:
    return Sample(encode_png(image(number)), "png", number % 3, f"{number}", npy(vector(number)))


def samples_with_damage(count: int, damaged: int) -> list[Sample]:
    """Returns samples, one of which has a whole header and damaged pixels."""
    samples = [sample(number) for number in range(count)]
    samples[damaged] = samples[damaged]._replace(data=samples[damaged].data[:-20] + bytes(20))
    return samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": map(sample, range(NUM_TRAIN)), "val": map(sample, range(100, 100 + NUM_VAL))}
    return save_samples(tmp_path_factory.mktemp("data"), splits)


def make_store(folder: Path, store: Path, **options: float) -> bool:
    description = describe_store(folder, grid=(2, 2), codebook_size=256, tokenizer="me", image_size=4)
    config = TokenizingConfig(**{"batch_size": 4, "part_size": 6, **options})
    return tokenize(folder, store, description, encode=top_row, in_channels=1, config=config)


def read_steps(folder: Path, first: int, *, world_size: int = 1, **options: object) -> dict[int, tuple]:
    """Maps each position from a step to step 8 to all that a batch has of it, read by a run that begins there."""
    samples = {}
    starts = [first, *range(first // 2 * 2 + 2, 8, 2)]  # an epoch has 2 steps
    for rank, step in itertools.product(range(world_size), starts):
        sizes = {"global_batch": 12, "max_batch_per_device": 2, "unreadable_budget": 0.5}
        module = open_data(folder, vectors=True, **sizes, **options)
        module.trainer = OnRank(rank, world_size, step)
        for batch in module.train_dataloader():
            *columns, vectors, _ = batch
            for row, position in enumerate(batch.position.tolist()):
                samples[position] = tuple(column[row].numpy().tobytes() for column in (*columns, vectors))
    return samples


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data in shards of 9, 9 and 6 samples, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("uneven")
    save_samples(folder, dict.fromkeys(("train", "val"), samples_with_damage(24, 7)))
    make_store(folder, folder / "store", unreadable_budget=0.5)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 1), (3, 2)])
@pytest.mark.parametrize("source", ["images", "tokens"])
def test_a_resumed_run_reads_the_same_on_any_number_of_ranks_and_workers(uneven, source, world_size, num_workers):
    options = {"images": {"augmentations": ["random_resized_crop", "flip"]}, "tokens": {}}[source]
    options |= {"source": source, "token_store": str(uneven / "store"), "seed": 3}
    whole = read_steps(uneven, 0, **options)
    resumed = read_steps(uneven, 5, world_size=world_size, num_workers=num_workers, **options)
    assert resumed == {position: whole[position] for position in range(5 * 12, 8 * 12)}


@pytest.mark.parametrize("source", ["images", "tokens"])
def test_an_unreadable_image_is_replaced_together_with_its_vector(tmp_path: Path, source: str) -> None:
    folder, store = tmp_path / "data", tmp_path / "store"
    folder.mkdir()
    save_samples(folder, dict.fromkeys(("train", "val"), samples_with_damage(4, 2)))
    make_store(folder, store, unreadable_budget=0.5)
    options = {"validation_batch": 4, "unreadable_budget": 0.5, "source": source, "token_store": str(store)}
    (batch,) = open_data(folder, vectors=True, **options).val_dataloader()
    assert batch.replacement.tolist() == [-1, -1, 3, -1]
    assert batch.vectors[:, 0].tolist() == [0, 1, 3, 3]


def test_vectors_are_refused_by_name_where_there_are_none(folder, tmp_path: Path) -> None:
    plain = save_data(tmp_path, {split: [(encode_png(image(0)), 0)] * 2 for split in ("train", "val")})
    with pytest.raises(ValueError, match=r"must have a vector for each image, for data\.vectors: true"):
        open_data(plain, vectors=True)
    assert open_data(folder).vector_dim == 0
    assert open_data(folder, vectors=True).vector_dim == DIM
    with pytest.raises(ValueError, match=r"data\.vectors be false for data\.source: stream"):
        ShardDataConfig(str(folder), source="stream", stream=StreamConfig("x.tar", 1), vectors=True)


@pytest.mark.parametrize("is_set_up", [False, True])
def test_a_changed_array_is_refused_where_an_evaluation_reads_it(folder, tmp_path, is_set_up) -> None:
    changed = shutil.copytree(folder, tmp_path / "data")
    np.save(changed / "val-vectors.npy", np.load(changed / "val-vectors.npy") + 1)
    config = ShardDataConfig(str(changed), image_size=4, in_channels=1, global_batch=8)
    module, reading = ShardData(config), ShardData(replace(config, vectors=True))
    if is_set_up:
        module.setup()  # without vectors, which a run may leave aside
    for read in (lambda: module.vector_pool("val"), reading.setup, reading.val_dataloader):
        with pytest.raises(ValueError, match=r"val-vectors\.npy changed since it was made"):
            read()
