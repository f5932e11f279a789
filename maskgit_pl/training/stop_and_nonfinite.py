"""The checks after each step: skips non-finite updates, and stops the run after a signal, on all ranks together.

1. Each rank collects the losses and sample indices of the micro-batches of a step.
2. When the gradients of the step are complete, the module passes their norms to ``StepCheck.should_skip_update``.
3. The ranks exchange one tensor (all-reduce, maximum): stop requested, non-finite norm, rank with a non-finite loss.
4. If a loss or a norm of any rank is non-finite, no rank updates its weights. The fourth such step in a row ends the
   run, after each rank has written the samples of these steps.
5. If any rank has received a stop signal, all ranks save the step when its batch ends, and stop.
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

from maskgit_pl import processes
from maskgit_pl.distributed import rank_and_world
from maskgit_pl.errors import NonFiniteError, PreemptedError
from maskgit_pl.files import write_text
from maskgit_pl.training.checkpoints import Checkpoints

__all__ = ["StepCheck", "clip_gradients", "disable_sigterm_handler"]

log = logging.getLogger(__name__)

_MOST_IN_A_ROW = 3


class StepCheck(Callback):
    """A callback that skips non-finite updates and stops the run after a signal.

    The module calls ``should_skip_update``.

    Args:
        folder: Folder of the stage. If non-finite steps end a run, ``nonfinite.json`` (``nonfinite-rank1.json`` ...)
            lists their samples there.
        checkpoints: Callback that saves the run before it stops.
    """

    def __init__(self, folder: Path, checkpoints: Checkpoints) -> None:
        self.folder = folder
        self.checkpoints = checkpoints
        self._losses: list[Tensor] = []
        self._samples: list[Tensor] = []  # sample indices of each micro-batch of this step
        self._skipped: list[dict[str, Any]] = []  # the latest skipped steps in a row
        self._stops = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.step_check = self  # type: ignore[assignment]  # both modules have the attribute

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._samples.append(batch.index)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def should_skip_update(self, trainer: Trainer, gradient_norms: Sequence[Tensor]) -> bool:
        """Returns True if all ranks skip the update of this step; must be called once per step on every rank.

        Args:
            trainer: The Trainer, in the middle of a step.
            gradient_norms: Scalar float tensors, the gradient norm of each optimizer; see ``clip_gradients``.

        Raises:
            NonFiniteError: if more than 3 updates in a row are skipped. Raised on all ranks, after the samples of these
                steps are written.
        """
        decision = _decide_together(trainer.strategy.root_device, losses=self._losses, norms=gradient_norms)
        self._stops = decision.stops
        # The next micro-batch belongs to the next step.
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
        # A validation can be long, so a stop signal does not wait for its end.
        if not trainer.sanity_checking and _decide_together(trainer.strategy.root_device).stops:
            self._stop(trainer)

    def _report_skipped(self, trainer: Trainer, decision: _Decision) -> None:
        what = "gradient" if decision.worst_rank is None else f"loss on rank {decision.worst_rank}"
        text = f"step {trainer.global_step}: non-finite {what}"
        if len(self._skipped) <= _MOST_IN_A_ROW:
            if trainer.is_global_zero:
                log.warning("%s; no rank updates its weights (%d in a row)", text, len(self._skipped))
            return
        self._list_samples(trainer.global_rank)
        raise NonFiniteError(
            f"{text}, {len(self._skipped)} steps in a row. {self.folder / 'nonfinite*.json'} lists their samples, one "
            "file per rank. None of these steps changed the weights, and the last checkpoint is valid; try a lower "
            "learning rate, gradient clipping or trainer.precision=32-true"
        )

    def _list_samples(self, rank: int) -> None:
        path = self.folder / ("nonfinite.json" if rank == 0 else f"nonfinite-rank{rank}.json")
        try:
            write_text(path, json.dumps(self._skipped, indent=2) + "\n")
        except OSError as error:  # the run must end with the non-finite error, not with this one
            log.warning("%s cannot be written: %s", path, error)

    def _stop(self, trainer: Trainer) -> None:
        self.checkpoints.save(trainer, last=True)
        raise PreemptedError(
            f"stopped by a signal after saving step {trainer.global_step}; repeat the command to resume"
        )


class _Decision(NamedTuple):
    """The common decision of all ranks.

    Attributes:
        stops: True if any rank has received a stop signal.
        skips: True if any rank has a non-finite loss or gradient norm.
        worst_rank: Highest rank with a non-finite loss; None if all losses are finite.
    """

    stops: bool
    skips: bool
    worst_rank: int | None


def _decide_together(device: torch.device, *, losses: Sequence[Tensor] = (), norms: Sequence[Tensor] = ()) -> _Decision:
    """Exchanges one tensor between the ranks; every rank must call it at the same point of a step."""
    stops = processes.is_requested()
    rank, world_size = rank_and_world()
    if world_size > 1:
        # A maximum also tells which rank has a non-finite loss: 1 + rank, or 0 for none.
        worst = _any_nonfinite(losses, device) * (1 + rank)
        flags = torch.stack([torch.tensor(float(stops), device=device), _any_nonfinite(norms, device), worst])
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        stopped, norm, worst_rank = flags.tolist()
        return _Decision(stopped > 0, norm + worst_rank > 0, int(worst_rank) - 1 if worst_rank else None)
    if not norms:  # in validation, where no update is at stake
        return _Decision(stops, skips=False, worst_rank=None)
    # One transfer to the CPU for all values.
    finite = torch.stack([*losses, *norms]).isfinite().tolist()
    return _Decision(stops, not all(finite), None if all(finite[: len(losses)]) else 0)


def _any_nonfinite(values: Sequence[Tensor], device: torch.device) -> Tensor:
    """Returns a scalar float32 tensor: 1 if any value is non-finite, else 0."""
    if not values:
        return torch.zeros((), device=device)
    return 1 - torch.stack(list(values)).isfinite().all().float()


def disable_sigterm_handler(trainer: Trainer) -> None:
    """Leaves signals to the handlers of this process.

    Lightning's handler of SIGTERM talks to other ranks, its broadcast before each micro-batch waits for the device, and
    a process without ranks would end as by an internal error.
    """
    trainer._signal_connector.register_signal_handlers = _do_nothing  # type: ignore[method-assign]  # its own
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _do_nothing  # type: ignore[method-assign]  # its own


def _do_nothing() -> None:
    pass


def clip_gradients(optimizer: Optimizer, max_norm: float | None) -> Tensor:
    """Scales the gradients of an optimizer down to a maximum norm.

    Args:
        optimizer: Optimizer whose parameters are clipped. Parameters without a gradient are ignored.
        max_norm: Maximum L2 norm of all gradients together, > 0; None only computes the norm.

    Returns:
        Scalar float tensor: the norm before clipping, over all shards. It is non-finite if any gradient is.
    """
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in trained])
    if isinstance(norm, DTensor):  # FSDP2: the norm over the shards of all ranks
        norm = norm.full_tensor()
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return norm
