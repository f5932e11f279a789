"""Short training runs of stage 2 in this process: tiny data, ``fit``, and a record of each step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from maskgit_pl.data import ShardData, ShardDataConfig
from maskgit_pl.training.checkpoints import Checkpoints, FolderCheckpointIO


class Recorder(Callback):
    """A callback that records the sample ids and the exact loss of each step."""

    def __init__(self):
        self.ids, self.losses = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.ids.append(batch.index.tolist())
        if outputs:  # stage 1 optimizes by itself and returns none
            self.losses.append(float(outputs["loss"]).hex())


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
    seen = Recorder()
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, plugins=[FolderCheckpointIO()],
        callbacks=[seen, Checkpoints(folder, every_n_steps=every), *callbacks], enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, **options,
    )  # fmt: skip
    trainer.fit(module, datamodule=source, ckpt_path=resume)
    return seen
