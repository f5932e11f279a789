"""Objectives by name: the bound is unbiased, weights mean what they say, and the default is the plain loss.

Balanced clusters of codes, the loss that they give, and their place in a run and in its checkpoints.

Corruption of visible tokens: which are replaced, by what, and that the masks stay as they are.
"""

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from maskgit_pl import mvtm
from maskgit_pl.losses import cluster_cross_entropy, masked_cross_entropy, token_cross_entropy
from maskgit_pl.masking import MaskSampler, mask_ratios
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.objectives import (
    Corruption,
    Objective,
    TokenLosses,
    _assign,
    balanced_clusters,
    check_clusters,
    corruptions,
    objectives,
)
from maskgit_pl.pipeline.pretrained import load_tokenizer
from maskgit_pl.schedules import mask_schedules
from maskgit_pl.training.checkpoints import newest_checkpoint
from tests.modules import masked_model
from tests.short_runs import data, fit

N, K = 4, 3
SAMPLES = 1 << 13
JOINT = torch.randn(K**N, generator=torch.Generator().manual_seed(1)).mul(1.5).log_softmax(0).view([K] * N)
IMAGE = torch.tensor([2, 0, 1, 1])


def nll_of(mask: Tensor, position: int) -> float:
    """-log p(token at a position | visible tokens) of the joint distribution."""
    visible = tuple(slice(None) if mask[i] else int(IMAGE[i]) for i in range(N))
    rest = JOINT[visible].movedim(int(mask[:position].sum()), 0).reshape(K, -1).logsumexp(1)
    return -float(rest.log_softmax(0)[IMAGE[position]])


def table() -> Tensor:
    """The NLLs of each of the 2^N masks at each position, (2^N, N)."""
    masks = [torch.tensor([number >> i & 1 for i in range(N)]).bool() for number in range(2**N)]
    return torch.tensor([[nll_of(mask, i) if mask[i] else 0.0 for i in range(N)] for mask in masks])


TABLE = table()


def brute_force() -> float:
    """The order-agnostic bound divided by N: over counts, over masks of that count, over masked tokens."""
    total = 0.0
    for count in range(1, N + 1):
        chosen = list(combinations(range(N), count))
        total += sum(float(TABLE[sum(1 << i for i in each)].sum()) / count for each in chosen) / len(chosen) / N
    return total


def estimate(schedule: object, ratio: object = "schedule", objective: object = "elbo") -> float:
    """The objective over many images, all of them IMAGE, with the NLLs of the table."""
    sampler = MaskSampler(mask_schedules.build(schedule), 3, mask_ratio=mask_ratios.build(ratio))
    slot = torch.arange(SAMPLES)
    place = {"index": slot, "epoch": torch.zeros_like(slot), "position": slot, "global_batch": 64}
    mask = sampler.mask(N, **place)
    losses = TABLE[(mask * 2 ** torch.arange(N)).sum(1)][mask]
    slopes = sampler.slope(N, **place)
    return float(objectives.build(objective)(TokenLosses(losses, mask.nonzero()[:, 0], SAMPLES, slopes=slopes)))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "square", "cubic", "log", {"name": "pow", "exponent": 1.5}])
def test_the_elbo_is_the_brute_force_bound_for_every_schedule(schedule):
    assert estimate(schedule) == pytest.approx(brute_force(), rel=0.02)
    assert estimate(schedule) == pytest.approx(estimate("linear", objective="masked_cross_entropy"), rel=0.02)


@pytest.mark.parametrize("ratio", ["uniform", {"name": "beta", "a": 1.5, "b": 1.0}])
def test_the_elbo_is_the_brute_force_bound_for_every_distribution_of_ratios(ratio):
    assert estimate("cosine", ratio) == pytest.approx(brute_force(), rel=0.02)


def test_the_bound_of_a_joint_distribution_is_its_negative_log_likelihood():
    exact = -float(JOINT[tuple(IMAGE.tolist())]) / N
    assert brute_force() == pytest.approx(exact, rel=1e-5)
    assert estimate("cosine") == pytest.approx(exact, rel=0.02)


