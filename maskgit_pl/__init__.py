"""MaskGIT in PyTorch Lightning: a VQGAN tokenizer, a masked token transformer and parallel decoding.

The public names are imported when they are first used, so that ``import maskgit_pl`` and ``maskgit --help`` stay fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from maskgit_pl.registry import lazy_names

if TYPE_CHECKING:
    from maskgit_pl.autoregressive import AutoregressiveConfig, AutoregressiveModel
    from maskgit_pl.decoding import AutoregressiveDecoder, ParallelDecoder
    from maskgit_pl.evaluation.demo_steps import demo
    from maskgit_pl.masking import MaskSampler
    from maskgit_pl.mvtm import MaskedTokenConfig, MaskedTokenModel
    from maskgit_pl.pipeline import MaskGIT
    from maskgit_pl.schedules import mask_schedules
    from maskgit_pl.tokenizer import Tokenizer
    from maskgit_pl.training.optimizers import LearningRate, OptimizerConfig
    from maskgit_pl.training.tokenizer_losses import TokenizerConfig

__version__ = "0.2.0"
__all__ = [
    "AutoregressiveConfig",
    "AutoregressiveDecoder",
    "AutoregressiveModel",
    "LearningRate",
    "MaskGIT",
    "MaskSampler",
    "MaskedTokenConfig",
    "MaskedTokenModel",
    "OptimizerConfig",
    "ParallelDecoder",
    "Tokenizer",
    "TokenizerConfig",
    "demo",
    "mask_schedules",
]

_HOMES = {
    "autoregressive": ("AutoregressiveConfig", "AutoregressiveModel"),
    "decoding": ("AutoregressiveDecoder", "ParallelDecoder"),
    "evaluation.demo_steps": ("demo",),
    "masking": ("MaskSampler",),
    "mvtm": ("MaskedTokenConfig", "MaskedTokenModel"),
    "pipeline": ("MaskGIT",),
    "schedules": ("mask_schedules",),
    "tokenizer": ("Tokenizer",),
    "training.optimizers": ("LearningRate", "OptimizerConfig"),
    "training.tokenizer_losses": ("TokenizerConfig",),
}

__getattr__ = lazy_names(__name__, {name: module for module, names in _HOMES.items() for name in names})
