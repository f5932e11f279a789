"""The autoregressive baseline of the ``adaln`` backbone: the same network under a causal mask.

It predicts each token from the class and the tokens before it. ``autoregressive.AutoregressiveModel`` trains it, and
``decoding.AutoregressiveDecoder`` decodes with it.

Source: paper, Table 1: VQGAN*, "the same setup as MaskGIT".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgit_pl.networks.adaln import AdaLNTransformer
from maskgit_pl.networks.backbone import AutoregressiveBackbone, Vocabulary
from maskgit_pl.networks.transformer_block import KVCache

__all__ = ["AutoregressiveAdaLN"]


class AutoregressiveAdaLN(AdaLNTransformer, AutoregressiveBackbone):
    """Predicts the code of each token from the class and the tokens before it, in raster order.

    The sequence is [start, x_1 .. x_{N-1}], and the output at each position predicts the next token. The start is the
    mask token, or the embedded class with ``conditioning: token``.

    Args:
        config: Sizes and options, with causal attention.
    """

    attention = "causal"
    entry_points = AutoregressiveBackbone.entry_points

    def forward(
        self, tokens: Tensor, labels: Tensor, *, vectors: Tensor | None = None, vocabulary: Vocabulary = "codes"
    ) -> Tensor:
        """Returns the logits (B, N, V) of all tokens (B, N) in one pass, each from the tokens before it."""
        x, condition = self._run(tokens[:, :-1], labels, vectors)
        return self._head(x, condition.unsqueeze(1), vocabulary)

    def _hidden_at(
        self, tokens: Tensor, labels: Tensor, positions: Tensor, vectors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, condition = self._run(tokens[:, :-1], labels, vectors)
        return F.embedding(positions, x.flatten(0, 1)), F.embedding(positions // tokens.shape[1], condition)

    def forward_next(self, tokens: Tensor, labels: Tensor, *, cache: Sequence[KVCache] | None = None) -> Tensor:
        """Returns the logits (B, K) of the next token; see ``AutoregressiveBackbone``."""
        x, condition = self._run(tokens, labels, None, cache)
        return self._head(x[:, -1], condition, "codes")

    def _run(
        self, tokens: Tensor, labels: Tensor, vectors: Tensor | None, cache: Sequence[KVCache] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the input of the head (B, rows that the cache lacks, D), and the condition (B, D)."""
        first = cache[0].num_rows if cache is not None else 0
        embedded = self._embed_condition(labels, vectors)
        start = torch.full_like(labels, self.config.mask_token_id).unsqueeze(1)  # (B, 1)
        x = self.token_embedding(torch.cat([start, tokens], dim=1))  # (B, 1 + t, D)
        if self.config.conditioning == "token":
            x = torch.cat([embedded.unsqueeze(1), x[:, 1:]], dim=1)
        rotation = self._rotation(self.config.num_tokens, x.device)
        rows = slice(first, x.shape[1])
        if self.position_embedding is not None:
            x = x + self.position_embedding.weight[: x.shape[1]]
        x, condition = x[:, rows], F.silu(embedded)
        if rotation is not None:
            rotation = rotation[rows]
        for number, block in enumerate(self.blocks):
            x = block(x, condition, rotation, cache=None if cache is None else cache[number])
        return x, condition
