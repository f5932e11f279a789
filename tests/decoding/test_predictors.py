import pytest
import torch
from torch import Tensor

from maskgit_pl.decoding import ConditionalModel, ParallelDecoder, decode_classes
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.networks.transformer import MaskedTransformer, TransformerConfig
from maskgit_pl.schedules import mask_schedules

CONFIG = TransformerConfig(16, 3, (4, 4), embed_dim=32, depth=3, num_heads=4, mlp_dim=64)
MASK, NULL = CONFIG.mask_token_id, 3
SCALES = (2.0, 2.0, 2.0, 0.0, 0.0, 2.0)


class Recording:
    """A network that remembers the labels and the number of positions of each call."""

    def __init__(self, network: MaskedTransformer) -> None:
        self.network = network
        self.labels: list[list[int]] = []
        self.num_positions: list[int] = []

    def forward_at(self, tokens: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        self.labels.append(labels.tolist())
        self.num_positions.append(positions.shape[1])
        return self.network.forward_at(tokens, labels, positions)


@pytest.fixture
def recording() -> Recording:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Recording(MaskedTransformer(CONFIG).eval().requires_grad_(False))


def test_a_guided_step_runs_both_halves_and_an_unguided_step_one(recording):
    model = ConditionalModel(recording, (4, 4), MASK, NULL, torch.device("cpu"))
    decoder = ParallelDecoder(mask_schedules.build("cosine"), token_selectors.build("confidence"), num_steps=6)
    steps = list(decode_classes(model, [0, 2, 1], [5, 6, 7], decoder=decoder, scales=SCALES))
    classes, both = [0, 2, 1], [0, 2, 1, NULL, NULL, NULL]
    assert recording.labels == [[0, 1, 2, NULL], both, both, classes, classes, both]  # first, each class once
    assert recording.num_positions == [step.was_masked[0].sum() for step in steps]
