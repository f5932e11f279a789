import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from maskgit_pl.data import ShardData, ShardDataConfig
from maskgit_pl.evaluation import reference as module
from maskgit_pl.evaluation.features import extract, iter_image_batches
from maskgit_pl.evaluation.reference import (
    Reference,
    Statistics,
    iter_real_batches,
    obtain_references,
    read_references,
)
from tests.evaluation.feature_networks import distances, few, pictures
from tests.evaluation.test_npz import Canary


@pytest.fixture
def data(tiny_shards: Path) -> ShardData:
    return ShardData(ShardDataConfig(str(tiny_shards), image_size=8, in_channels=1))


def assert_same(one: Reference, other: Reference) -> None:
    assert one.label == other.label
    for name in ("pooled", "spatial"):
        ours, theirs = getattr(one, name), getattr(other, name)
        assert torch.equal(ours.mean, theirs.mean)
        assert torch.equal(ours.covariance, theirs.covariance)
    assert torch.equal(one.features.pooled, other.features.pooled)
    assert torch.equal(one.features.logits, other.features.logits)


def obtain(folder: Path, data: ShardData, seed: int = 0, **options) -> tuple[Reference, int]:
    """The reference, and how many images it took."""
    seen: list[int] = []
    extractor = few(seed=seed)
    return obtain_references(folder, data, [extractor], on_images=seen.append, **options)[extractor.label], sum(seen)


def test_statistics_are_mean_and_unbiased_covariance() -> None:
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 100
    found = Statistics.from_features(features)
    torch.testing.assert_close(found.mean, features.double().mean(0))
    torch.testing.assert_close(found.covariance, torch.cov(features.double().T))
    with pytest.raises(ValueError, match=r"must be \(n, D\) with n >= 2"):
        Statistics.from_features(features[:1])


def test_a_split_is_extracted_once_and_then_read(data: ShardData, tmp_path: Path) -> None:
    made, count = obtain(tmp_path / "deep", data)
    again, second = obtain(tmp_path / "deep", data)
    assert (count, second) == (24, 0)
    assert_same(made, again)
    assert made.features.spatial is None
    assert [path.name.rsplit("-", 1)[0] for path in (tmp_path / "deep").iterdir()] == ["val-classifier"]
    batch = next(iter_real_batches(data, "val"))
    torch.testing.assert_close(made.features.pooled, few()(batch.content).features)


def test_other_weights_and_splits_are_kept_apart(data: ShardData, tmp_path: Path) -> None:
    obtain(tmp_path, data)
    assert obtain(tmp_path, data, seed=1)[1] == 24
    assert obtain(tmp_path, data, split="train")[1] == 60
    assert len(list(tmp_path.iterdir())) == 3
    assert obtain(tmp_path, data)[1] == 0


