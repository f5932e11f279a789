import io
import struct
import tracemalloc
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from maskgit_pl.data import ShardData
from maskgit_pl.evaluation import reference as module
from maskgit_pl.evaluation.extractors import extract, iter_image_batches
from maskgit_pl.evaluation.reference import (
    Reference,
    iter_real_batches,
    obtain_references,
    open_samples,
    read_references,
)
from tests.evaluation.feature_networks import distances, few, open_shards, pictures

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)
SAVE = {"stored": np.savez, "compressed": np.savez_compressed}


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.fixture
def data(tiny_shards: Path) -> ShardData:
    return open_shards(tiny_shards)


def assert_same(one: Reference, other: Reference) -> None:
    for name in ("pooled", "spatial"):
        ours, theirs = getattr(one, name), getattr(other, name)
        assert torch.equal(ours.mean, theirs.mean)
        assert torch.equal(ours.covariance, theirs.covariance)
    assert torch.equal(one.features.pooled, other.features.pooled)
    assert torch.equal(one.features.logits, other.features.logits)


def obtain(folder: Path, data: ShardData, seed: int = 0) -> tuple[Reference, int]:
    """The reference, and how many images it took."""
    seen: list[int] = []
    extractor = few(seed=seed)
    return obtain_references(folder, data, [extractor], on_images=seen.append)[extractor.label], sum(seen)


def test_a_split_is_extracted_once_for_each_network_and_then_read(data: ShardData, tmp_path: Path) -> None:
    made, count = obtain(tmp_path / "deep", data)
    again, second = obtain(tmp_path / "deep", data)
    assert (count, second) == (24, 0)
    assert_same(made, again)
    assert made.features.spatial is None
    assert [path.name.rsplit("-", 1)[0] for path in (tmp_path / "deep").iterdir()] == ["val-classifier"]
    features = few()(next(iter_real_batches(data, "val", batch_size=24)).content)["pooled"].double()
    torch.testing.assert_close(made.features.pooled.double(), features)
    torch.testing.assert_close(made.pooled.mean, features.mean(0))
    torch.testing.assert_close(made.pooled.covariance, torch.cov(features.T))
    (file,) = (tmp_path / "deep").iterdir()
    assert obtain(tmp_path / "deep", data, seed=1)[1] == 24
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"val-classifier-\w+\.npz is damaged .*remove it, and it is made again"):
        obtain(tmp_path / "deep", data)


def images_file(path: Path, **arrays: np.ndarray) -> tuple[Path, torch.Tensor]:
    images = pictures(40, channels=3)
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **arrays)
    return path, images


def gaussian(width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.random.default_rng(seed).normal(size=(3 * width, width))
    return rows.mean(0), np.cov(rows, rowvar=False)


def test_images_of_a_file_are_a_reference_for_any_network(tmp_path: Path) -> None:
    file, images = images_file(tmp_path / "reference.npz", arr_1=np.arange(40))
    network, seen = few(channels=3), []
    found = read_references(file, [network], folder=tmp_path / "kept", on_images=seen.append)["classifier"]
    batches = iter_image_batches(lambda rows: images[rows.start : rows.stop], 40)
    assert_same(found, Reference.from_features(extract([network], batches)["classifier"]))
    assert_same(found, read_references(file, [network], folder=tmp_path / "kept", on_images=seen.append)["classifier"])
    assert sum(seen) == 40


def test_statistics_of_a_file_belong_to_inception_and_images_give_the_rest(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "_POOLED", 6)
    monkeypatch.setattr(module, "_SPATIAL", 5)
    (mu, sigma), (mu_s, sigma_s) = gaussian(6, 0), gaussian(5, 1)
    statistics = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s}
    inception = few("inception", channels=3)
    np.savez(tmp_path / "statistics.npz", **statistics)
    alone = read_references(tmp_path / "statistics.npz", [inception], folder=tmp_path)["inception"]
    assert alone.features is None
    assert np.array_equal(alone.pooled.covariance.numpy(), sigma)
    file, images = images_file(tmp_path / "both.npz", **statistics)
    both = read_references(file, [inception, few(channels=3)], folder=tmp_path)
    assert np.array_equal(both["inception"].pooled.mean.numpy(), mu)
    assert np.array_equal(both["inception"].spatial.mean.numpy(), mu_s)
    assert not np.array_equal(both["classifier"].pooled.mean.numpy(), mu)

    generated = extract([inception], [(images[:30], torch.arange(30))])["inception"]
    assert set(distances(generated, alone)) == {"fid", "sfid", "is", "is_deviation"}
    whole = distances(generated, both["inception"])
    assert {"kid", "precision", "recall"} < set(whole)
    assert {name: whole[name] for name in ("fid", "sfid")} == {
        name: value for name, value in distances(generated, alone).items() if name in ("fid", "sfid")
    }
    np.savez(tmp_path / "pooled.npz", mu=mu.astype(np.float32), sigma=sigma)
    assert "sfid" not in distances(
        generated, read_references(tmp_path / "pooled.npz", [inception], folder=tmp_path)["inception"]
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict.fromkeys(("mu", "sigma", "mu_s", "sigma_s")), "'arr_0': it is missing"),
        ({"sigma_s": None}, "'sigma_s': it is missing"),
        ({"sigma": np.zeros((6, 5))}, r"'sigma': the shape must be \(6, 6\), got \(6, 5\)"),
        ({"mu": np.arange(6)}, "'mu': the dtype must be floating, got int64"),
        ({}, "'arr_0': it is missing; the file holds mu, sigma, mu_s, sigma_s"),
    ],
)
def test_other_statistics_are_refused_by_name(tmp_path: Path, monkeypatch, change: dict, match: str) -> None:
    monkeypatch.setattr(module, "_POOLED", 6)
    monkeypatch.setattr(module, "_SPATIAL", 5)
    (mu, sigma), (mu_s, sigma_s) = gaussian(6, 0), gaussian(5, 1)
    arrays = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s} | change
    np.savez(tmp_path / "reference.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(ValueError, match=rf"reference \S+reference\.npz: array {match}"):
        read_references(tmp_path / "reference.npz", [few("inception"), few("lite0")], folder=tmp_path)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("save", SAVE)
def test_samples_are_read_in_parts(tmp_path: Path, save: str, order: str) -> None:
    SAVE[save](tmp_path / "samples.npz", np.asarray(IMAGES, order=order), np.arange(7))
    samples = open_samples(tmp_path / "samples.npz")
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
        ({"arr_0": IMAGES / 255}, "'arr_0': the dtype must be uint8, got float64"),
        ({"arr_0": IMAGES, "arr_1": np.arange(6)}, r"'arr_1': the shape must be \(7\), got \(6,\)"),
    ],
)
def test_other_arrays_are_refused_by_name(tmp_path: Path, arrays: dict, match: str) -> None:
    np.savez(tmp_path / "samples.npz", **arrays)
    with pytest.raises(ValueError, match=rf"samples \S+samples\.npz: array {match}"):
        open_samples(tmp_path / "samples.npz")
    with pytest.raises(ValueError, match=r"must be an existing \.npz file"):
        open_samples(tmp_path / "none.npz")


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
    for compression in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        yield (
            f"compression {compression}",
            npz(array_header((1, 1, 1, 3)) + bytes(3), compression=compression),
            "must be stored or deflated",
        )
    yield "many arrays", npz(*[array_header((3,)) + bytes(3)] * 101), "at most 100 entries, got 101"
    yield "name", npz(array_header((3,)) + bytes(3), name="\x1b[31m\n"), r"holds \\x1b\[31m\\n"
    yield "empty", b"", "the file cannot be read"
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
