"""The listing of the algorithm in ``docs/how-it-works.md`` gives the tokens of the decoder."""

import re
from pathlib import Path

import pytest
import torch

from maskgit_pl.decoding import ParallelDecoder
from maskgit_pl.decoding.decoder import SeededNoise
from maskgit_pl.decoding.selectors import Confidence
from maskgit_pl.networks.transformer import MaskedTransformer, TransformerConfig
from maskgit_pl.schedules import mask_schedules

PAGE = (Path(__file__).parents[2] / "docs" / "how-it-works.md").read_text()
LISTING = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "def decode(" in block)
CONFIG = TransformerConfig(16, 3, (7, 7), embed_dim=32, depth=2, num_heads=4, mlp_dim=64)


@pytest.mark.parametrize("num_steps", [1, 2, 8, 49])
@pytest.mark.parametrize("name", ["cosine", "square", "linear", "log", "sqrt"])
@torch.no_grad()
def test_the_listing_gives_the_tokens_of_the_decoder(name, num_steps):
    (listing,) = re.findall(
        r"```python\n(import torch\n\nfrom maskgit_pl.schedules import num_masked.*?)```", PAGE, re.DOTALL
    )
    names = {}
    exec(listing, names)
    torch.manual_seed(0)
    network, labels = MaskedTransformer(CONFIG).eval(), torch.tensor([0, 1, 2])
    for parameter in network.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.3)
    schedule, seeds = mask_schedules.build(name), torch.tensor([3, 4, 5])
    decoder = ParallelDecoder(schedule, Confidence(choice_temperature=4.5), num_steps=num_steps)
    start = torch.full((3, 49), CONFIG.mask_token_id)
    expected = decoder.decode(
        lambda tokens, positions: network.forward_at(tokens, labels, positions),
        start, SeededNoise(seeds, 49), mask_token_id=CONFIG.mask_token_id,
    )  # fmt: skip
    found = names["decode"](
        lambda tokens: network(tokens, labels), SeededNoise(seeds, 49), schedule,
        shape=(3, 49), mask_token_id=CONFIG.mask_token_id, num_steps=num_steps,
    )  # fmt: skip
    assert torch.equal(found, expected)
    assert len(found.unique()) > 8
