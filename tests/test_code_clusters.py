"""Balanced clusters of codes, the loss that they give, and their place in a run and in its checkpoints."""

import pytest
import torch
from torch import Tensor

from maskgit_pl import mvtm
from maskgit_pl.losses import cluster_cross_entropy, token_cross_entropy
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.objectives import TokenLosses, _assign, balanced_clusters, check_clusters, objectives
from maskgit_pl.pipeline.pretrained import load_tokenizer
from maskgit_pl.training.checkpoint_files import newest_checkpoint
from tests.modules import masked_model
from tests.short_runs import data, fit

CONFIG = TransformerConfig(16, 3, (4, 4), embed_dim=16, depth=1, num_heads=2, mlp_dim=32)


def random_codes(count: int = 96) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(0))


def spread(codes: Tensor, clusters: Tensor) -> float:
    """The mean squared distance of a code to the mean of its cluster."""
    members = codes[clusters]
    return float((members - members.mean(1, keepdim=True)).square().sum(-1).mean())


@pytest.mark.parametrize("count", [2, 8, 32, 48])
def test_every_code_is_in_one_cluster_and_all_have_one_size(count):
    clusters = balanced_clusters(random_codes(), count, seed=3)
    assert (clusters.shape, clusters.dtype) == ((count, 96 // count), torch.int64)
    assert clusters.flatten().sort().values.tolist() == list(range(96))
    assert torch.equal(clusters, clusters.sort(1).values)
    assert torch.equal(clusters, balanced_clusters(random_codes(), count, seed=3))


def test_another_seed_starts_from_other_codes():
    assert not torch.equal(*(balanced_clusters(random_codes(), 8, seed=seed) for seed in (0, 1)))


def test_members_are_nearer_than_those_of_a_random_division():
    codes = random_codes()
    assert spread(codes, balanced_clusters(codes, 8, seed=0)) < 0.6 * spread(codes, torch.arange(96).view(8, 12))


def test_two_heaps_of_one_size_are_found():
    codes = torch.cat([random_codes(8), random_codes(8) + 50])[torch.arange(16).view(2, 8).t().flatten()]
    clusters = balanced_clusters(codes, 2, seed=0)
    assert sorted(clusters.tolist()) == [list(range(0, 16, 2)), list(range(1, 16, 2))]


def test_a_full_cluster_keeps_the_nearest_codes():
    codes = torch.tensor([0.4, 0.0, 0.3, 0.1, 0.2, 10.0])  # five near one center, which has room for three
    distances = (codes.unsqueeze(1) - torch.tensor([0.0, 10.0])).square()
    assert _assign(distances).tolist() == [1, 0, 1, 0, 0, 1]


def test_the_loss_is_the_probability_of_all_codes_of_the_cluster():
    logits = torch.randn(20, 12 + 4, generator=torch.Generator().manual_seed(1))  # 12 codes, and 4 other ids
    targets, clusters = torch.arange(20) % 12, torch.tensor([[0, 5, 7], [1, 2, 11], [3, 9, 10], [4, 6, 8]])
    found, probabilities = cluster_cross_entropy(logits, targets, clusters), logits.softmax(-1)
    for row, target in enumerate(targets.tolist()):
        (own,) = [each for each in clusters.tolist() if target in each]
        torch.testing.assert_close(found[row], -probabilities[row, own].sum().log())
    assert (found < token_cross_entropy(logits, targets)[0]).all()


def test_the_objective_adds_the_weighted_loss_of_clusters():
    losses, of_clusters = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 1.0, 2.0])
    given = TokenLosses(losses, torch.tensor([0, 0, 1]), 2, cluster_losses=of_clusters)
    objective = objectives.build({"name": "cluster_cross_entropy", "cluster_weight": 3.0})
    assert float(objective(given)) == pytest.approx(((1 + 1.5 + 2 + 3) / 2 + (4 + 6)) / 2)
    weighted = TokenLosses(losses, given.rows, 2, None, torch.tensor([1.0, 0.0, 1.0]), None, of_clusters)
    assert float(objective(weighted)) == pytest.approx((1 + 1.5 + 4 + 6) / 2)


def test_clusters_need_a_tokenizer():
    with pytest.raises(ValueError, match="tokenizer must be a pretrained folder for an objective with clusters"):
        check_clusters(4, CONFIG, tokenizer="")


def test_a_run_clusters_the_codes_of_its_tokenizer_and_a_resumed_one_keeps_them(
    tiny_shards, tiny_pretrained, tmp_path, monkeypatch
):
    def made():
        torch.manual_seed(0)
        objective = {"name": "cluster_cross_entropy", "num_clusters": 4}
        return masked_model(CONFIG, tiny_pretrained / "tokenizer", objective=objective, seed=5)

    first = made()
    fit(first, data(tiny_shards), steps=1, folder=tmp_path)
    codes = load_tokenizer(tiny_pretrained / "tokenizer").network.quantizer.lookup(torch.arange(16))
    assert torch.equal(first.code_clusters, balanced_clusters(codes, 4, seed=5))
    # Another machine may round distances in another way.
    monkeypatch.setattr(mvtm, "balanced_clusters", lambda *given, **options: first.code_clusters.flip(0))
    second = made()
    fit(second, data(tiny_shards), steps=2, folder=tmp_path, resume=newest_checkpoint(tmp_path))
    assert torch.equal(second.code_clusters, first.code_clusters)
