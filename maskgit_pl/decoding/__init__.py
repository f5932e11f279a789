"""Decoding: from masked tokens to tokens in a few parallel steps, step by step; and one token after the other.

``ParallelDecoder`` holds a mask schedule (how many tokens stay masked) and a token selector (which). It knows no
network: it asks a ``Predictor`` for logits at the positions that are still masked. Guidance, the sharing of the first
step and caches live in predictors that wrap one another. ``SequentialDecoder`` is its baseline, for causal networks.
``DecodingConfig`` says all of it in plain values.

Source: paper, section on iterative decoding; google-research/maskgit, ``parallel_decode.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from maskgit_pl.lazy_names import lazy_names

if TYPE_CHECKING:
    from maskgit_pl.decoding.classes import decode_classes
    from maskgit_pl.decoding.config import RASTER, DecodingConfig, SequentialDecoding
    from maskgit_pl.decoding.decoder import DecodingStep, ParallelDecoder
    from maskgit_pl.decoding.limits import check_parallel
    from maskgit_pl.decoding.noise import Noise, SeededNoise
    from maskgit_pl.decoding.predictors import (
        CachedPredictor,
        CachingNetwork,
        ClassPredictor,
        ConditionalModel,
        ConditionalNetwork,
        FirstStepLogits,
        FirstStepPredictor,
        GuidedPredictor,
        Predictor,
        class_predictor,
    )
    from maskgit_pl.decoding.recipe_file import RECIPE_FORMAT, read_recipe
    from maskgit_pl.decoding.sampling import CodeSampling
    from maskgit_pl.decoding.sequential import ClassNextPredictor, NextPredictor, SequentialDecoder, decode_in_order

__all__ = [
    "RASTER",
    "RECIPE_FORMAT",
    "CachedPredictor",
    "CachingNetwork",
    "ClassNextPredictor",
    "ClassPredictor",
    "CodeSampling",
    "ConditionalModel",
    "ConditionalNetwork",
    "DecodingConfig",
    "DecodingStep",
    "FirstStepLogits",
    "FirstStepPredictor",
    "GuidedPredictor",
    "NextPredictor",
    "Noise",
    "ParallelDecoder",
    "Predictor",
    "SeededNoise",
    "SequentialDecoder",
    "SequentialDecoding",
    "check_parallel",
    "class_predictor",
    "decode_classes",
    "decode_in_order",
    "read_recipe",
]

_NAMES = {
    "classes": ("decode_classes",),
    "config": ("RASTER", "DecodingConfig", "SequentialDecoding"),
    "decoder": ("DecodingStep", "ParallelDecoder"),
    "limits": ("check_parallel",),
    "noise": ("Noise", "SeededNoise"),
    "predictors": (
        "CachedPredictor",
        "CachingNetwork",
        "ClassPredictor",
        "ConditionalModel",
        "ConditionalNetwork",
        "FirstStepLogits",
        "FirstStepPredictor",
        "GuidedPredictor",
        "Predictor",
        "class_predictor",
    ),
    "recipe_file": ("RECIPE_FORMAT", "read_recipe"),
    "sampling": ("CodeSampling",),
    "sequential": ("ClassNextPredictor", "NextPredictor", "SequentialDecoder", "decode_in_order"),
}

# ``DecodingConfig`` needs no torch, and the command line checks with it.
__getattr__ = lazy_names(__name__, {name: module for module, names in _NAMES.items() for name in names})
