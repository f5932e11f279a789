"""The same transformer under a causal mask: each token is predicted from the class and the tokens before it.

Used by ``autoregressive.AutoregressiveModel`` in training and, through ``decoding.SequentialDecoder``, in decoding: the
sequential baseline of the paper.

Source: paper, Table 1: VQGAN*, "the same setup as MaskGIT".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from maskgit_pl.networks.transformer import (
    Block,
    KeyValues,
    MaskedTransformer,
    Transformer,
    TransformerConfig,
    Vocabulary,
)

__all__ = ["CausalTransformer", "build_transformer"]


class CausalTransformer(Transformer):
    """Predicts the code of each token from the class and the tokens before it, in raster order.

    The sequence is [class, x_1 .. x_{N-1}], and what it gives at each place is the token after it. Weights, their names
    and their number are those of ``MaskedTransformer``; the mask token's row and the last position are never asked for.

    Args:
        config: Sizes.

    Raises:
        ValueError: Bidirectional attention.
    """

    attention = "causal"

    def forward(
        self, tokens: Tensor, labels: Tensor, positions: Tensor | None = None, *, vocabulary: Vocabulary = "codes"
    ) -> Tensor:
        """Logits of tokens, each from those before it; all of an image's in one pass.

        Args:
            tokens: (B, N) int64 in [0, K).
            labels: (B,) int64 in [0, num_classes), or ``null_label``.
            positions: None for all tokens; (B, N) bool for those that are True, in raster order row after row. The head
                runs at these alone.
            vocabulary: Columns: the K codes, or all rows of the word table.

        Returns:
            (B, N, V) or (number of True, V) float.
        """
        x = self._embed(self._sequence(tokens[:, :-1], labels))
        for block in self.blocks:
            x = block(x)
        return self._head(x if positions is None else x[positions], vocabulary)

    def next_logits(self, tokens: Tensor, labels: Tensor, *, cache: Sequence[KeyValues] | None = None) -> Tensor:
        """Logits of the token that follows.

        Args:
            tokens: (B, t) int64 in [0, K): the tokens before it, t in [0, N).
            labels: As of ``forward``.
            cache: Of ``new_cache``, kept from the call with one token less and changed in place; new in the first call.
                None computes everything at each call.

        Returns:
            (B, K) float: logits of the codes.
        """
        blocks = cast("Sequence[Block]", self.blocks)
        first = cache[0].num_rows if cache is not None else 0
        x = self._embed(self._sequence(tokens, labels)[:, first:], first=first)
        for number, block in enumerate(blocks):
            x = block(x) if cache is None else block.extend(x, cache[number])
        return self._head(x[:, -1], "codes")

    def new_cache(self) -> list[KeyValues]:
        """Room for the keys and values of each block, for one run of ``next_logits``."""
        return [KeyValues(self.config.num_tokens) for _ in self.blocks]


def build_transformer(config: TransformerConfig) -> MaskedTransformer | CausalTransformer:
    """The transformer whose attention a configuration names, with first weights."""
    return CausalTransformer(config) if config.attention == "causal" else MaskedTransformer(config)
