"""The base class of the data modules ``ShardData`` and ``IndexedDataModule``.

Their position in the data is the Trainer's step, so a resumed run continues there.
"""

from __future__ import annotations

from typing import cast

import torch
from lightning.pytorch import LightningDataModule

from maskgit_pl.data.batches import Batch

__all__ = ["StepDataModule"]


class StepDataModule(LightningDataModule):
    """A data module that reads step, rank and world size from the Trainer; 0, 0 and 1 without a Trainer."""

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Lets a module of stage 2 draw the masks of a batch, while it is on the host."""
        # Lightning warns if the LightningModule has this hook.
        draw = getattr(None if self.trainer is None else self.trainer.lightning_module, "draw_on_host", None)
        return batch if draw is None else cast("Batch", draw(batch))

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Moves the tensors of a batch; Lightning's own method would search it recursively."""
        # non_blocking: copies from pinned memory overlap with computation.
        moved = {name: part.to(device, non_blocking=True) for name, part in batch._asdict().items() if part is not None}
        return Batch(**moved)

    def _current_step(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_step

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank
