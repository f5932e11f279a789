from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from maskgit_pl.evaluation.features import extract, iter_image_batches
from maskgit_pl.evaluation.reference import obtain_references
from tests.evaluation.feature_networks import Few, distances, few, open_shards, pictures
from tests.forked import run_ranks

IMAGES = pictures(23)


def read(rows: range) -> torch.Tensor:
    return IMAGES[rows.start : rows.stop]


def test_networks_see_each_image_once_and_features_are_sorted_by_index() -> None:
    counts: list[int] = []
    networks = [few("first"), few("second", seed=1, knows_classes=False)]
    batches = reversed(list(iter_image_batches(read, 23)))
    features = extract(networks, batches, on_images=counts.append)
    output = Few()(IMAGES)
    for name in ("pooled", "logits", "spatial"):
        expected = output.features if name == "pooled" else getattr(output, name)
        torch.testing.assert_close(getattr(features["first"], name), expected)
    assert counts == [7, 16]
    assert not features["first"].pooled.requires_grad
    assert not torch.equal(features["first"].pooled, features["second"].pooled)
    assert features["second"].logits is None  # an inception score of them would mean nothing


def measured(folder: Path, shards: Path) -> dict[str, Any]:
    """Returns what several ranks compute together, one of them without an image of ``single``."""
    data, network = open_shards(shards), few()
    features = extract([network], iter_image_batches(read, 23))["classifier"]
    single = extract([network], iter_image_batches(read, 3))["classifier"]
    reference = obtain_references(folder, data, [network])["classifier"]
    again = obtain_references(folder, data, [network])["classifier"]
    parts = {"pooled": features.pooled, "single": single.spatial, "again": again.pooled.covariance}
    return {**parts, "sigma": reference.pooled.covariance, **distances(features, reference)}


def in_two_processes(rank: int, folder: str, shards: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(measured(Path(folder) / "kept", Path(shards)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_are_bit_exact_with_one(tiny_shards: Path, tmp_path: Path) -> None:
    run_ranks(in_two_processes, str(tmp_path), str(tiny_shards))
    alone = measured(tmp_path / "alone", tiny_shards)
    for rank in (0, 1):
        together = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert together.keys() == alone.keys()
        for name, value in alone.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(together[name])), name
    assert len(list((tmp_path / "kept").iterdir())) == 1
