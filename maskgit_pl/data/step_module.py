"""The base of our data modules: their place in the data is the Trainer's step, so a run that resumes is in place."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule

from maskgit_pl.data.batches import Batch

__all__ = ["StepDataModule"]


class StepDataModule(LightningDataModule):
    """A data module that asks the Trainer for its step, rank and world size; without a Trainer 0, 0 and 1."""

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Moves a batch as it is; Lightning would search it for what can be moved."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))

    def _current_step(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_step

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank
