"""The same transformer under a causal mask: each token is predicted from the class and the tokens before it.

Used by ``autoregressive.AutoregressiveModel`` in training and, through ``decoding.AutoregressiveDecoder``, in
decoding: the autoregressive baseline of the paper.

Source: paper, Table 1: VQGAN*, "the same setup as MaskGIT".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from maskgit_pl.networks.transformer import (
    MaskedTransformer,
    Transformer,
    TransformerConfig,
    Vocabulary,
)
from maskgit_pl.networks.transformer_block import Block, KVCache

__all__ = ["AutoregressiveTransformer", "build_transformer"]


class AutoregressiveTransformer(Transformer):
    """Predicts the code of each token from the class and the tokens before it, in raster order.

    The sequence is [class, x_1 .. x_{N-1}], and the output at each position predicts the token after it. Weights, their
    names and their number are those of ``MaskedTransformer``; the mask token's row and the last position are not used.

    Args:
        config: Sizes.

    Raises:
        ValueError: if the attention is bidirectional.
    """

    attention = "causal"
    entry_points = ("forward_masked", "forward_next")

    def forward(self, tokens: Tensor, labels: Tensor, *, vocabulary: Vocabulary = "codes") -> Tensor:
        """Returns the logits of all tokens of an image in one pass, each from those before it.

        Args:
            tokens: (B, N) int64 in [0, K).
            labels: (B,) int64 in [0, num_classes), or ``null_label``.
            vocabulary: Columns: the K codes, or all rows of the word table.

        Returns:
            (B, N, V) float.
        """
        return self._head(self._hidden(tokens, labels), vocabulary)

    def forward_masked(
        self, tokens: Tensor, labels: Tensor, mask: Tensor, *, vocabulary: Vocabulary = "codes"
    ) -> Tensor:
        """Returns the logits of the tokens where ``mask`` is True. The head runs at no others.

        Args:
            tokens: (B, N) int64 in [0, K).
            labels: (B,) int64 in [0, num_classes), or ``null_label``.
            mask: (B, N) bool.
            vocabulary: Columns: the K codes, or all rows of the word table.

        Returns:
            (number of True, V) float, in raster order, row after row.
        """
        return self._head(self._hidden(tokens, labels)[mask], vocabulary)

    def forward_next(self, tokens: Tensor, labels: Tensor, *, cache: Sequence[KVCache] | None = None) -> Tensor:
        """Returns the logits of the token that follows.

        Args:
            tokens: (B, t) int64 in [0, K): the tokens before it, t in [0, N).
            labels: (B,) int64 in [0, num_classes), or ``null_label``.
            cache: Made by ``create_cache`` for the first call, then kept from the call with one token less; changed in
                place. None computes everything at each call.

        Returns:
            (B, K) float: logits of the codes.
        """
        blocks = cast("Sequence[Block]", self.blocks)
        first = cache[0].num_rows if cache is not None else 0
        x = self._embed(self._sequence(tokens, labels)[:, first:], first=first)
        for number, block in enumerate(blocks):
            x = block(x) if cache is None else block.forward_next(x, cache[number])
        return self._head(x[:, -1], "codes")

    def create_cache(self) -> list[KVCache]:
        """Returns an empty cache for each block, for one run of ``forward_next``."""
        return [KVCache(self.config.num_tokens) for _ in self.blocks]

    def _hidden(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Returns the input (B, N, D) of the head."""
        x = self._embed(self._sequence(tokens[:, :-1], labels))
        for block in self.blocks:
            x = block(x)
        return x


def build_transformer(config: TransformerConfig) -> MaskedTransformer | AutoregressiveTransformer:
    """Builds the transformer whose attention a configuration names, with first weights."""
    return AutoregressiveTransformer(config) if config.attention == "causal" else MaskedTransformer(config)
