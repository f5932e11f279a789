"""Quantizers without tests of their own, such as fsq, lfq and residual, follow their published formulas."""

import copy
import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from maskgit_pl.contrib.vq_pytorch import _warn_once
from maskgit_pl.networks.quantizers import quantizers
from maskgit_pl.networks.quantizers.estimators import rotate_to_codes


def features(dim, *, batch=2, seed=0):
    return torch.randn(batch, dim, 3, 4, generator=torch.Generator().manual_seed(seed))


def rows_of(part):
    return rearrange(part, "b d h w -> (b h w) d")


def build(spec, codebook_size, code_dim):
    torch.manual_seed(0)
    return quantizers.build(spec).create(codebook_size=codebook_size, code_dim=code_dim)


def losses_of(quantizer, inputs):
    output = quantizer(inputs)
    return output, {name: value.item() for name, value in quantizer.losses.items()}


@pytest.mark.parametrize("levels", [(8, 6, 5), (2, 3), (4, 4, 7)])
def test_fsq_follows_the_papers_bound_and_numbering(levels):
    inputs = 2 * features(len(levels))
    output = build({"name": "fsq", "levels": levels}, math.prod(levels), len(levels))(inputs)
    for row, code, token in zip(
        rows_of(inputs), rows_of(output.quantized), output.tokens.flatten().tolist(), strict=True
    ):
        expected, basis = 0, 1
        for value, level, made in zip(row.tolist(), levels, code.tolist(), strict=True):
            half, offset = (level - 1) * 0.999 / 2, 0.0 if level % 2 else 0.5
            rounded = round(math.tanh(value + math.tan(offset / half)) * half - offset)
            assert made == pytest.approx(rounded / (level // 2))
            expected, basis = expected + (rounded + level // 2) * basis, basis * level
        assert token == expected


def test_fsq_uses_every_level_and_no_other_one():
    quantizer = build({"name": "fsq", "levels": (8, 5, 2)}, 80, 3)
    far = torch.linspace(-9, 9, 400)
    codes = rows_of(quantizer(far.expand(3, 400)[None, :, None]).quantized)
    assert [len(channel.unique()) for channel in codes.t()] == [8, 5, 2]
    assert codes.min() == -1
    assert codes.max() == 1


def test_the_gradient_of_fsq_is_that_of_its_bound():
    inputs = features(2).requires_grad_()
    build({"name": "fsq", "levels": (5, 7)}, 35, 2)(inputs).quantized.sum().backward()
    half = torch.tensor([4.0, 6.0]) * 0.999 / 2
    expected = (1 - rows_of(inputs).tanh().square()) * half / torch.tensor([2.0, 3.0])
    torch.testing.assert_close(rows_of(inputs.grad), expected)


def all_signs(dim):
    """All codes of signs (2^D, D) in the order of their tokens: channel 0 is the lowest bit."""
    return torch.tensor([bits[::-1] for bits in itertools.product((-1.0, 1.0), repeat=dim)])


@pytest.mark.parametrize("dim", [1, 4, 5])
def test_the_entropies_of_lfq_are_those_of_the_softmax_over_all_codes(dim):
    spec = {"name": "lfq", "commitment": 0.5, "entropy_weight": 0.3, "entropy_temperature": 2.0, "diversity": 1.7}
    quantizer, inputs = build(spec, 2**dim, dim), features(dim).requires_grad_()
    output, parts = losses_of(quantizer, inputs)
    rows, codes = rows_of(inputs), all_signs(dim)
    probabilities = (-torch.cdist(rows, codes).square() / 2.0).softmax(1)
    mean = probabilities.mean(0)
    commitment = 0.5 * F.mse_loss(rows, rows.detach().sign())
    sample = -0.3 * (probabilities * probabilities.log()).sum(1).mean()
    batch = 0.3 * 1.7 * (mean * (mean + 1e-5).log()).sum()
    assert parts == pytest.approx(
        {"commitment": commitment.item(), "sample_entropy": sample.item(), "batch_entropy": batch.item()}, rel=1e-4
    )
    gradients = [torch.autograd.grad(loss, inputs)[0] for loss in (output.loss, commitment + sample + batch)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(quantizer.lookup(torch.arange(2**dim)), codes)
    torch.testing.assert_close(output.tokens.flatten(), torch.cdist(rows, codes).argmin(1))


def test_the_losses_of_bsq_are_those_on_the_unit_sphere():
    spec = {"name": "bsq", "commitment": 0.5, "entropy_weight": 0.3, "entropy_temperature": 0.2, "diversity": 1.7}
    quantizer, inputs = build(spec, 32, 5), features(5)
    output, parts = losses_of(quantizer, inputs)
    unit = rows_of(inputs) / rows_of(inputs).norm(dim=1, keepdim=True)
    codes = unit.sign() / 5**0.5
    torch.testing.assert_close(rows_of(output.quantized), codes)
    torch.testing.assert_close(output.tokens.flatten(), torch.cdist(unit, all_signs(5) / 5**0.5).argmin(1))
    # The softmax over all codes of 2 u c / T is a product of bits.
    probability = (2 * torch.stack([unit, -unit]) / 5**0.5 / 0.2).softmax(0)  # (2, M, D)
    mean = probability.mean(1)
    assert parts == pytest.approx(
        {
            "commitment": 0.5 * (unit - codes).square().sum(1).mean().item(),
            "sample_entropy": -0.3 * 0.2 * (probability * probability.log()).sum((0, 2)).mean().item(),
            "batch_entropy": 0.3 * 0.2 * 1.7 * (mean * mean.log()).sum().item(),
        },
        rel=1e-4,
    )


def test_bsq_does_not_depend_on_the_length_of_a_feature():
    quantizer, inputs = build("bsq", 32, 5), features(5)
    first, second = quantizer(inputs), quantizer(7 * inputs)
    assert torch.equal(first.tokens, second.tokens)
    torch.testing.assert_close(first.loss, second.loss)


@pytest.mark.parametrize("name", ["lfq", "bsq"])
def test_entropies_of_signs_stay_finite_at_extreme_features(name):
    inputs = (1e4 * features(5)).requires_grad_()
    inputs.data[:, :, 0, 0] = 0
    loss = build({"name": name, "entropy_temperature": 1e-5}, 32, 5)(inputs).loss
    loss.backward()
    assert loss.isfinite()
    assert inputs.grad.isfinite().all()


def test_a_step_of_simvq_moves_every_code_and_leaves_the_frozen_ones():
    quantizer = build("simvq", 16, 4)
    before, frozen = quantizer.lookup(torch.arange(16)).detach(), quantizer.frozen_codes.clone()
    torch.testing.assert_close(before, frozen @ quantizer.projection.t() + quantizer.offset)
    inputs = features(4)[..., :1, :1]  # two features: at most two codes are nearest
    output, parts = losses_of(quantizer, inputs)
    error = F.mse_loss(before[output.tokens.flatten()], rows_of(inputs)).item()
    assert parts == pytest.approx({"commitment": 0.25 * error, "codebook": error, "entropy": 0.0})
    torch.optim.SGD(quantizer.parameters(), lr=0.1).zero_grad()
    output.loss.backward()
    torch.optim.SGD(quantizer.parameters(), lr=0.1).step()
    assert torch.equal(quantizer.frozen_codes, frozen)
    assert ((quantizer.lookup(torch.arange(16)) - before).abs().max(1).values > 0).all()


def test_the_losses_and_gradients_of_ibq_are_the_published_ones():
    spec = {"name": "ibq", "commitment": 0.7, "codebook_weight": 0.3, "entropy_weight": 0.2, "entropy_temperature": 0.9}
    quantizer, inputs = build(spec, 8, 4), features(4).requires_grad_()
    direction = torch.randn(24, 4)
    output, parts = losses_of(quantizer, inputs)
    (rows_of(output.quantized) * direction).sum().add(output.loss).backward()
    made = inputs.grad.clone(), quantizer.codebook.grad.clone()

    codes, leaf = quantizer.codebook.detach().requires_grad_(), inputs.detach().requires_grad_()
    rows = rows_of(leaf)
    logits = rows @ codes.t()
    soft, hard = logits.softmax(1), F.one_hot(logits.argmax(1), 8).float()
    quantized, chosen = (hard - soft.detach() + soft) @ codes, hard @ codes
    probabilities = (logits / 0.9).softmax(1)
    mean = probabilities.mean(0)
    entropy = -(probabilities * probabilities.log()).sum(1).mean() + (mean * (mean + 1e-5).log()).sum()
    expected = {
        "double_quantization": (quantized - rows).square().mean(),
        "commitment": 0.7 * (chosen.detach() - rows).square().mean(),
        "codebook": 0.3 * (chosen - rows.detach()).square().mean(),
        "entropy": 0.2 * entropy,
    }
    assert parts == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-4)
    ((quantized * direction).sum() + sum(expected.values())).backward()
    torch.testing.assert_close(made, (leaf.grad, codes.grad), rtol=1e-4, atol=1e-5)


def gumbel_output(form="soft", *, seed=0, step=0, micro_batch=0, temperature=1.0):
    spec = {"name": "gumbel", "form": form, "temperature": temperature, "final_temperature": temperature}
    quantizer = build(spec, 8, 4)
    quantizer.begin_micro_batch(seed=seed, step=step, micro_batch=micro_batch)
    return quantizer, quantizer(features(4))


def test_the_codes_of_gumbel_are_mixed_and_its_loss_is_the_divergence_from_uniform():
    quantizer, output = gumbel_output()
    distances = torch.cdist(rows_of(features(4)), quantizer.codebook).square()
    probabilities = (-distances).softmax(1)
    divergence = (probabilities * (probabilities * 8).log()).sum(1).mean()
    torch.testing.assert_close(output.loss, 5e-4 * divergence)
    codes = quantizer.codebook.detach()
    assert rows_of(output.quantized).max() <= codes.max()  # a mixture lies between the codes
    assert torch.equal(output.tokens.flatten(), distances.argmin(1))


def test_gumbel_draws_a_code_as_often_as_its_probability():
    quantizer = build({"name": "gumbel", "form": "hard"}, 4, 2)
    quantizer.codebook.data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    inputs = torch.tensor([0.3, 0.4]).view(1, 2, 1, 1).expand(1, 2, 100, 100)
    drawn = torch.cdist(rows_of(quantizer(inputs).quantized), quantizer.codebook).argmin(1)
    expected = (-torch.cdist(rows_of(inputs)[:1], quantizer.codebook).square()).softmax(1)[0]
    torch.testing.assert_close(drawn.bincount(minlength=4) / 10_000, expected, rtol=0, atol=0.015)


@pytest.mark.parametrize("other", [{"seed": 1}, {"step": 1}, {"micro_batch": 1}])
def test_the_noise_of_gumbel_depends_on_seed_step_and_micro_batch(other):
    assert torch.equal(gumbel_output()[1].quantized, gumbel_output()[1].quantized)
    assert not torch.equal(gumbel_output()[1].quantized, gumbel_output(**other)[1].quantized)


def test_hard_gumbel_decodes_codes_with_the_gradient_of_the_mixture():
    (quantizer, hard), (_, soft) = gumbel_output("hard"), gumbel_output("soft")
    nearest = torch.cdist(rows_of(hard.quantized), quantizer.codebook)
    assert nearest.min(1).values.max() < 1e-5
    cold = gumbel_output("soft", temperature=0.001)[1]
    torch.testing.assert_close(cold.quantized, hard.quantized, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(soft.quantized, hard.quantized)
    gradients = []
    for form in ("hard", "soft"):
        leaf = features(4).requires_grad_()
        quantizer = build({"name": "gumbel", "form": form}, 8, 4)
        gradients.append(torch.autograd.grad(quantizer(leaf).quantized.sum(), leaf)[0])
    torch.testing.assert_close(*gradients)


def test_the_temperature_of_gumbel_falls_along_half_a_cosine_and_stays():
    spec = quantizers.build({"name": "gumbel", "temperature": 2.0, "final_temperature": 0.5, "annealing_steps": 100})
    assert [spec.temperature_at(step) for step in (0, 50, 100, 1000)] == pytest.approx([2.0, 1.25, 0.5, 0.5])


def test_the_rotation_gives_the_code_and_turns_the_gradient_by_the_same_angle():
    rows = rows_of(features(3)).requires_grad_()
    codes = rows_of(features(3, seed=1))
    gradient = rows_of(features(3, seed=2))
    turned = rotate_to_codes(rows, codes)
    torch.testing.assert_close(turned, codes)
    turned.backward(gradient)
    for row, code, given, made in zip(rows.detach(), codes, gradient, rows.grad, strict=True):
        unit, target = row / row.norm(), code / code.norm()
        middle = (unit + target) / (unit + target).norm()
        rotation = torch.eye(3) - 2 * torch.outer(middle, middle) + 2 * torch.outer(target, unit)
        torch.testing.assert_close(rotation @ unit, target)
        torch.testing.assert_close(made, code.norm() / row.norm() * rotation.t() @ given)


def test_the_rotation_is_finite_where_a_feature_is_zero_or_opposite_to_its_code():
    rows = torch.tensor([[0.0, 0.0], [1.0, -2.0], [3.0, 0.0]], requires_grad=True)
    codes = torch.tensor([[1.0, 0.0], [-1.0, 2.0], [0.0, 0.0]])
    turned = rotate_to_codes(rows, codes)
    torch.testing.assert_close(turned, codes)
    turned.sum().backward()
    assert rows.grad.isfinite().all()


@pytest.mark.parametrize("name", ["gradient", "ema", "simvq"])
def test_the_rotation_is_an_option_of_codebooks(name):
    inputs = features(4)
    outputs = []
    for estimator in ("straight-through", "rotation"):
        leaf = inputs.clone().requires_grad_()
        output = build({"name": name, "gradient_estimator": estimator}, 8, 4)(leaf)
        outputs.append((output, torch.autograd.grad(output.quantized.sum(), leaf)[0]))
    torch.testing.assert_close(outputs[0][0].quantized, outputs[1][0].quantized)
    assert torch.equal(outputs[0][0].loss, outputs[1][0].loss)
    assert not torch.allclose(outputs[0][1], outputs[1][1])


def test_the_tokens_of_a_product_are_the_digits_of_its_groups_and_its_loss_their_mean():
    inner = {"name": "gradient", "entropy_weight": 0.0}
    quantizer, inputs = build({"name": "product", "num_groups": 3, "quantizer": inner}, 4**3, 6), features(6)
    output = quantizer(inputs)
    expected, losses = 0, []
    for number, (group, channels) in enumerate(zip(quantizer.groups, inputs.chunk(3, dim=1), strict=True)):
        distances = torch.cdist(rows_of(channels), group.codebook)
        expected = expected + distances.argmin(1) * 4**number
        losses.append(1.25 * distances.min(1).values.square().mean() / 2)
    assert torch.equal(output.tokens.flatten(), expected)
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())


def test_the_groups_of_a_product_draw_different_noise():
    quantizer = build({"name": "product", "quantizer": "gumbel"}, 16, 4)
    quantizer.groups[1].load_state_dict(quantizer.groups[0].state_dict())
    quantizer.begin_micro_batch(seed=0, step=0, micro_batch=0)
    first, second = quantizer(features(2).repeat(1, 2, 1, 1)).quantized.chunk(2, dim=1)
    assert not torch.allclose(first, second)


def residual_reference(rows, codebooks):
    """Quantizes rows one by one: tokens, sums of codes, and the mean squared residual after each level."""
    tokens, sums, errors = [], [], [[] for _ in codebooks]
    for row in rows:
        token, total = 0, torch.zeros_like(row)
        for number, codebook in enumerate(codebooks):
            digit = min(range(len(codebook)), key=lambda k: float((row - total - codebook[k]).square().sum()))
            token, total = token * len(codebook) + digit, total + codebook[digit]
            errors[number].append((row - total).square().mean())
        tokens.append(token)
        sums.append(total)
    return torch.tensor(tokens), torch.stack(sums), [torch.stack(error).mean() for error in errors]


def test_residual_quantizes_level_by_level_and_the_first_level_has_the_highest_digit():
    inner = {"name": "gradient", "commitment": 0.3, "codebook_weight": 0.7, "entropy_weight": 0.0}
    quantizer = build({"name": "residual", "num_levels": 3, "quantizer": inner}, 4**3, 6)
    inputs = features(6).requires_grad_()
    output = quantizer(inputs)
    codebooks = [level.codebook for level in quantizer.levels]
    tokens, sums, errors = residual_reference(rows_of(inputs.detach()), [book.detach() for book in codebooks])
    assert torch.equal(output.tokens.flatten(), tokens)
    torch.testing.assert_close(rows_of(output.quantized), sums)
    torch.testing.assert_close(quantizer.lookup(tokens), sums)
    torch.testing.assert_close(output.loss, torch.stack(errors).mean())  # 0.3 + 0.7 times the same number
    assert {name: value.item() for name, value in quantizer.losses.items()} == pytest.approx(
        {"commitment": 0.3 * output.loss.item(), "codebook": 0.7 * output.loss.item(), "entropy": 0.0}
    )
    # Commitment of level l: features to the sum of the first l codes. Codes of a level: to the residual before it.
    leaf, books = inputs.detach().requires_grad_(), [book.detach().requires_grad_() for book in codebooks]
    rows, digits = rows_of(leaf), [tokens // 16, tokens // 4 % 4, tokens % 4]
    codes = [book[digit] for book, digit in zip(books, digits, strict=True)]
    partial = [sum(codes[: number + 1]).detach() for number in range(3)]
    commitment = sum((rows - total).square().mean() for total in partial)
    codebook = sum(
        (code - (rows.detach() - total + code.detach())).square().mean()
        for code, total in zip(codes, partial, strict=True)
    )
    expected = torch.autograd.grad((0.3 * commitment + 0.7 * codebook) / 3, [leaf, *books])
    torch.testing.assert_close(torch.autograd.grad(output.loss, [inputs, *codebooks]), expected, rtol=1e-4, atol=1e-6)


def test_the_decoders_gradient_passes_a_residual_once_and_moves_no_code():
    quantizer, inputs = build({"name": "residual", "num_levels": 4}, 2**4, 4), features(4).requires_grad_()
    direction = features(4, seed=1)
    (gradient,) = torch.autograd.grad((quantizer(inputs).quantized * direction).sum(), inputs)
    torch.testing.assert_close(gradient, direction)
    inner = {"name": "ema", "gradient_estimator": "rotation"}
    turned = build({"name": "residual", "num_levels": 4, "quantizer": inner}, 2**4, 4)
    output = turned(inputs)
    (gradient,) = torch.autograd.grad((output.quantized * direction).sum(), inputs)
    rows = rows_of(inputs.detach()).requires_grad_()
    total = rotate_to_codes(rows, turned.lookup(output.tokens.flatten()))
    torch.testing.assert_close(rows_of(gradient), torch.autograd.grad((total * rows_of(direction)).sum(), rows)[0])


def test_the_levels_of_a_residual_start_from_means_of_what_is_left_over():
    inner = {"name": "gradient", "initial_codes": "kmeans"}
    quantizer = build({"name": "residual", "num_levels": 3, "quantizer": inner}, 4**3, 2)
    inputs = clusters()
    output = quantizer(inputs)
    quantizer.update([output.tokens], [output.features], seed=0, step=0)
    residual = rows_of(inputs)
    for level in quantizer.levels:
        nearest = torch.cdist(residual, level.codebook.detach()).argmin(1)
        for code in nearest.unique():  # a fixed point of Lloyd's algorithm
            torch.testing.assert_close(level.codebook[code].detach(), residual[nearest == code].mean(0))
        before, residual = residual.norm(), residual - level.codebook.detach()[nearest]
        assert residual.norm() < before


def test_the_averages_of_a_residual_reduce_the_error_with_every_level():
    errors = []
    for levels in (1, 2, 4):
        spec = "ema" if levels == 1 else {"name": "residual", "num_levels": levels}
        quantizer, inputs = build(spec, 4**levels, 3), features(3, batch=16)
        for step in range(60):
            output = quantizer(inputs)
            quantizer.update([output.tokens], [output.features], seed=0, step=step)
        codes = quantizer.lookup(quantizer.nearest(inputs).flatten())
        errors.append(F.mse_loss(codes, rows_of(inputs)).item())
    assert errors[1] < 0.75 * errors[0]
    assert errors[2] < 0.75 * errors[1]


def clusters(step=0):
    """Features (2, 2, 3, 4) of 4 clusters in turn, close to (+-1, +-2)."""
    centers = torch.tensor([[1.0, 2.0], [-1.0, 2.0], [1.0, -2.0], [-1.0, -2.0]])
    return centers.repeat(6, 1).view(2, 3, 4, 2).permute(0, 3, 1, 2) + 0.01 * features(2, seed=step)


def test_kmeans_puts_the_codes_at_means_of_features_of_the_first_batch_only():
    quantizer = build({"name": "gradient", "initial_codes": "kmeans"}, 4, 2)
    output = quantizer(clusters())
    quantizer.update([output.tokens], [output.features], seed=0, step=0)
    rows = rows_of(clusters())
    nearest = torch.cdist(rows, quantizer.codebook).argmin(1)
    for code in nearest.unique():  # a fixed point of Lloyd's algorithm
        torch.testing.assert_close(quantizer.codebook[code].detach(), rows[nearest == code].mean(0))
    assert torch.cdist(rows, quantizer.codebook).min(1).values.mean() < 1.1  # half of the clusters' distances
    kept = quantizer.codebook.detach().clone()
    quantizer.update([output.tokens], [features(2)], seed=0, step=1)
    assert torch.equal(quantizer.codebook, kept)
    loaded = build({"name": "gradient", "initial_codes": "kmeans"}, 4, 2)
    loaded.load_state_dict(quantizer.state_dict())
    loaded.update([output.tokens], [features(2)], seed=0, step=0)
    assert torch.equal(loaded.codebook, kept)


def test_kmeans_starts_from_different_features_and_depends_on_the_seed():
    def codes(seed, size=24):
        quantizer = build({"name": "gradient", "initial_codes": "kmeans"}, size, 2)
        output = quantizer(features(2))
        quantizer.update([output.tokens], [output.features], seed=seed, step=0)
        return quantizer.codebook.detach()

    # As many codes as features: each is one of them.
    torch.testing.assert_close(
        codes(0)[codes(0)[:, 0].argsort()], rows_of(features(2))[rows_of(features(2))[:, 0].argsort()]
    )
    assert torch.equal(codes(0, 6), codes(0, 6))
    assert not torch.equal(codes(0, 6), codes(1, 6))
    assert codes(0, 40).isfinite().all()  # more codes than features


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "fsq", "levels": []}, "levels must be a list"),
        ({"name": "fsq", "levels": [8, 1]}, r"levels must be an integer in \[2, 4096\], got 1"),
        ({"name": "fsq", "levels": [4096, 4096, 2]}, "levels must have a product of at most 16777216, got 33554432"),
        ({"name": "lfq", "diversity": -1.0}, "diversity"),
        ({"name": "product", "quantizer": {"name": "product"}}, "must not be 'product' again"),
        (
            {"name": "residual", "quantizer": "lfq"},
            "must not be 'lfq', whose codes have one fixed scale, got 'lfq'; take",
        ),
        ({"name": "residual", "quantizer": {"name": "ibq"}}, "must not be 'ibq', whose codes learn from the decoder"),
        ({"name": "residual", "quantizer": "product"}, "must not be 'product', got 'product'; raise num_levels"),
        ({"name": "product", "quantizer": "residual"}, "must not be 'residual'"),
        ({"name": "product", "quantizer": "emma"}, "did you mean 'ema'"),
        ({"name": "gradient", "initial_codes": "k-means"}, "did you mean 'kmeans'"),
        ({"name": "gumbel", "final_temperature": 2.0}, "final_temperature must be at most temperature 1.0, got 2.0"),
        ({"name": "gumbel", "form": "harder"}, "did you mean 'hard'"),
        ({"name": "simvq", "gradient_estimator": "rotate"}, "did you mean 'rotation'"),
    ],
)
def test_a_wrong_value_is_refused_with_the_way_out(spec, message):
    with pytest.raises(ValueError, match=message):
        quantizers.build(spec)