def test_without_the_weight_the_schedule_changes_the_value():
    plain = estimate("cubic", objective="masked_cross_entropy")
    assert abs(plain - brute_force()) > 0.05 * brute_force()


def test_the_largest_weight_is_a_bound():
    given = TokenLosses(torch.ones(4), torch.tensor([0, 0, 1, 1]), 2, slopes=torch.tensor([1.0, math.inf]))
    assert float(objectives.build({"name": "elbo", "max_weight": 5})(given)) == pytest.approx((1 + 5) / 2)


def loss_of_half_masked_images(name: str, *, visible_weight: float) -> tuple[float, Tensor]:
    """The loss of three images of four tokens, of which the first and the last are masked, and their losses (3, 4)."""
    losses = torch.rand(12, generator=torch.Generator().manual_seed(0))
    is_masked = torch.tensor([1, 0, 0, 1] * 3).bool()
    given = TokenLosses(losses, torch.arange(12) // 4, 3, is_masked, ~is_masked, torch.ones(3))
    return float(objectives.build({"name": name, "visible_weight": visible_weight})(given)), losses.view(3, 4)


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_visible_weight_is_the_weight_of_a_mean(weight):
    found, losses = loss_of_half_masked_images("masked_cross_entropy", visible_weight=weight)
    expected = losses @ torch.tensor([1, weight, weight, 1]) / (2 + 2 * weight)
    assert found == pytest.approx(float(expected.mean()))


def test_visible_tokens_are_added_to_the_bound():
    found, losses = loss_of_half_masked_images("elbo", visible_weight=0.25)
    expected = losses[:, [0, 3]].mean(1) + 0.25 * losses[:, [1, 2]].mean(1)
    assert found == pytest.approx(float(expected.mean()))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_default_is_masked_cross_entropy_to_the_last_bit(smoothing):
    chance = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(50, 9, generator=chance), torch.randint(9, (50,), generator=chance)
    rows = torch.randint(6, (50,), generator=chance).sort().values
    expected, nll = masked_cross_entropy(logits, targets, rows, num_rows=6, label_smoothing=smoothing)
    losses, plain = token_cross_entropy(logits, targets, label_smoothing=smoothing)
    assert torch.equal(objectives.build("masked_cross_entropy")(TokenLosses(losses, rows, 6)), expected)
    assert torch.equal(plain, nll)


@pytest.mark.parametrize("name", objectives.names())
def test_objectives_say_where_they_come_from_and_have_gradients(name):
    assert "Source:" in (type(objectives.build(name)).__doc__ or "")
    losses = torch.ones(4, requires_grad=True)
    given = TokenLosses(losses, torch.tensor([0, 0, 1, 1]), 2, None, None, torch.ones(2), torch.zeros(4))
    objectives.build(name)(given).backward()
    assert losses.grad is not None
    torch.testing.assert_close(losses.grad, torch.full((4,), 0.25))


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("cross_entropy", "unknown objective 'cross_entropy': did you mean 'masked_cross_entropy'"),
        ({"name": "elbo", "max_weight": 0.5}, r"max_weight must be a number in \[1, 1000000\], got 0.5"),
        ({"name": "masked_cross_entropy", "visible_weight": -1}, "visible_weight must be a number"),
        ({"name": "masked_cross_entropy", "visible": 1}, "did you mean 'visible_weight'"),
    ],
)
def test_wrong_objectives_are_refused_by_name(spec, text):
    with pytest.raises(ValueError, match=text):
        objectives.build(spec)


def test_an_objective_that_returns_no_scalar_is_refused(monkeypatch):
    class Broken(Objective):
        def __call__(self, tokens):
            return tokens.losses

    monkeypatch.setitem(objectives._factories, "broken", Broken)
    with pytest.raises(ValueError, match="objective 'broken': the loss must be a finite scalar tensor"):
        objectives.build("broken")


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
    visible = torch.tensor([False, True, False])
    weighted = TokenLosses(losses, given.rows, 2, ~visible, visible, None, of_clusters)
    objective = replace(objective, visible_weight=0.5)
    assert float(objective(weighted)) == pytest.approx(((1 + 1.5 + 0.5 * (2 + 3)) / 1.5 + (4 + 6)) / 2)


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


