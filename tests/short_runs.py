"""Small LightningModules of both stages with the released betas and weight decay, and short runs in this process."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from maskgit_pl.data import Batch, ShardData, ShardDataConfig
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.tokenizer.module import Tokenizer, TokenizerConfig
from maskgit_pl.training.checkpoints import Checkpoints, FolderCheckpointIO
from maskgit_pl.training.optimizers import LearningRate, OptimizerConfig
from maskgit_pl.transformer.autoregressive import AutoregressiveConfig, AutoregressiveModel
from maskgit_pl.transformer.mvtm import MaskedTokenConfig, MaskedTokenModel

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


def replay_step(module: Tokenizer, batch: Batch, *, step: int) -> dict[str, Tensor]:
    """Adds the gradients of a micro-batch of stage 1, the first of a step, without a Trainer; returns its losses."""
    pending, module._pending = module._pending, type(module._pending)()
    images = module.prepare_images(batch, flip_probability=0.0)
    metrics = module.add_gradients(images, step=step, backward=torch.autograd.backward)
    module._pending = pending
    return metrics


class Recorder(Callback):
    """A callback that records the sample ids and the exact loss of each step."""

    def __init__(self):
        self.ids, self.losses = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.ids.append(batch.index.tolist())
        if outputs:  # stage 1 optimizes by itself and returns none
            self.losses.append(float(outputs["loss"]).hex())


def tiny_module(kind: str, tokenizer: Path | str = "", *, quantizer: str = "ema", dropout: float = 0.0, **options: Any):
    """Builds a module of a kind of recipe for images of 8 px, with weights of seed 0."""
    torch.manual_seed(0)
    if kind == "tokenizer":
        network = VQGANConfig(
            1, base_channels=8, channel_multipliers=(1,), num_res_blocks=1, num_middle_blocks=0, num_groups=4,
            codebook_size=16, code_dim=4, patch_size=2, quantizer=quantizer,
        )  # fmt: skip
        return tokenizer_model(network, image_size=8, **options)
    attention = "causal" if kind == "autoregressive" else "bidirectional"
    config = TransformerConfig(
        16, 3, (4, 4), embed_dim=16, depth=1, num_heads=2, mlp_dim=32, dropout=dropout, attention=attention
    )
    return (autoregressive_model if kind == "autoregressive" else masked_model)(config, tokenizer, **options)


def data(shards: Path, store: Path | None = None, **options: Any) -> ShardData:
    """Builds a data module with global batches of 8 tiny images, or of their tokens in a store."""
    source = "images" if store is None else "tokens"
    sizes = {"image_size": 8, "in_channels": 1, "global_batch": 8, "max_batch_per_device": 8, "validation_batch": 8}
    return ShardData(
        ShardDataConfig(str(shards), source=source, token_store=store and str(store), **{**sizes, **options})
    )


def fit(
    module: LightningModule,
    source: ShardData,
    *,
    steps: int,
    folder: Path,
    resume: Path | None = None,
    every: int = 100,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> Recorder:
    """Trains up to ``steps`` with checkpoints in a folder; ``options`` are arguments of the Trainer."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seen, has_checkpoints = Recorder(), any(isinstance(callback, Checkpoints) for callback in callbacks)
    checkpoints = [] if has_checkpoints else [Checkpoints(folder, every_n_steps=every)]
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", plugins=[FolderCheckpointIO()],
        callbacks=[seen, *checkpoints, *callbacks], enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, **{"logger": False, **options},
    )  # fmt: skip
    trainer.fit(module, datamodule=source, ckpt_path=resume)
    return seen


def assert_equal(found: object, expected: object) -> None:
    """Asserts that nested mappings and sequences are bit-exact, with the same types."""
    leaves, others = (dict(tree_flatten_with_path(tree)[0]) for tree in (found, expected))
    assert leaves.keys() == others.keys()
    for path, leaf in leaves.items():
        other = others[path]
        equal = torch.equal(leaf, other) if isinstance(leaf, Tensor) else leaf == other
        assert equal, keystr(path)
        assert getattr(leaf, "dtype", type(leaf)) == getattr(other, "dtype", type(other)), keystr(path)
