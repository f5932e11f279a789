"""``OptimizedModel``: how both models of stage 2 are optimized. Base class of ``training.token_model.TokenModel``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from maskgit_pl.networks.backbone import Backbone
from maskgit_pl.training.ema import update_ema
from maskgit_pl.training.optimizers import build_optimizer, parameter_groups
from maskgit_pl.training.stop_and_nonfinite import StepCheck, clip_gradients
from maskgit_pl.training.strategies import check_precision, shard_blocks
from maskgit_pl.training.token_model_config import TokenModelConfig

__all__ = ["OptimizedModel"]


class OptimizedModel(LightningModule):
    """The optimizer, the clipping of gradients, the averaged weights and FSDP2 of a transformer.

    Attributes:
        config: Configuration of the model.
        transformer: The network that trains.
        ema_network: The averaged network; None without averages.
        step_check: Set by a callback; without it no update is skipped.
    """

    config: TokenModelConfig
    transformer: Backbone
    ema_network: Backbone | None
    step_check: StepCheck | None = None
    _skips_update = False

    def configure_model(self) -> None:
        """Checks the precision, and shards the networks block by block under FSDP2.

        The token embedding, which is tied to the output layer, stays in the root group.

        Raises:
            ValueError: if the stage does not support the Trainer's precision.
        """
        check_precision(self.trainer.precision)
        if self.device_mesh is None:
            return
        mesh = self.device_mesh["data_parallel"]
        shard_blocks(self.transformer, self.transformer.blocks, mesh, precision=self.trainer.precision)
        if self.ema_network is not None:  # it samples and is evaluated in float32, without mixed precision
            shard_blocks(self.ema_network, self.ema_network.blocks, mesh, precision="32-true")

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Builds the optimizer and its learning rate schedule, which advances with each step."""
        config = self.config.optimizer
        groups = parameter_groups(self.transformer, config.weight_decay, prefix="transformer.")
        optimizer = build_optimizer(groups, config)
        max_steps = int(self.trainer.max_steps)
        scheduler = LambdaLR(optimizer, lambda step: config.learning_rate.factor(step, max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Sets the learning rate of the first step: a resumed run may have another decay or number of steps."""
        rate = self.config.optimizer.learning_rate
        factor = rate.factor(self.trainer.global_step, int(self.trainer.max_steps))
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the gradient norm if the Trainer has a limit. All ranks skip the step if one has a non-finite norm.

        Raises:
            ValueError: if the algorithm is not ``norm``.
        """
        if gradient_clip_algorithm not in (None, "norm"):
            raise ValueError(f"trainer.gradient_clip_algorithm must be 'norm', got {gradient_clip_algorithm!r}")
        # 7. Clip, and vote.
        norm = clip_gradients(optimizer, gradient_clip_val)
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # set late
            self._log_metrics({"train/gradient_norm": float(norm)}, self.trainer.global_step + 1)
        self._skips_update = self.step_check is not None and self.step_check.should_skip_update(self.trainer, [norm])
        if self._skips_update:
            optimizer.zero_grad()  # without gradients the step changes neither weights nor moments

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Does nothing: ``optimizer_step`` leaves no gradients."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Optimizer | Any, *args: Any, **kwargs: Any) -> None:
        """Runs Lightning's closure (forward and backward pass), the optimizer step, and the update of the average."""
        # 8. Step, free, average.
        super().optimizer_step(epoch, batch_idx, optimizer, *args, **kwargs)
        optimizer.zero_grad()  # Lightning would keep the gradients in memory through the next forward pass
        if self.ema_network is not None and not self._skips_update:
            step = self.trainer.global_step  # the current step is not counted yet
            update_ema(self.ema_network, self.transformer, decay=self.config.ema_decay, step=step)

    def _log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Writes metrics to all loggers; ``step`` counts finished steps."""
        for logger in self.loggers:
            logger.log_metrics(metrics, step=step)
