"""Product and residual quantizers follow their published formulas."""

import pytest
import torch

from maskgit_pl.networks.quantizers import quantizers, rotate_to_codes
from tests.networks.test_lookup_free import build, features, rows_of


def test_a_product_has_the_digits_and_the_mean_loss_of_its_groups():
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


def test_a_residual_quantizes_level_by_level_highest_digit_first():
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


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "product", "quantizer": {"name": "product"}}, "must not be 'product'; take a table of codes"),
        ({"name": "residual", "quantizer": "lfq"}, "must not be 'lfq'; take a table of codes, such as 'ema'"),
        ({"name": "product", "quantizer": "emma"}, "did you mean 'ema'"),
    ],
)
def test_a_wrong_value_is_refused_with_the_way_out(spec, message):
    with pytest.raises(ValueError, match=message):
        quantizers.build(spec)