def test_kmeans_leaves_codes_without_features_where_they_are():
    quantizer = build({"name": "gradient", "initial_codes": "kmeans"}, 4, 2)
    output = quantizer(torch.full((1, 2, 3, 3), 5.0))
    quantizer.update([output.tokens], [output.features], seed=0, step=0)
    assert torch.equal(quantizer.codebook, torch.full((4, 2), 5.0))


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True, "decay": 0.5}, {"rotation_trick": False}], ids=str)
def test_vector_quantize_learns_after_the_step_what_the_package_learns_in_its_forward_pass(options):
    pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")
    quantizer = build({"name": "vq_pytorch", "options": options}, 8, 4)
    package, inputs = copy.deepcopy(quantizer.inner), features(4)
    images = [inputs.clone().requires_grad_() for _ in range(2)]
    quantized, tokens, loss = package(rearrange(images[0], "b d h w -> b (h w) d"))
    output = quantizer(images[1])
    assert torch.equal(output.tokens, tokens)
    torch.testing.assert_close(rearrange(output.quantized, "b d h w -> b (h w) d"), quantized)
    torch.testing.assert_close(output.loss, loss)
    gradients = [torch.autograd.grad(made.sum() + part, image)[0] for made, part, image in
                 ((quantized, loss, images[0]), (output.quantized, output.loss, images[1]))]  # fmt: skip
    torch.testing.assert_close(*gradients)
    quantizer.update([output.tokens], [output.features], seed=0, step=0)
    torch.testing.assert_close(quantizer.inner.codebook, package.codebook)
    assert not torch.equal(quantizer.nearest(inputs), tokens)  # it has learned


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with pytest.raises(ValueError, match=r'pip install "maskgit_pl\[quantizers\]"'):
        quantizers.build("vq_pytorch").create(codebook_size=16, code_dim=4)


def test_the_package_is_said_once_not_to_promise_bit_exact_resuming(caplog):
    pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")
    _warn_once.cache_clear()
    for _ in range(2):
        build("vq_pytorch", 8, 4)
    assert [record.getMessage().count("not promised to be bit-exact") for record in caplog.records] == [1]
