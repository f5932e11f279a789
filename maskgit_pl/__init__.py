"""MaskGIT in PyTorch Lightning: a VQGAN tokenizer, a masked token transformer and parallel decoding.

The public names are imported when they are first used, so that ``import maskgit_pl`` and ``maskgit --help`` stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskgit_pl.decoding import AutoregressiveDecoder, ParallelDecoder
    from maskgit_pl.evaluation.demo_steps import demo
    from maskgit_pl.masking import MaskSampler
    from maskgit_pl.pipeline import MaskGIT
    from maskgit_pl.schedules import mask_schedules
    from maskgit_pl.tokenizer.config import TokenizerConfig
    from maskgit_pl.tokenizer.module import Tokenizer
    from maskgit_pl.training.optimizers import LearningRate, OptimizerConfig
    from maskgit_pl.transformer.autoregressive import AutoregressiveModel
    from maskgit_pl.transformer.config import AutoregressiveConfig, MaskedTokenConfig
    from maskgit_pl.transformer.mvtm import MaskedTokenModel

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
    "AutoregressiveConfig": "transformer.config",
    "AutoregressiveModel": "transformer.autoregressive",
    "LearningRate": "training.optimizers",
    "MaskGIT": "pipeline",
    "MaskSampler": "masking",
    "MaskedTokenConfig": "transformer.config",
    "MaskedTokenModel": "transformer.mvtm",
    "OptimizerConfig": "training.optimizers",
    "ParallelDecoder": "decoding",
    "AutoregressiveDecoder": "decoding",
    "Tokenizer": "tokenizer.module",
    "TokenizerConfig": "tokenizer.config",
    "demo": "evaluation.demo_steps",
    "mask_schedules": "schedules",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
