"""The autoregressive baseline's transformer: the same network under a causal mask.

It predicts each token from the class and the tokens before it. ``autoregressive.AutoregressiveModel`` trains it, and
``decoding.AutoregressiveDecoder`` decodes with it.

Source: paper, Table 1: VQGAN*, "the same setup as MaskGIT".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor

from maskgit_pl.networks.backbone import AutoregressiveBackbone, Vocabulary
from maskgit_pl.networks.transformer import Transformer
from maskgit_pl.networks.transformer_block import Block, KVCache

__all__ = ["AutoregressiveTransformer"]


class AutoregressiveTransformer(Transformer, AutoregressiveBackbone):
    """Predicts the code of each token from the class and the tokens before it, in raster order.

    The sequence is [class, x_1 .. x_{N-1}], and the output at each position predicts the next token. The weights have
    the names and shapes of ``MaskedTransformer``; the mask token's row and the last position are not used.

    Args:
        config: Sizes.

    Raises:
        ValueError: if the attention is bidirectional.
    """

    attention = "causal"
    entry_points = AutoregressiveBackbone.entry_points

    def forward(
        self, tokens: Tensor, labels: Tensor, *, vectors: Tensor | None = None, vocabulary: Vocabulary = "codes"
    ) -> Tensor:
        """Returns the logits of all tokens in one pass, each from the tokens before it.

        Args:
            tokens: (B, N) int64 in [0, K).
            labels: (B,) int64 in [0, num_classes), or ``null_label``.
            vectors: None: the transformer knows classes only.
            vocabulary: Columns of the result; see ``Backbone.forward``.

        Returns:
            (B, N, V) float.
        """
        return self._head(self._hidden(tokens, labels), vocabulary)

    def forward_next(self, tokens: Tensor, labels: Tensor, *, cache: Sequence[KVCache] | None = None) -> Tensor:
        """Returns the logits (B, K) of the next token; see ``AutoregressiveBackbone``."""
        blocks = cast("Sequence[Block]", self.blocks)
        # The cache holds the rows before ``first``; only the new rows are computed.
        first = cache[0].num_rows if cache is not None else 0
        x = self._embed(self._sequence(tokens, labels)[:, first:], first=first)
        for number, block in enumerate(blocks):
            x = block(x) if cache is None else block.forward_next(x, cache[number])
        return self._head(x[:, -1], "codes")

    def _hidden_at(self, tokens: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        # Rows are selected before the head, the largest matrix product of the network.
        return F.embedding(positions, self._hidden(tokens, labels).flatten(0, 1))

    def _hidden(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Returns the input (B, N, D) of the head."""
        x = self._embed(self._sequence(tokens[:, :-1], labels))  # (B, N, D): nothing follows the last token
        for block in self.blocks:
            x = block(x)
        return x
