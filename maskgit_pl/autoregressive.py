"""The sequential baseline: the same transformer under a causal mask learns to predict the next token.

Source: paper, Table 1 (VQGAN*: "the same setup as MaskGIT") and Figure 4; Esser et al., arXiv:2012.09841.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from maskgit_pl.data import Batch
from maskgit_pl.decoding import ConditionalModel, DecodingStep, SequentialDecoding, decode_in_order
from maskgit_pl.networks.causal import CausalTransformer
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.token_model import NUM_BINS, TokenModel
from maskgit_pl.training.optimizers import LearningRate

__all__ = ["AutoregressiveModel"]


class AutoregressiveModel(TokenModel):
    """Trains a ``CausalTransformer``: the loss is the mean cross-entropy of all tokens, each given those before it.

    Args:
        network: Sizes of the transformer, with causal attention.
        learning_rate: As of ``TokenModel``.
        tokenizer: As of ``TokenModel``.
        decoding: How sample pictures, and later users of the exported model, decode.
        shared: As of ``TokenModel``.

    Raises:
        ValueError: Bidirectional attention, an unknown name, or guidance without a null class.
    """

    binned_by = "position"

    def __init__(
        self,
        network: TransformerConfig,
        learning_rate: LearningRate,
        tokenizer: str,
        *,
        decoding: SequentialDecoding = SequentialDecoding(),  # noqa: B008  # frozen
        **shared: Any,
    ) -> None:
        in_steps = decoding.of(network.num_tokens)
        super().__init__(CausalTransformer(network), learning_rate, tokenizer, decoding=in_steps, **shared)
        self.decoder = in_steps.sequential_decoder(network.num_tokens)

    def configure_model(self) -> None:
        """As of ``TokenModel``; sharded weights are gathered for the next token too."""
        super().configure_model()
        if self.device_mesh is None:
            return
        for network in self._networks():
            register_fsdp_forward_method(network, "next_logits")
            for block in network.blocks:
                register_fsdp_forward_method(block, "extend")

    def _mask(self, batch: Batch) -> Tensor:
        return torch.ones(len(batch.index), self.config.num_tokens, dtype=torch.bool, device=batch.index.device)

    def _visible(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return tokens  # the causal mask hides what is to be predicted

    def _bins(self, mask: Tensor) -> Tensor:
        """By the token's place in raster order."""
        of_place = torch.arange(mask.shape[1], device=mask.device) * NUM_BINS // mask.shape[1]
        return of_place.expand_as(mask)[mask]

    def _decode(self, labels: Sequence[int], seeds: Sequence[int]) -> Iterator[DecodingStep]:
        return decode_in_order(
            ConditionalModel.of(cast("CausalTransformer", self.averaged_network), self.device),
            labels,
            seeds,
            decoder=self.decoder,
            scales=self.decoding.scales(),
        )
