"""The token selectors: the interface, the registry and all built-in ones.

Used by ``decoding.DecodingConfig``, by the evaluation, and by packages that add their own selector.
"""

from __future__ import annotations

from maskgit_pl.decoding.remasking_selectors import PathPlanning, Remasking, ReMDM, TokenEditing
from maskgit_pl.decoding.scoring_selectors import Confidence, EntropyBounded, Halton, Margin, Moment, Random
from maskgit_pl.decoding.token_selector import Candidates, Decided, TokenSelector, token_selectors

__all__ = [
    "Candidates",
    "Confidence",
    "Decided",
    "EntropyBounded",
    "Halton",
    "Margin",
    "Moment",
    "PathPlanning",
    "Random",
    "ReMDM",
    "Remasking",
    "TokenEditing",
    "TokenSelector",
    "token_selectors",
]
