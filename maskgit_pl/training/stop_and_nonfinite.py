"""Decisions that all ranks take together after each step: whether its update counts, and whether the run stops.

1. Each rank keeps the losses and sample ids of the micro-batches of a step.
2. When the step's gradients are complete, the module passes their norms to ``StepCheck.should_skip_update``.
3. The ranks exchange one tensor: stop requested, norm not finite, rank whose loss is not finite (all-reduce, maximum).
4. If a loss or a norm of any rank is not finite, no rank updates its weights. The fourth such step in a row ends the
   run; each rank writes the samples of these steps first.
5. If a signal has reached any rank, all ranks save the step when its batch ends, and stop.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from maskgit_pl import interruption
from maskgit_pl.distributed import rank_and_world
from maskgit_pl.errors import NonFiniteError, PreemptedError
from maskgit_pl.training.checkpoints import Checkpoints

__all__ = ["StepCheck", "clip_gradients"]

log = logging.getLogger(__name__)

_MOST_IN_A_ROW = 3


class StepCheck(Callback):
    """Skips updates that are not finite, and stops the run after a signal; the module calls ``should_skip_update``.

    Args:
        folder: Folder of the stage; ``nonfinite.json`` (``nonfinite-rank1.json`` ...) lists the samples of the steps
            that ended a run.
        checkpoints: Saves the run before it stops.
    """

    def __init__(self, folder: Path, checkpoints: Checkpoints) -> None:
        self.folder = folder
        self.checkpoints = checkpoints
        self._losses: list[Tensor] = []
        self._samples: list[Tensor] = []  # ids in the micro-batches of this step
        self._skipped: list[dict[str, Any]] = []  # the last steps in a row whose update was skipped
        self._stops = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.step_check = self  # type: ignore[assignment]  # both of ours have the attribute

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._samples.append(batch.index)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def should_skip_update(self, trainer: Trainer, gradient_norms: Sequence[Tensor]) -> bool:
        """Returns whether this step's update is skipped on all ranks; called on every rank, once a step.

        Args:
            trainer: The Trainer, in the middle of a step.
            gradient_norms: Scalars, gradient norm of each optimiser's parameters; see ``clip_gradients``.

        Raises:
            NonFiniteError: if more than 3 updates in a row are skipped. Raised on all ranks, after the samples of each
                step are written.
        """
        decision = _decide_together(trainer.strategy.root_device, losses=self._losses, norms=gradient_norms)
        self._stops = decision.stops
        losses, samples, self._losses, self._samples = self._losses, self._samples, [], []
        if not decision.skips:
            self._skipped = []
            return False
        self._skipped.append(
            {
                "step": trainer.global_step,
                "losses": [str(float(loss)) for loss in losses],
                "gradient_norms": [str(float(norm)) for norm in gradient_norms],
                "samples": [number for batch in samples for number in batch.tolist()],
            }
        )
        self._report_skipped(trainer, decision)
        return True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._stops:
            self._stop(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not trainer.sanity_checking and _decide_together(trainer.strategy.root_device).stops:
            self._stop(trainer)

    def _report_skipped(self, trainer: Trainer, decision: _Decision) -> None:
        where = "a gradient" if decision.worst_rank is None else f"the loss of rank {decision.worst_rank}"
        text = f"step {trainer.global_step}: {where} is not finite"
        if len(self._skipped) <= _MOST_IN_A_ROW:
            if trainer.is_global_zero:
                log.warning("%s; no rank updates its weights (%d in a row)", text, len(self._skipped))
            return
        self._list_samples(trainer.global_rank)
        raise NonFiniteError(
            f"{text}, {len(self._skipped)} steps in a row; their samples, in a file for each rank: "
            f"{self.folder / 'nonfinite*.json'}. None of them changed the weights, and the last checkpoint is sound; "
            "a lower learning rate, clipping or trainer.precision=32-true may help"
        )

    def _list_samples(self, rank: int) -> None:
        path = self.folder / ("nonfinite.json" if rank == 0 else f"nonfinite-rank{rank}.json")
        try:
            path.write_text(json.dumps(self._skipped, indent=2) + "\n")
        except OSError as error:  # the run ends for another reason
            log.warning("%s: cannot be written: %s", path, error)

    def _stop(self, trainer: Trainer) -> None:
        self.checkpoints.save(trainer, last=True)
        raise PreemptedError(
            f"asked to stop by a signal: saved step {trainer.global_step}; the same command goes on from there"
        )


class _Decision(NamedTuple):
    """The decision of all ranks.

    Attributes:
        stops: True if any rank was asked to stop.
        skips: True if any rank had a loss or a gradient that is not finite.
        worst_rank: The highest rank whose loss is not finite; None if all losses are finite.
    """

    stops: bool
    skips: bool
    worst_rank: int | None


def _decide_together(device: torch.device, *, losses: Sequence[Tensor] = (), norms: Sequence[Tensor] = ()) -> _Decision:
    """Exchanges one tensor between the ranks; every rank calls it at the same place."""
    stops = interruption.is_requested()
    rank, world_size = rank_and_world()
    if world_size > 1:
        worst = _any_nonfinite(losses, device) * (1 + rank)
        flags = torch.stack([torch.tensor(float(stops), device=device), _any_nonfinite(norms, device), worst])
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        stopped, norm, worst_rank = flags.tolist()
        return _Decision(stopped > 0, norm + worst_rank > 0, int(worst_rank) - 1 if worst_rank else None)
    if not norms:
        return _Decision(stops, skips=False, worst_rank=None)
    finite = torch.stack([*losses, *norms]).isfinite().tolist()
    return _Decision(stops, not all(finite), None if all(finite[: len(losses)]) else 0)


def _any_nonfinite(values: Sequence[Tensor], device: torch.device) -> Tensor:
    """Returns a scalar float32, 1 if any value is not finite."""
    if not values:
        return torch.zeros((), device=device)
    return 1 - torch.stack(list(values)).isfinite().all().float()


def clip_gradients(optimizer: Optimizer, max_norm: float | None) -> Tensor:
    """Scales the gradients of an optimiser's parameters down to a norm, if theirs is larger.

    Args:
        optimizer: The optimiser; parameters without a gradient are left out.
        max_norm: Largest L2 norm of all gradients together; None only computes the norm.

    Returns:
        Scalar float: the norm before scaling, over all shards; not finite if any gradient is not finite.
    """
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in trained])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return norm
