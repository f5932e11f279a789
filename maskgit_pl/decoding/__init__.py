"""The decoding of tokens: in a few parallel steps (MaskGIT), or one token per step (the autoregressive baseline).

``ParallelDecoder`` holds a mask schedule, which sets the number of tokens that stay masked, and a token selector, which
chooses them. It knows no network: it asks a ``Predictor`` for the logits of the masked tokens. Guidance, caches and the
shared first step are predictors that wrap one another. ``AutoregressiveDecoder`` is the baseline for causal networks.
``DecodingConfig`` holds the settings in plain values.

Source: paper, section on iterative decoding; google-research/maskgit, ``parallel_decode.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from maskgit_pl.registry import lazy_names

if TYPE_CHECKING:
    from maskgit_pl.decoding.autoregressive import AutoregressiveDecoder, decode_autoregressive
    from maskgit_pl.decoding.config import DecodingConfig
    from maskgit_pl.decoding.decoder import DecodingStep, ParallelDecoder, SeededNoise, decode_classes
    from maskgit_pl.decoding.predictors import ConditionalModel, FirstStepLogits

__all__ = [
    "AutoregressiveDecoder",
    "ConditionalModel",
    "DecodingConfig",
    "DecodingStep",
    "FirstStepLogits",
    "ParallelDecoder",
    "SeededNoise",
    "decode_autoregressive",
    "decode_classes",
]

# Names are imported when they are used: ``DecodingConfig`` imports no torch, and the command line checks flags with it.
_HOMES = {
    "autoregressive": ("AutoregressiveDecoder", "decode_autoregressive"),
    "config": ("DecodingConfig",),
    "decoder": ("DecodingStep", "ParallelDecoder", "SeededNoise", "decode_classes"),
    "predictors": ("ConditionalModel", "FirstStepLogits"),
}

__getattr__ = lazy_names(__name__, {name: module for module, names in _HOMES.items() for name in names})
