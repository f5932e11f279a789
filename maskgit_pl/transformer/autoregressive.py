"""Stage 2 of the autoregressive baseline: the transformer with causal attention learns to predict the next token.

``transformer.token_model`` lists the steps of the training, and calls the methods here.

Source: paper, Table 1 (VQGAN*: "the same setup as MaskGIT") and Figure 4; Esser et al., arXiv:2012.09841.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from maskgit_pl.data.batches import Batch
from maskgit_pl.decoding.autoregressive import decode_autoregressive
from maskgit_pl.decoding.decoder import DecodingStep
from maskgit_pl.decoding.predictors import ConditionalModel
from maskgit_pl.masking import Draws
from maskgit_pl.networks.backbone import create_network
from maskgit_pl.transformer.config import AutoregressiveConfig
from maskgit_pl.transformer.token_model import NUM_BINS, TokenModel


class AutoregressiveModel(TokenModel):
    """The LightningModule that trains an ``AutoregressiveBackbone``.

    The loss is the mean cross-entropy of each token, given the tokens before it.
    """

    config: AutoregressiveConfig
    config_class = AutoregressiveConfig
    binned_by = "position"

    def __init__(self, config: AutoregressiveConfig) -> None:
        num_tokens = config.network.num_tokens
        decoding = config.decoding.to_config(num_tokens)
        super().__init__(config, create_network(config.network), decoding)
        self.decoder = decoding.build_autoregressive_decoder(num_tokens)

    def _draw(self, batch: Batch) -> Draws:
        shape = len(batch.index), self.config.network.num_tokens
        return self._draws_of(batch, torch.ones(shape, dtype=torch.bool, device=batch.index.device))

    def _assign_bins(self, mask: Tensor, positions: Tensor) -> Tensor:
        """Groups tokens by their position in raster order, in four equal parts."""
        return positions % mask.shape[1] * NUM_BINS // mask.shape[1]  # (M,)

    def sample(
        self, labels: Sequence[int], seeds: Sequence[int], vectors: Tensor | None = None
    ) -> Iterator[DecodingStep]:
        model = ConditionalModel(self.ema_network, self.device)
        return decode_autoregressive(model, labels, seeds, decoder=self.decoder, scales=self.decoding.scales())
