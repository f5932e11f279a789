"""The early end of a training, on all ranks together: a signal, non-finite losses, a hang, an error of one rank.

``StepCheck``, after each step:

1. Each rank collects the losses of the micro-batches of a step.
2. When the gradients of the step are complete, the module passes their norms to ``StepCheck.should_skip_update``.
3. The ranks exchange one tensor (all-reduce, maximum): stop requested, non-finite norm, rank with a non-finite loss.
4. If a loss or a norm of any rank is non-finite, no rank updates its weights. The fourth such step in a row
   ends the run.
5. If any rank has received a stop signal, all ranks save the step when its batch ends, and stop.

``Watchdog``: ranks wait for each other in collectives, so a rank never ends without the others:

1. A thread checks once per second for a finished micro-batch, validation batch or checkpoint. After a time
   without progress that exceeds the limit, it writes the stacks of all threads and ends the process.
2. An error on which all ranks agree (a signal, non-finite losses) is raised on rank 0. The other ranks exit
   silently with the same exit code.
3. A rank with any other error prints it and exits with its exit code, without cleanup, which would wait for
   the other ranks. Their collectives then fail: with gloo immediately, with NCCL after its timeout, so that
   the launcher (``torchrun``, ``srun --wait``) or the watchdog ends them first.
4. If Lightning's own launcher has started the ranks of this machine, the first process exits with the code of
   a rank that has ended with an error, and the other ranks exit when the first process has ended.

With a single process, an error is only raised, so that a notebook keeps its kernel.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from maskgit_pl import processes
from maskgit_pl.distributed import max_over_ranks
from maskgit_pl.errors import INTERNAL_ERROR, NonFiniteError, PreemptedError, RunError, describe_error, exit_code_of
from maskgit_pl.training.checkpoints import Checkpoints

log = logging.getLogger(__name__)

_MOST_IN_A_ROW = 3


class StepCheck(Callback):
    """A callback that skips non-finite updates and stops the run after a signal.

    The module calls ``should_skip_update``.

    Args:
        checkpoints: Callback that saves the run before it stops.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self._losses: list[Tensor] = []  # of the micro-batches of this step
        self._skipped_in_a_row = 0
        self._stops = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.step_check = self  # type: ignore[assignment]  # both modules have the attribute

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def should_skip_update(self, trainer: Trainer, gradient_norms: Sequence[Tensor]) -> bool:
        """Returns True if all ranks skip the update of this step; must be called once per step on every rank.

        ``gradient_norms`` are scalar float tensors, one of each optimizer; see ``clip_gradients``.
        """
        # The next micro-batch belongs to the next step.
        losses, self._losses = self._losses, []
        # A maximum also tells which rank has a non-finite loss: 1 + rank, or 0 for none.
        worst_rank = _has_nonfinite(losses) * (1 + trainer.global_rank)
        stops = torch.full_like(worst_rank, float(processes.is_requested()))
        votes = max_over_ranks(torch.stack([stops, _has_nonfinite(gradient_norms), worst_rank])).tolist()
        self._stops, wrong_norm, wrong_loss = bool(votes[0]), bool(votes[1]), int(votes[2])
        if not wrong_norm and not wrong_loss:
            self._skipped_in_a_row = 0
            return False
        self._skipped_in_a_row += 1
        what = f"loss on rank {wrong_loss - 1}" if wrong_loss else "gradient"
        text = f"step {trainer.global_step}: non-finite {what}"
        if self._skipped_in_a_row > _MOST_IN_A_ROW:
            raise NonFiniteError(
                f"{text}, {self._skipped_in_a_row} steps in a row. None of them changed the weights, and the last "
                "checkpoint is valid; try a lower learning rate, gradient clipping or trainer.precision=32-true"
            )
        if trainer.is_global_zero:
            log.warning("%s; no rank updates its weights (%d in a row)", text, self._skipped_in_a_row)
        return True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._stops:
            self._stop(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.sanity_checking:
            return
        # A validation can be long, so a stop signal does not wait for its end.
        if trainer.strategy.reduce_boolean_decision(processes.is_requested(), all=False):
            self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        self.checkpoints.save(trainer, last=True)
        raise PreemptedError(
            f"stopped by a signal after saving step {trainer.global_step}; repeat the command to resume"
        )


def _has_nonfinite(values: Sequence[Tensor]) -> Tensor:
    """Returns a scalar float32 tensor: 1 if any of the scalars is non-finite, else 0."""
    return 1 - torch.stack(list(values)).isfinite().all().float()


def disable_sigterm_handler(trainer: Trainer) -> None:
    """Leaves signals to the handlers of this process.

    Lightning's handler of SIGTERM talks to other ranks, its broadcast before each micro-batch waits for the
    device, and a process without ranks would end as by an internal error.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]  # its own
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]  # its own


def clip_gradients(optimizer: Optimizer, max_norm: float | None) -> Tensor:
    """Scales the gradients of an optimizer down to a maximum L2 norm of all together; None only computes the norm.

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


_TICK_SECONDS = 1.0
_MEDIANS = 20  # limit of a training step, in median step times
_MIN_STEPS = 5  # steps before the median is used
# Set-up, validation, saving and export have no median. Their limit is this many times ``seconds``: 30 min by default.
_OTHER_PHASES = 18
_GRACE_SECONDS = 3.0  # from the stacks of one rank to its end, so that the other ranks write theirs, too
_REPORT_SECONDS = 30.0  # time limit for writing the stacks
_MOST_BYTES = 1 << 24  # of the stacks


class Watchdog(Callback):
    """A callback that ends the process if the run makes no progress, or if another rank has ended; see the module.

    The limit in training is max(``seconds``, 20 x the median step); with gradient accumulation, a step here
    is a micro-batch. The limit is 18 x ``seconds`` during set-up, validation, saving, export and cleanup, and
    in the first steps. Time in which the process is stopped (SIGSTOP) does not count.

    After a hang, each rank writes the stacks of all its threads to ``stacks.txt`` (``stacks-rank1.txt`` ...)
    in the folder of the stage, and to stderr.

    Args:
        folder: Folder of the stage.
        seconds: Shortest limit in seconds, > 0.
    """

    def __init__(self, folder: Path, *, seconds: float = 100.0) -> None:
        self.folder = folder
        self.seconds = seconds
        self._step_seconds: deque[float] = deque(maxlen=50)
        self._last_batch_end = time.monotonic()
        self._idle_ticks = 0  # not a clock, which would also run while the process is stopped
        self._phase = "set-up"
        self._children: list[subprocess.Popen[bytes]] = []  # the other ranks, if Lightning's launcher started them
        self._error: BaseException | None = None

    @property
    def limit(self) -> float:
        """The time limit without progress in the current phase, in seconds."""
        if self._phase == "training" and len(self._step_seconds) >= _MIN_STEPS:
            return max(self.seconds, _MEDIANS * statistics.median(self._step_seconds))
        return self.longest_limit

    @property
    def longest_limit(self) -> float:
        """The time limit in seconds of the phases without a median; ranks wait for each other up to this long."""
        return _OTHER_PHASES * self.seconds

    @contextmanager
    def watch(self, trainer: Trainer) -> Iterator[None]:
        """Watches the fit and the export inside the context, and exits as the module describes if they fail."""
        is_done = threading.Event()
        thread = threading.Thread(target=self._run, args=(trainer, is_done), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        except BaseException as error:
            self._report(trainer, error)
            self._exit_unless_raised(trainer, error)
            raise
        finally:
            is_done.set()
            thread.join(_TICK_SECONDS)  # it holds the Trainer, whose memory is freed next

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._note_progress("set-up")
        self._adopt_children(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        now = time.monotonic()
        if self._phase == "training":
            self._step_seconds.append(now - self._last_batch_end)
        self._last_batch_end = now
        self._note_progress("training")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note_progress("validation")

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._note_progress("validation")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._note_progress("saving")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note_progress("export")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._note_progress("cleanup")
        self._report(trainer, exception)  # before Lightning's cleanup, which may wait for the other ranks

    def _adopt_children(self, trainer: Trainer) -> None:
        """Takes over the ranks that Lightning's launcher has started from its observer, which ends with an empty list.

        The observer would kill this process as soon as another one has ended.
        """
        started = getattr(trainer.strategy.launcher, "procs", [])
        while started:
            self._children.append(started.pop(0))

    def _note_progress(self, phase: str) -> None:
        self._phase, self._idle_ticks = phase, 0

    def _run(self, trainer: Trainer, is_done: threading.Event) -> None:
        """Checks for progress and for ended processes once per tick; runs in the watchdog thread."""
        environment = getattr(trainer.strategy, "cluster_environment", None)
        is_child = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
        parent = os.getppid()
        while not is_done.wait(_TICK_SECONDS):
            self._idle_ticks += 1
            self._adopt_children(trainer)
            if self._idle_ticks * _TICK_SECONDS > self.limit:
                self._exit_after_hang(trainer)
            if self._error is not None:  # the main thread exits
                continue
            if is_child and os.getppid() != parent:
                os._exit(INTERNAL_ERROR)
            for rank, child in enumerate(self._children, start=trainer.global_rank + 1):
                if code := child.poll():  # None while it runs
                    self._kill_children()
                    _write(f"maskgit train: rank {rank} (process {child.pid}) ended with {code}\n")
                    os._exit(code if code > 0 else INTERNAL_ERROR)

    def _exit_after_hang(self, trainer: Trainer) -> None:
        # A write to a pipe that no process reads, or to a file system that does not answer, blocks.
        limit = threading.Timer(_REPORT_SECONDS, os._exit, (INTERNAL_ERROR,))
        limit.daemon = True
        limit.start()
        rank = trainer.global_rank
        path = self.folder / ("stacks.txt" if rank == 0 else f"stacks-rank{rank}.txt")
        memory = os.memfd_create("stacks")  # faulthandler holds the GIL: a write that blocks would stop the timer, too
        faulthandler.dump_traceback(memory)
        stacks = os.pread(memory, _MOST_BYTES, 0).decode()
        with suppress(OSError):  # a full disk must not keep the process alive
            path.write_text(stacks)
        _write(
            f"hang, rank {rank}: {self._phase}: no progress for {self.limit:.0f} s after step {trainer.global_step} "
            f"(limit: {_MEDIANS} x the median step, at least {self.seconds:.0f} s); stacks: {path}\n{stacks}"
        )
        time.sleep(_GRACE_SECONDS)
        self._kill_children()
        os._exit(INTERNAL_ERROR)

    def _report(self, trainer: Trainer, error: BaseException) -> None:
        """Prints an error that only this rank has, once."""
        if error is self._error:
            return
        is_of_collective = trainer.world_size > 1 and _is_of_collective(error)
        if is_of_collective and self._children:
            time.sleep(2 * _TICK_SECONDS)  # the watchdog exits with the code of the rank that has ended
        self._error = error
        if is_of_collective:
            where, text = f"rank {trainer.global_rank}, step {trainer.global_step}", " ".join(str(error).split())
            reason = "another rank has ended, or the network is down; the first error in the logs is the cause"
            _write(f"maskgit train: {where}: {reason} ({text})\n")
        elif trainer.world_size > 1 and isinstance(error, Exception) and not _is_shared(error):
            _write(describe_error(error, "maskgit train"))

    def _exit_unless_raised(self, trainer: Trainer, error: BaseException) -> None:
        """Exits after an error, unless this rank raises it."""
        if _is_shared(error):
            if not trainer.is_global_zero:
                sys.exit(exit_code_of(error))
            return
        self._kill_children()
        if trainer.world_size > 1 and isinstance(error, Exception):
            with suppress(OSError):
                sys.stdout.flush()
            os._exit(exit_code_of(error))

    def _kill_children(self) -> None:
        for child in self._children:
            child.kill()


def _is_shared(error: BaseException) -> bool:
    """Returns True if all ranks raise the error together."""
    return isinstance(error, RunError) and error.on_all_ranks


def _is_of_collective(error: BaseException) -> bool:
    """Returns True if a collective has failed: gloo raises RuntimeError with its own source file in the text."""
    if isinstance(error, RunError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistBackendError) or "gloo" in str(error)


def _write(text: str) -> None:
    """Writes to stderr without Python's stream, whose lock the main thread may hold."""
    with suppress(OSError):  # a full disk must not keep the process alive
        os.write(2, text.encode())
