"""Token groups: a token of K = k^G codes as G digits in base k, each embedded and predicted for itself.

Tables and heads have G k rows in place of K. The digits are independent given the visible tokens, so the logit of a
code is the sum of the logits of its digits: the softmax over the K codes is the product of the softmaxes of the groups.

The most significant digit comes first: token = sum_g digit_g k^(G - 1 - g). For ``lfq`` and ``bsq``, whose bit i is the
sign of channel i, group g of B bits holds the channels from D - (g + 1) B on, and for ``product`` the group G - 1 - g.

Source: MaskBit, arXiv:2409.16211 (groups of bits), and the class ``Bert`` of its code: the sum of an embedding for
each group, a head for each group. Factorized prediction: Open-MAGVIT2, arXiv:2409.04410. MaskBit masks and decodes each
group for itself; here a token is masked and decoded as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit_pl.networks.backbone import BackboneConfig, Project, Vocabulary

__all__ = [
    "TokenEmbedding",
    "compose_logits",
    "join_digits",
    "likeliest_tokens",
    "split_tokens",
    "token_logits",
]


def split_tokens(tokens: Tensor, *, num_groups: int, group_size: int) -> Tensor:
    """Returns the digits (..., G) int64 in [0, k) of tokens (...) int64 in [0, k^G), the most significant one first."""
    # Not a tensor of the powers: its copy to the device would wait.
    digits = [tokens // group_size**place % group_size for place in reversed(range(num_groups))]
    return torch.stack(digits, dim=-1)


def join_digits(digits: Tensor, *, group_size: int) -> Tensor:
    """Returns the tokens (...) int64 in [0, k^G) of digits (..., G) int64 in [0, k), the most significant one first."""
    first, *rest = digits.unbind(-1)
    for digit in rest:
        first = first * group_size + digit
    return first


def compose_logits(logits: Tensor, *, num_groups: int) -> Tensor:
    """Computes the logits of all codes from those of the groups. Exact: the groups are independent.

    Args:
        logits: (..., G k) float: the logits of the values of each group, group after group.
        num_groups: G.

    Returns:
        (..., k^G) float: for each code the sum of the logits of its digits.
    """
    first, *rest = _by_group(logits, num_groups)
    for group in rest:
        first = (first.unsqueeze(-1) + group.unsqueeze(-2)).flatten(-2)
    return first


def likeliest_tokens(logits: Tensor, *, num_groups: int) -> Tensor:
    """Returns the most likely tokens (...) int64 for logits (..., G k) of the groups; for G = 1, those of codes."""
    digits = [group.argmax(-1) for group in _by_group(logits, num_groups)]
    return join_digits(torch.stack(digits, dim=-1), group_size=logits.shape[-1] // num_groups)


def _by_group(logits: Tensor, num_groups: int) -> Sequence[Tensor]:
    """Returns the logits (..., k) of each group."""
    return logits.chunk(num_groups, dim=-1)


class TokenEmbedding(nn.Embedding):
    """The embedding of the ids of a vocabulary: the sum of a row for each digit of a code, or the row of another id.

    Rows: the k values of the first group, of the second one and so on, then one for each id from K on (classes, mask
    token). With one group, it is ``torch.nn.Embedding`` of the vocabulary.

    Args:
        config: Sizes of the vocabulary and of its groups.
        embed_dim: D.
    """

    def __init__(self, config: BackboneConfig, embed_dim: int) -> None:
        super().__init__(config.num_rows, embed_dim)
        self.codebook_size = config.codebook_size
        self.num_groups, self.group_size = config.num_token_groups, config.group_size

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the embeddings (..., D) of ids (...) int64 of the vocabulary."""
        if self.num_groups == 1:
            return super().forward(ids)
        is_code = (ids < self.codebook_size).unsqueeze(-1)
        codes = ids.clamp(max=self.codebook_size - 1)
        digits = split_tokens(codes, num_groups=self.num_groups, group_size=self.group_size).unbind(-1)
        embedded = super().forward(digits[0])
        for group, digit in enumerate(digits[1:], start=1):
            embedded = embedded + super().forward(digit + group * self.group_size)
        first_other = self.num_groups * self.group_size
        others = super().forward((ids - self.codebook_size).clamp(min=0) + first_other)
        return torch.where(is_code, embedded, others)


def token_logits(
    x: Tensor,
    table: Tensor,
    bias: Tensor,
    *,
    config: BackboneConfig,
    vocabulary: Vocabulary,
    project: Project = F.linear,
) -> Tensor:
    """Computes the logits of hidden states, with a table that has the rows of ``TokenEmbedding``.

    Args:
        x: (..., D) float.
        table: (rows, D) float.
        bias: (rows,) float.
        config: Sizes of the vocabulary and of its groups.
        vocabulary: Columns of the result: the K codes, the whole vocabulary, or the G k values of all groups. With
            several groups, the whole vocabulary is that of the codes.
        project: The product of hidden states and table; see ``Backbone.forward_selected``.

    Returns:
        (..., V) float.
    """
    groups, rows = config.num_token_groups, config.num_columns(vocabulary)
    logits = project(x, table[:rows], bias[:rows])
    return logits if groups == 1 or vocabulary == "groups" else compose_logits(logits, num_groups=groups)
