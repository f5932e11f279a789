"""Quantizers with a codebook that learns by gradient or as averages follow their formulas, on one process as on two."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange

from maskgit_pl.networks.codebooks import EMAQuantizerSpec, GradientQuantizerSpec
from maskgit_pl.networks.quantizers import entropy_loss, quantizers


def features(batch=4, width=6, seed=0):
    return torch.randn(batch, width, 3, 5, generator=torch.Generator().manual_seed(seed))


def rows_of(part):
    return rearrange(part, "b d h w -> (b h w) d")


@pytest.fixture(params=["gradient", "ema"])
def quantizer(request):
    torch.manual_seed(0)
    return quantizers.build(request.param).create(codebook_size=8, code_dim=6)


def test_the_lowest_of_equally_near_codes_wins():
    quantizer = GradientQuantizerSpec().create(codebook_size=4, code_dim=2)
    quantizer.codebook.data.zero_()
    assert quantizer.nearest(torch.randn(2, 2, 3, 3)).max() == 0


def test_distances_keep_float32_under_autocast():
    quantizer = GradientQuantizerSpec().create(codebook_size=8, code_dim=6)
    plain = quantizer.distances(rows_of(features()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.distances(rows_of(features())), plain)


def test_the_gradient_quantizers_loss_is_its_three_parts():
    spec = GradientQuantizerSpec(commitment=0.5, codebook_weight=2.0, entropy_weight=0.3, entropy_temperature=0.7)
    quantizer = spec.create(codebook_size=8, code_dim=6)
    rows = rows_of(features())
    distances = torch.cdist(rows, quantizer.codebook).square()
    error = F.mse_loss(quantizer.codebook[distances.argmin(1)], rows)
    probabilities = (-distances / 0.7).softmax(-1)
    mean = probabilities.mean(0)
    entropy = (mean * (mean + 1e-5).log()).sum() - (probabilities * probabilities.log()).sum(-1).mean()
    torch.testing.assert_close(quantizer(features()).loss, 2.5 * error + 0.3 * entropy)


def test_codes_start_uniform_within_the_released_bound():
    codebook = GradientQuantizerSpec().create(codebook_size=1024, code_dim=64).codebook
    assert 0.053 < codebook.abs().max().item() <= (3 / 1024) ** 0.5
    assert codebook.std().item() == pytest.approx(1024**-0.5, rel=0.02)


def test_the_ema_codebook_follows_the_direct_formula():
    torch.manual_seed(0)
    quantizer = EMAQuantizerSpec(decay=0.8, restart_below=0.0).create(codebook_size=4, code_dim=6)
    counts, sums = torch.full((4,), 5.0), torch.randn(4, 6)
    quantizer.counts.copy_(counts)
    quantizer.sums.copy_(sums)
    for step in range(3):
        output = quantizer(features(seed=step))
        rows = rows_of(features(seed=step))
        one_hot = F.one_hot(output.tokens.flatten(), 4).float()
        counts, sums = 0.8 * counts + 0.2 * one_hot.sum(0), 0.8 * sums + 0.2 * one_hot.t() @ rows
        quantizer.update([output.tokens], [output.features], seed=0, step=step)
        torch.testing.assert_close(quantizer.codebook, sums / counts.unsqueeze(1))


def test_dead_codes_restart_from_outputs_of_the_batch():
    quantizer = EMAQuantizerSpec().create(codebook_size=8, code_dim=6)
    quantizer.codebook.fill_(100.0)
    quantizer.codebook[0] = 0.0  # everything goes to code 0
    quantizer.counts.copy_(torch.tensor([60.0] + [0.0] * 7))
    output = quantizer(features())
    quantizer.update([output.tokens], [output.features], seed=3, step=7)
    distances = (quantizer.codebook[1:].unsqueeze(1) - rows_of(features())).norm(dim=2)
    assert distances.min(1).values.max() < 1e-4
    assert len(quantizer.codebook[1:].unique(dim=0)) == 7
    assert len(quantizer.nearest(features()).unique()) > 4


@pytest.mark.slow
@pytest.mark.parametrize("restart_below", [0.0, 1e-45, 1e-8, 0.05])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("mean", [0.3, 1e4])
def test_codes_that_are_never_used_stay_means_of_features(mean, decay, restart_below):
    torch.manual_seed(0)
    quantizer = EMAQuantizerSpec(decay=decay, restart_below=restart_below).create(codebook_size=32, code_dim=2)
    for step in range(180):
        part = mean * (1 + 0.01 * features(batch=1, width=2, seed=step)[..., :1].tanh())  # 3 features for 32 codes
        output = quantizer(part)
        quantizer.update([output.tokens], [output.features], seed=0, step=step)
        assert 0.98 * mean < quantizer.codebook.min() <= quantizer.codebook.max() < 1.02 * mean, step


def test_a_restarted_code_that_wins_features_stays_and_follows_them():
    torch.manual_seed(0)
    quantizer = EMAQuantizerSpec(decay=0.8, restart_below=0.3).create(codebook_size=8, code_dim=6)
    output = quantizer(features())
    quantizer.update([output.tokens], [output.features], seed=0, step=0)  # all codes are new
    restarted, fresh = quantizer.codebook.clone(), 2 * 0.3 * 60 / 8
    output = quantizer(features())
    one_hot = F.one_hot(output.tokens.flatten(), 8).float()
    counts = 0.8 * fresh + 0.2 * one_hot.sum(0)
    follows = (0.8 * fresh * restarted + 0.2 * one_hot.t() @ rows_of(features())) / counts.unsqueeze(1)
    quantizer.update([output.tokens], [output.features], seed=0, step=1)
    torch.testing.assert_close(quantizer.codebook, follows)
    torch.testing.assert_close(quantizer.counts, counts)


def test_a_restarted_code_that_wins_nothing_is_restarted_again():
    quantizer = EMAQuantizerSpec(decay=0.4, restart_below=0.3).create(codebook_size=2, code_dim=6)
    quantizer.counts.copy_(torch.tensor([60.0, 0.0]))
    quantizer.codebook[1] = 100.0
    output = quantizer(features())
    seen = set()
    for step in range(4):
        quantizer.update([torch.zeros_like(output.tokens)], [output.features], seed=0, step=step)
        seen.add(tuple(quantizer.codebook[1].tolist()))
    assert len(seen) == 4


def test_restarts_depend_on_seed_and_step_and_not_on_torchs_generator():
    def codebook(seed, step, torch_seed):
        torch.manual_seed(1)
        quantizer = EMAQuantizerSpec().create(codebook_size=8, code_dim=6)
        torch.manual_seed(torch_seed)
        output = quantizer(features())
        quantizer.update([output.tokens], [output.features], seed=seed, step=step)
        return quantizer.codebook

    assert torch.equal(codebook(0, 0, 0), codebook(0, 0, 1))
    assert not torch.equal(codebook(0, 0, 0), codebook(1, 0, 0))
    assert not torch.equal(codebook(0, 0, 0), codebook(0, 1, 0))


@pytest.mark.parametrize("kind", ["softmax", "argmax"])
def test_the_entropy_loss_is_lowest_when_sure_and_even(kind):
    sure_and_even = entropy_loss(50 * torch.eye(8), temperature=1.0, kind=kind)
    sure_and_collapsed = entropy_loss(50 * torch.eye(8)[:1].expand(8, 8), temperature=1.0, kind=kind)
    assert sure_and_even.item() == pytest.approx(-torch.tensor(8.0).log().item(), abs=1e-3)
    assert sure_and_collapsed.item() == pytest.approx(0.0, abs=1e-3)


def test_the_gradient_of_one_hot_assignments_is_that_of_the_soft_ones():
    affinity = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    entropy_loss(affinity, temperature=0.7, kind="argmax").backward()
    flat = affinity.detach() / 0.7
    soft, log_soft, hard = flat.softmax(-1), flat.log_softmax(-1), F.one_hot(flat.argmax(-1), 5).float()
    mean = hard.mean(0)
    to_assignment = ((mean + 1e-5).log() + mean / (mean + 1e-5) - log_soft) / 6
    by_assignment = soft * (to_assignment - (soft * to_assignment).sum(-1, keepdim=True))
    by_logarithm = (soft - hard) / 6
    torch.testing.assert_close(affinity.grad, (by_assignment + by_logarithm) / 0.7)


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "ema", "decay": 1.0},
        {"name": "ema", "restart_below": -0.1},
        {"name": "gradient", "commitment": -1.0},
        {"name": "gradient", "entropy_temperature": 0.0},
        {"name": "gradient", "entropy_kind": "hard"},
    ],
)
def test_a_number_out_of_range_is_refused_by_name(spec):
    (key,) = spec.keys() - {"name"}
    with pytest.raises(ValueError, match=key):
        quantizers.build(spec)


def entropy_gradient(inputs):
    inputs = inputs.clone().requires_grad_()
    entropy_loss(rows_of(inputs), temperature=0.5).backward()
    return inputs.grad


def ema_codebook(parts):
    torch.manual_seed(0)
    quantizer = EMAQuantizerSpec(restart_below=0.3).create(codebook_size=8, code_dim=6)
    for step in range(4):
        outputs = [quantizer(part + step) for part in parts]
        quantizer.update([o.tokens for o in outputs], [o.features for o in outputs], seed=0, step=step)
    return quantizer.codebook


def in_two_processes(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    micro_batches = features(batch=8).chunk(4)  # micro-batch a of rank r is part a W + r
    results = {"codebook": ema_codebook(micro_batches[rank::2]), "gradient": entropy_gradient(micro_batches[rank])}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
