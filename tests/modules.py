"""Builds LightningModules of both stages for tests: small networks, the released betas and weight decay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskgit_pl.autoregressive import AutoregressiveConfig, AutoregressiveModel
from maskgit_pl.data.batches import Batch
from maskgit_pl.mvtm import MaskedTokenConfig, MaskedTokenModel
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.tokenizer import Tokenizer
from maskgit_pl.training.optimizers import LearningRate, OptimizerConfig
from maskgit_pl.training.token_model import StepLosses, TokenModel
from maskgit_pl.training.tokenizer_losses import TokenizerConfig

RATE = LearningRate(1e-3)


def tokenizer_model(
    network: VQGANConfig,
    *,
    rate: LearningRate = RATE,
    algorithm: str | dict[str, Any] = "adamw",
    accumulation: int = 1,
    **options: Any,
) -> Tokenizer:
    """Builds a module of stage 1; ``options`` are fields of ``TokenizerConfig``."""
    optimizer = OptimizerConfig(rate, betas=(0.0, 0.99), weight_decay=0.0, algorithm=algorithm)
    return Tokenizer(TokenizerConfig(network=network, optimizer=optimizer, **options), accumulation=accumulation)


def masked_model(
    network: TransformerConfig,
    tokenizer: Path | str,
    *,
    rate: LearningRate = RATE,
    algorithm: str | dict[str, Any] = "adamw",
    **options: Any,
) -> MaskedTokenModel:
    """Builds a module of stage 2; ``options`` are fields of ``MaskedTokenConfig``."""
    optimizer = OptimizerConfig(rate, betas=(0.9, 0.96), weight_decay=0.045, algorithm=algorithm)
    return MaskedTokenModel(MaskedTokenConfig(network, optimizer, str(tokenizer), **{"global_batch": 8, **options}))


def autoregressive_model(
    network: TransformerConfig, tokenizer: Path | str, *, rate: LearningRate = RATE, **options: Any
) -> AutoregressiveModel:
    """Builds a module of the autoregressive baseline; ``options`` are fields of ``AutoregressiveConfig``."""
    optimizer = OptimizerConfig(rate, betas=(0.9, 0.96), weight_decay=0.045)
    return AutoregressiveModel(AutoregressiveConfig(network, optimizer, str(tokenizer), **options))


def losses_of_step(module: TokenModel, batch: Batch) -> StepLosses:
    """Computes steps 5 and 6 of a batch of tokens that has its draws."""
    tokens = seen = batch.content
    if isinstance(module, MaskedTokenModel) and module.corruption is not None:
        seen = module._corrupt(batch, tokens)
    return module._run_step(batch._replace(content=seen), tokens)
