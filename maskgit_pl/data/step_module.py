"""The base class of the data modules ``ShardData`` and ``IndexedDataModule``.

Their position in the data is the Trainer's step, so a resumed run continues there.
"""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule

from maskgit_pl.data.batches import Batch

__all__ = ["StepDataModule"]


class StepDataModule(LightningDataModule):
    """A data module that reads step, rank and world size from the Trainer; 0, 0 and 1 without a Trainer."""

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Moves the tensors of a batch; Lightning's own method would search it recursively."""
        # non_blocking: copies from pinned memory overlap with computation.
        moved = {
            name: tensor.to(device, non_blocking=True) for name, tensor in batch._asdict().items() if tensor is not None
        }
        return Batch(**moved)

    def _current_step(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_step

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank
