"""The decoding of tokens: in a few parallel steps (MaskGIT), or one token per step (the autoregressive baseline).

``ParallelDecoder`` holds a mask schedule, which sets the number of tokens that stay masked, and a token selector, which
chooses them. It knows no network: it asks a ``Predictor`` for the logits of the masked tokens. Guidance, caches and the
shared first step are predictors that wrap one another. ``AutoregressiveDecoder`` is the baseline for causal networks.
``DecodingConfig`` holds the settings in plain values.

Source: paper, section on iterative decoding; google-research/maskgit, ``parallel_decode.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from maskgit_pl.lazy_names import lazy_names

if TYPE_CHECKING:
    from maskgit_pl.decoding.autoregressive import (
        AutoregressiveClassPredictor,
        AutoregressiveDecoder,
        AutoregressivePredictor,
        decode_autoregressive,
    )
    from maskgit_pl.decoding.classes import decode_classes
    from maskgit_pl.decoding.config import AutoregressiveDecoding, DecodingConfig
    from maskgit_pl.decoding.decoder import ParallelDecoder
    from maskgit_pl.decoding.limits import check_parallel
    from maskgit_pl.decoding.noise import Noise, SeededNoise
    from maskgit_pl.decoding.predictors import (
        AutoguidedPredictor,
        ClassPredictor,
        ConditionalModel,
        ConditionalNetwork,
        FirstStepLogits,
        FirstStepPredictor,
        GuidedPredictor,
        Predictor,
        build_class_predictor,
    )
    from maskgit_pl.decoding.run import DecodingStep
    from maskgit_pl.decoding.sampling import CodeSampling
    from maskgit_pl.decoding.settings_file import SETTINGS_FORMAT, read_settings_file

__all__ = [
    "SETTINGS_FORMAT",
    "AutoguidedPredictor",
    "AutoregressiveClassPredictor",
    "AutoregressiveDecoder",
    "AutoregressiveDecoding",
    "AutoregressivePredictor",
    "ClassPredictor",
    "CodeSampling",
    "ConditionalModel",
    "ConditionalNetwork",
    "DecodingConfig",
    "DecodingStep",
    "FirstStepLogits",
    "FirstStepPredictor",
    "GuidedPredictor",
    "Noise",
    "ParallelDecoder",
    "Predictor",
    "SeededNoise",
    "build_class_predictor",
    "check_parallel",
    "decode_autoregressive",
    "decode_classes",
    "read_settings_file",
]

_NAMES = {
    "classes": ("decode_classes",),
    "config": ("AutoregressiveDecoding", "DecodingConfig"),
    "decoder": ("ParallelDecoder",),
    "run": ("DecodingStep",),
    "limits": ("check_parallel",),
    "noise": ("Noise", "SeededNoise"),
    "predictors": (
        "AutoguidedPredictor",
        "ClassPredictor",
        "ConditionalModel",
        "ConditionalNetwork",
        "FirstStepLogits",
        "FirstStepPredictor",
        "GuidedPredictor",
        "Predictor",
        "build_class_predictor",
    ),
    "settings_file": ("SETTINGS_FORMAT", "read_settings_file"),
    "sampling": ("CodeSampling",),
    "autoregressive": (
        "AutoregressiveClassPredictor",
        "AutoregressivePredictor",
        "AutoregressiveDecoder",
        "decode_autoregressive",
    ),
}

# Names are imported when they are used: ``DecodingConfig`` imports no torch, and the command line checks flags with it.
__getattr__ = lazy_names(__name__, {name: module for module, names in _NAMES.items() for name in names})
