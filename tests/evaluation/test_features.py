from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from maskgit_pl.data import Batch, ShardData, ShardDataConfig
from maskgit_pl.evaluation.features import Extractor, extract, iter_image_batches, iter_row_batches
from maskgit_pl.evaluation.reference import Reference, obtain_references
from maskgit_pl.evaluation.tokenizer import measure_reconstruction
from maskgit_pl.networks.features import Lite0Spec
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from tests.evaluation.feature_networks import Few, distances, few, pictures
from tests.forked import run_ranks

IMAGES = pictures(23)


def read(rows: range) -> torch.Tensor:
    return IMAGES[rows.start : rows.stop]


def test_features_are_those_of_each_image_in_order() -> None:
    done: list[int] = []
    found = extract([few()], iter_image_batches(read, 23, batch_size=5), on_images=done.append)["classifier"]
    output = Few()(IMAGES)
    torch.testing.assert_close(found.pooled, output.features)
    torch.testing.assert_close(found.logits, output.logits)
    torch.testing.assert_close(found.spatial, output.spatial)
    assert done == [5, 5, 5, 5, 3]
    assert len(found) == 23
    assert not found.pooled.requires_grad


def test_images_are_sorted_by_index() -> None:
    batches = list(iter_image_batches(read, 23, batch_size=5))
    one, other = (extract([few()], order)["classifier"] for order in (batches, reversed(batches)))
    assert torch.equal(one.pooled, other.pooled)


def test_several_networks_see_the_same_images_once() -> None:
    seen: list[range] = []

    def counted(rows: range) -> torch.Tensor:
        seen.append(rows)
        return read(rows)

    networks = [few("one"), few("other", seed=1, knows_classes=False)]
    found = extract(networks, iter_image_batches(counted, 23))
    assert seen == [range(23)]
    assert not torch.equal(found["one"].pooled, found["other"].pooled)
    assert found["one"].logits is not None
    assert found["other"].logits is None  # an inception score of them would mean nothing
    assert extract([], iter_image_batches(counted, 23)) == {}


def test_whole_batches_are_assigned_to_ranks_in_turn(monkeypatch) -> None:
    shares = []
    for rank in range(2):
        monkeypatch.setattr("maskgit_pl.distributed.rank_and_world", lambda rank=rank: (rank, 2))
        shares.append(list(iter_row_batches(23, batch_size=5)))
    assert shares == [[range(5), range(10, 15), range(20, 23)], [range(5, 10), range(15, 20)]]


def test_no_image_at_all_and_two_networks_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        extract([few()], [])
    with pytest.raises(ValueError, match="must have different labels"):
        extract([few(), few(seed=1)], [(IMAGES[:5], torch.arange(5))])


def test_an_extractor_is_made_from_a_spec(monkeypatch) -> None:
    monkeypatch.setattr(Lite0Spec, "create", lambda self: Few())
    made = Extractor.create(Lite0Spec())
    assert (made.label, made.knows_classes) == ("lite0", False)
    assert made.digest == Extractor.create(Lite0Spec()).digest != few(seed=1).digest


def measured(folder: Path, shards: Path) -> dict[str, Any]:
    """Returns the results of everything that several ranks do together."""
    data, network = ShardData(ShardDataConfig(str(shards), image_size=8, in_channels=1)), few()
    found = extract([network], iter_image_batches(read, 23, batch_size=5))["classifier"]
    single = extract([network], iter_image_batches(read, 3, batch_size=5))["classifier"]  # the 2nd rank has none
    reference = obtain_references(folder, data, [network])["classifier"]
    again = obtain_references(folder, data, [network])["classifier"]
    torch.manual_seed(0)
    tokenizer = SimpleNamespace(
        network=VQGAN(
            VQGANConfig(
                1, base_channels=8, channel_multipliers=(1, 1), num_res_blocks=1, num_groups=2, codebook_size=16
            )
        ),
        image_size=8,
        grid=(4, 4),
    )
    rebuilt = measure_reconstruction(
        tokenizer,
        [Batch(content, *[index] * 4, torch.ones(len(index)).bool())
         for content, index in iter_image_batches(read, 23, batch_size=5)],
        extractors=[network],
        references={"classifier": Reference.from_features(found)},
    )  # fmt: skip
    return {
        "pooled": found.pooled,
        "single": single.spatial,
        "sigma": reference.pooled.covariance,
        "again": again.pooled.covariance,
        **distances(found, reference),
        **rebuilt,
    }


def in_two_processes(rank: int, folder: str, shards: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(measured(Path(folder) / "kept", Path(shards)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_are_bit_exact_with_one(tiny_shards: Path, tmp_path: Path) -> None:
    run_ranks(in_two_processes, str(tmp_path), str(tiny_shards))
    alone = measured(tmp_path / "alone", tiny_shards)
    assert alone["codebook_usage"] > 1 / 16
    for rank in (0, 1):
        together = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert together.keys() == alone.keys()
        for name, value in alone.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(together[name])), name
    assert len(list((tmp_path / "kept").iterdir())) == 1