B, NUM_TOKENS, CODEBOOK_SIZE = 400, 16, 8
TOKENS = torch.randint(CODEBOOK_SIZE, (B, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
MASK = torch.rand(B, NUM_TOKENS, generator=torch.Generator().manual_seed(1)) < 0.4
every_corruption = pytest.mark.parametrize("name", corruptions.names())


def seven(replaced: Tensor) -> Tensor:
    """Logits of a network that is sure of code 7, with a little of code 2."""
    return torch.tensor([0.0, 0, 5, 0, 0, 0, 0, 7]).expand(int(replaced.sum()), CODEBOOK_SIZE)


def corrupt(name: str, *, rows: slice = slice(None), seed: int = 3, epoch: int = 0, fraction: float = 0.25):
    index, corruption = torch.arange(B)[rows], corruptions.build({"name": name, "fraction": fraction})
    replaced, uniform = corruption.draw(MASK[rows], seed=seed, index=index, epoch=torch.full_like(index, epoch))
    return corruption.corrupt(TOKENS[rows], replaced, uniform, codebook_size=CODEBOOK_SIZE, predict=seven), replaced


@every_corruption
def test_a_fraction_of_the_visible_tokens_is_replaced_and_nothing_else(name):
    seen, replaced = corrupt(name)
    assert not (replaced & MASK).any()
    assert torch.equal(seen[~replaced], TOKENS[~replaced])
    assert float(replaced[~MASK].float().mean()) == pytest.approx(0.25, abs=0.03)
    assert 0 <= seen.min() <= seen.max() < CODEBOOK_SIZE
    assert replaced.any(0).all()


@every_corruption
def test_it_depends_on_sample_seed_and_epoch_only(name):
    seen, replaced = corrupt(name)
    for mine, whole in zip(corrupt(name, rows=slice(100, 120)), (seen, replaced), strict=True):
        assert torch.equal(mine, whole[100:120])
    assert not torch.equal(corrupt(name, seed=4)[1], replaced)
    assert not torch.equal(corrupt(name, epoch=1)[1], replaced)


def test_uniform_codes_are_uniform():
    seen, replaced = corrupt("uniform", fraction=0.9)
    share = torch.bincount(seen[replaced], minlength=CODEBOOK_SIZE) / replaced.sum()
    assert (share - 1 / CODEBOOK_SIZE).abs().max() < 0.03


def test_codes_of_the_model_are_drawn_from_its_distribution():
    seen, replaced = corrupt("model", fraction=0.9)
    share = torch.bincount(seen[replaced], minlength=CODEBOOK_SIZE) / replaced.sum()
    torch.testing.assert_close(share, seven(torch.ones(1).bool())[0].softmax(0), atol=0.02, rtol=0)


@every_corruption
def test_corruptions_say_where_they_come_from(name):
    assert "Source:" in (type(corruptions.build(name)).__doc__ or "")


@pytest.mark.parametrize("fraction", [0, 1, -0.1, "half"])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match=r"fraction.* must be a"):
        corruptions.build({"name": "uniform", "fraction": fraction})


@pytest.mark.parametrize(
    ("codes", "rule"),
    [
        (torch.tensor([0, 1, 3]), r"the codes must lie in \[0, K\), got \[0, 1, 3\] for K = 3"),
        (torch.zeros(2, 2).long(), r"must be an int64 tensor \(R,\)"),
        (None, r"must be an int64 tensor \(R,\), got None"),
    ],
)
def test_a_broken_corruption_is_refused_by_name(monkeypatch, codes, rule):
    class Broken(Corruption):
        fraction = 0.1

        def codes(self, tokens, replaced, uniform, *, codebook_size, predict):
            return codes

    monkeypatch.setitem(corruptions._factories, "broken", Broken)
    with pytest.raises(ValueError, match=f"corruption 'broken': .*{rule}"):
        corruptions.build("broken")
