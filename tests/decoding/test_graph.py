"""A whole decoding run is one graph: its shapes are known before the loop, and nothing in it waits for the device.

That is what lets a compiler, or one CUDA graph, take the loop as it is.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from maskgit_pl.decoding import DecodingConfig, SeededNoise
from maskgit_pl.decoding.predictors import GuidedPredictor
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.schedules import mask_schedules
from tests.conftest import random_transformer

GRID, NUM_STEPS = (4, 4), 6
PLANNED = [name for name, selector in token_selectors.build_all().items() if not selector.counts_in_loop]
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique")
FIRST = torch.tensor([1, 2]), torch.tensor([0, 1])  # seeds and labels
OTHERS = torch.tensor([7, 8]), torch.tensor([2, 0])


def whole_run(selector: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns a function of seeds (B,) and labels (B,) to tokens (B, N)."""
    network = random_transformer(TransformerConfig(16, 3, GRID, 16, 2, 2, 32))
    config = DecodingConfig(NUM_STEPS, selector, {"name": "linear", "scale": 2.0})
    decoder, mask = config.build_decoder(mask_schedules.build("cosine")), network.config.mask_token_id

    def run(seeds: Tensor, labels: Tensor) -> Tensor:
        null = torch.full_like(labels, network.config.num_classes)
        num_tokens = math.prod(GRID)
        *_, last = decoder.steps(
            GuidedPredictor(network, labels, negative_labels=null, scales=config.scales()),
            torch.full((len(seeds), num_tokens), mask),
            SeededNoise(seeds, num_tokens, steps_at_once=NUM_STEPS),
            mask_token_id=mask,
            grid=GRID,
            num_masked=[num_tokens] * len(seeds),
        )
        return last.tokens

    return run


@pytest.mark.slow
@pytest.mark.parametrize("selector", PLANNED)
def test_a_recorded_run_gives_the_tokens_of_other_seeds_and_labels(selector):
    run = whole_run(selector)
    graph = make_fx(run)(*FIRST)
    assert torch.equal(graph(*OTHERS), run(*OTHERS))
    assert not torch.equal(run(*OTHERS), run(*FIRST))
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert not [name for name in called if any(wait in name for wait in WAITS)]
