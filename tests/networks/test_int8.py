import copy
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from maskgit_pl.networks.int8 import Int8Linear, find_largest_weight, quantize
from maskgit_pl.networks.transformer import MaskedTransformer, TransformerConfig

CONFIG = TransformerConfig(64, 3, (8, 8), embed_dim=128, depth=3, num_heads=4, mlp_dim=512)


@pytest.fixture(scope="module")
def networks() -> tuple[MaskedTransformer, MaskedTransformer]:
    """Returns a network whose logits are far apart, like those of a trained one, and its copy in 8 bits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = MaskedTransformer(CONFIG).eval()
        for name, parameter in network.named_parameters():
            if "norm" not in name:
                parameter.data.mul_(3)
    return network, quantize(network)


def inputs(rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(1)
    tokens = torch.randint(64, (rows, 64), generator=chance)
    hidden = torch.rand(rows, 64, generator=chance) < 0.5
    return tokens.masked_fill(hidden, CONFIG.mask_token_id), torch.randint(3, (rows,), generator=chance)


def test_logits_are_close_and_the_likeliest_code_is_mostly_the_same(networks):
    exact, rounded = (network(*inputs()) for network in networks)
    assert 0 < (rounded - exact).norm() < 0.03 * exact.norm()
    assert (rounded.argmax(-1) == exact.argmax(-1)).float().mean() > 0.9


def test_logits_of_some_positions_are_nearly_those_of_the_full_forward(networks):
    _, network = networks
    positions = torch.tensor([[0, 11, 63]] * 4)
    full = network(*inputs())
    some = network.forward_at(*inputs(), positions)
    expected = full.gather(1, positions.unsqueeze(-1).expand(-1, -1, 64))
    assert (some - expected).norm() < 0.01 * expected.norm()


def test_the_network_stays_as_it_is_and_shares_nothing_with_its_copy(networks):
    network = copy.deepcopy(networks[0]).train()
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    made = quantize(network)
    assert network.training
    assert not made.training
    expected = made(*inputs())
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert all(parameter.requires_grad for parameter in network.parameters())
    for parameter in network.parameters():
        parameter.data.zero_()
    assert torch.equal(made(*inputs()), expected)


def test_every_linear_layer_of_the_blocks_is_rounded_and_nothing_else(networks):
    names = {name for name, module in networks[1].named_modules() if isinstance(module, Int8Linear)}
    assert len(names) == 4 * CONFIG.depth + 1  # the last block's queries are apart
    left = {name for name, _ in networks[1].named_parameters() if "norm" not in name}
    assert left == {
        "token_embedding.weight",
        "position_embedding.weight",
        "head_dense.weight",
        "head_dense.bias",
        "head_bias",
    }


@pytest.mark.parametrize("sign", [1, -1])
def test_no_sum_of_products_is_cut_off(sign):
    """The worst case: inputs and weights as large as they can be, all of one sign."""
    x, weight, bias = torch.ones(5, 512), sign * torch.ones(8, 512), torch.arange(8.0)
    x[:, 0] = 0
    torch.testing.assert_close(Int8Linear(weight, bias)(x), F.linear(x, weight, bias), rtol=1e-5, atol=0)


CPU = Path("/proc/cpuinfo")
MEASURE = """
import torch
from maskgit_pl.networks.int8 import Int8Linear, find_largest_weight
torch.manual_seed(0)
weight, x = torch.randn(32, 512), torch.rand(64, 512)
exact, largest = x @ weight.T, torch.cat([torch.zeros(1), torch.ones(511)])
print(find_largest_weight())
print(float((Int8Linear(weight, None)(x) - exact).norm() / exact.norm()))
print(float(Int8Linear(torch.ones(8, 512), None)(largest)[0]))
"""


def measure(instructions: str) -> tuple[int, float]:
    """Returns the largest weight and the error of a random layer, in a process limited to some instructions."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions}
    answer = subprocess.run(
        [sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True, check=True
    )
    weight, error, worst = answer.stdout.split()
    assert float(worst) == pytest.approx(511, rel=1e-5)  # nothing saturates
    return int(weight), float(error)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64" or not CPU.exists(), reason="instructions of Intel and AMD on Linux")
def test_weights_have_8_bits_unless_products_saturate():
    weight, error = measure("AVX2")
    assert weight == 63
    best, best_error = measure("DEFAULT")
    assert best == (127 if "vnni" in CPU.read_text() else 63)
    assert best_error < 0.75 * error if best == 127 else best_error == error


@pytest.mark.parametrize("value", [0.0, 0.7, -3.0])
def test_a_token_whose_inputs_are_all_equal_is_exact_but_for_its_weights(value):
    largest = float(find_largest_weight())
    weight, bias = torch.tensor([[largest, 1.0, -17.0]]), torch.tensor([2.0])  # whole numbers of their scale
    result = Int8Linear(weight, bias)(torch.full((1, 3), value))
    torch.testing.assert_close(result, torch.tensor([[(largest - 16) * value + 2]]))


def test_a_token_does_not_depend_on_the_others(networks):
    _, network = networks
    tokens, labels = inputs()
    together = network(tokens, labels)
    alone = torch.cat([network(tokens[row : row + 1], labels[row : row + 1]) for row in range(4)])
    assert (together - alone).abs().max() < 0.02 * together.abs().max()
    layer = Int8Linear(torch.randn(16, 32), torch.randn(16))
    x = torch.randn(6, 32) * torch.tensor([[1.0], [100.0], [1.0], [0.01], [1.0], [1.0]])
    torch.testing.assert_close(layer(x), torch.cat([layer(x[row : row + 1]) for row in range(6)]))


def test_an_output_without_weights_is_its_bias():
    weight, bias = torch.zeros(3, 16), torch.tensor([1.0, -2.0, 0.0])
    assert Int8Linear(weight, bias)(torch.randn(2, 16)).tolist() == [bias.tolist()] * 2


def test_a_network_elsewhere_is_refused():
    with torch.device("meta"):
        network = MaskedTransformer(CONFIG)
    with pytest.raises(ValueError, match="int8: the network must be on the CPU, got one on meta"):
        quantize(network)


def test_a_torch_without_8_bit_products_is_refused(monkeypatch, networks):
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    with pytest.raises(ValueError, match="int8: torch must be built with oneDNN"):
        quantize(networks[0])