def test_networks_that_are_missing_share_one_pass(data: ShardData, tmp_path: Path) -> None:
    obtain(tmp_path, data)
    seen: list[int] = []
    networks = [few(), few("timm:a/b", seed=1), few("lite0", seed=2, knows_classes=False)]
    found = obtain_references(tmp_path, data, networks, on_images=seen.append)
    assert sum(seen) == 24
    assert list(found) == ["classifier", "timm:a/b", "lite0"]
    assert found["lite0"].features.logits is None
    assert obtain_references(tmp_path, data, networks, on_images=seen.append)["lite0"].features.logits is None
    assert sum(seen) == 24


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "objects"])
def test_a_damaged_file_is_computed_again(
    data: ShardData, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    made, _ = obtain(tmp_path, data)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    with np.load(file) as arrays:
        kept = dict(arrays)
    if damage == "cut":
        file.write_bytes(content[:-100])
    elif damage == "flipped":
        content[content.index(kept["sigma"].tobytes()) + 20] ^= 1
        file.write_bytes(content)
    elif damage == "text":
        file.write_text("nonsense")
    else:
        np.savez(file, **{**kept, "sigma": np.array([Canary(tmp_path / "canary")], dtype=object)})
    with caplog.at_level(logging.WARNING, logger="maskgit_pl"):
        again, count = obtain(tmp_path, data)
    assert count == 24
    assert_same(made, again)
    assert f"{file}" in caplog.text
    assert "it will be computed again" in caplog.text
    assert not (tmp_path / "canary").exists()
    assert obtain(tmp_path, data)[1] == 0


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
    alone = read_references(tmp_path / "statistics.npz", [inception])["inception"]
    assert alone.features is None
    assert np.array_equal(alone.pooled.covariance.numpy(), sigma)
    file, images = images_file(tmp_path / "both.npz", **statistics)
    both = read_references(file, [inception, few(channels=3)])
    assert np.array_equal(both["inception"].pooled.mean.numpy(), mu)
    assert np.array_equal(both["inception"].spatial.mean.numpy(), mu_s)
    assert not np.array_equal(both["classifier"].pooled.mean.numpy(), mu)

    generated = extract([inception], [(images[:30], torch.arange(30))])["inception"]
    assert set(distances(generated, alone)) == {"fid", "sfid", "is", "is_deviation"}
    whole = distances(generated, both["inception"])
    assert {"kid", "precision", "recall", "density", "coverage"} < set(whole)
    assert {name: whole[name] for name in ("fid", "sfid")} == {
        name: value for name, value in distances(generated, alone).items() if name in ("fid", "sfid")
    }
    np.savez(tmp_path / "pooled.npz", mu=mu.astype(np.float32), sigma=sigma)
    assert "sfid" not in distances(generated, read_references(tmp_path / "pooled.npz", [inception])["inception"])


def test_a_file_without_images_is_only_for_inception(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "_POOLED", 6)
    mu, sigma = gaussian(6, 0)
    np.savez(tmp_path / "reference.npz", mu=mu, sigma=sigma)
    with pytest.raises(
        ValueError, match=r"'arr_0': the file must have images for the network 'lite0', got only Inception's statistics"
    ):
        read_references(tmp_path / "reference.npz", [few("inception"), few("lite0")])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sigma": None}, "'sigma': it is missing"),
        ({"mu": None}, "'mu': it is missing"),
        (
            {"mu": None, "sigma": None, "mu_s": None, "sigma_s": None},
            "'mu': the file must have statistics .* or images .* got neither",
        ),
        ({"sigma_s": None}, "'sigma_s': it is missing"),
        ({"mu": np.zeros(7)}, r"'mu': the shape must be \(6\), got \(7,\)"),
        ({"sigma": np.zeros((6, 5))}, r"'sigma': the shape must be \(6, 6\), got \(6, 5\)"),
        ({"mu": np.arange(6)}, "'mu': the dtype must be float, got int64"),
        ({"sigma": np.arange(36.0).reshape(6, 6)}, "'sigma': it must be a covariance"),
        ({"sigma": -np.eye(6)}, "'sigma': it must be a covariance"),
        ({"mu": np.full(6, np.inf)}, "'mu': all values must be finite"),
    ],
)
def test_other_statistics_are_refused_by_name(tmp_path: Path, monkeypatch, change: dict, match: str) -> None:
    monkeypatch.setattr(module, "_POOLED", 6)
    monkeypatch.setattr(module, "_SPATIAL", 5)
    (mu, sigma), (mu_s, sigma_s) = gaussian(6, 0), gaussian(5, 1)
    arrays = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s} | change
    np.savez(tmp_path / "reference.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(ValueError, match=rf"reference \S+reference\.npz: array {match}"):
        read_references(tmp_path / "reference.npz", [few("inception")])


def test_objects_among_statistics_are_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "reference.npz", mu=np.array([Canary(tmp_path / "canary")] * 2048, dtype=object))
    with pytest.raises(ValueError, match="array 'mu': the dtype must be float, got object"):
        read_references(tmp_path / "reference.npz", [few("inception")])
    assert not (tmp_path / "canary").exists()
