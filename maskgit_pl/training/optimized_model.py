"""The base of both models of stage 2: their common configuration, its checks, and their optimization.

``training.token_model.TokenModel`` extends ``OptimizedModel`` by the training step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, Literal, get_args

from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from pydantic import BeforeValidator
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from maskgit_pl.checks import check_choice, check_number, check_seed, height_width
from maskgit_pl.data.batches import Batch, check_batch
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.networks.backbone import Backbone, BackboneConfig, Vocabulary, read_config_values
from maskgit_pl.pipeline.fine_tuning import PretrainedTokenizer
from maskgit_pl.training.checkpoints import CheckpointedModule
from maskgit_pl.training.optimizers import OptimizerConfig, build_optimizer, parameter_groups, update_ema
from maskgit_pl.training.stopping import StepCheck, clip_gradients
from maskgit_pl.training.strategies import ActivationCheckpointing, Compiled, check_precision, shard_blocks

__all__ = [
    "LossVocabulary",
    "OptimizedModel",
    "TokenModelConfig",
    "check_decoding",
    "check_samples",
    "check_tokenizer",
]

LossVocabulary = Literal["codes", "all"]


@dataclass(frozen=True)
class TokenModelConfig:
    """The common fields of both models' configurations, which document them."""

    network: Annotated[BackboneConfig, BeforeValidator(read_config_values)]
    optimizer: OptimizerConfig
    tokenizer: str
    _: KW_ONLY
    label_smoothing: float = 0.1
    loss_vocabulary: LossVocabulary = "all"
    ema_decay: float = 0.999
    flip_probability: float = 0.0
    seed: int = 0
    activation_checkpointing: ActivationCheckpointing = "none"
    compiled: Compiled = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokenizer", str(self.tokenizer))  # a Path is no plain value
        check_number("label_smoothing", self.label_smoothing, "[0, 1)")
        check_choice("loss_vocabulary", self.loss_vocabulary, get_args(LossVocabulary))
        check_number("ema_decay", self.ema_decay, "[0, 1)")
        check_number("flip_probability", self.flip_probability, "[0, 1]")
        check_seed("seed", self.seed)
        check_choice("activation_checkpointing", self.activation_checkpointing, get_args(ActivationCheckpointing))
        check_choice("compiled", self.compiled, get_args(Compiled))

    @property
    def loss_columns(self) -> Vocabulary:
        """The columns of the logits of the loss: ``loss_vocabulary``, or those of the token groups if there are any."""
        return self.network.loss_columns(self.loss_vocabulary)


def check_decoding(decoding: DecodingConfig, network: BackboneConfig, *, is_autoregressive: bool) -> None:
    """Checks that a network supports decoding settings.

    Raises:
        ValueError: if there are more steps than tokens, a name is unknown, an autoregressive model does not support a
            setting, or guidance is set without a null class.
    """
    try:
        decoding.check(network.num_tokens, is_autoregressive=is_autoregressive)
    except ValueError as error:
        raise ValueError(f"decoding: {error}") from error
    if any(decoding.scales()) and network.null_label is None:
        raise ValueError(
            f"decoding.guidance must have scale 0 for a network without a null class, got {decoding.guidance!r} with "
            "class_dropout 0; set model.network.class_dropout above 0 or model.decoding.guidance to constant"
        )


def check_tokenizer(config: BackboneConfig, tokenizer: PretrainedTokenizer) -> None:
    """Checks that a transformer has the codebook size and the grid of a tokenizer.

    Raises:
        ValueError: if it does not. The message has both values and the recipe key.
    """
    pairs = (
        ("codebook_size", config.codebook_size, tokenizer.network.config.codebook_size),
        ("grid", config.grid, tokenizer.grid),
    )
    for name, wanted, has in pairs:
        if wanted != has:
            raise ValueError(
                f"model.network.{name} must be {has}, that of the tokenizer, got {wanted}; leave the key out, or name "
                "another tokenizer"
            )


def check_samples(batch: Batch, config: BackboneConfig, tokenizer: Callable[[], PretrainedTokenizer]) -> None:
    """Checks that the samples of a batch are those of a transformer.

    Labels are checked because the rows of the embedding before and after those of the classes are codes, the null class
    and the mask token.

    Args:
        batch: The batch that the Trainer passes.
        config: Sizes of the transformer.
        tokenizer: Returns the tokenizer of images.

    Raises:
        TypeError: if the batch comes from no data module of ``maskgit_pl.data``.
        ValueError: if the samples have another shape, or a label is no class of the transformer.
    """
    if isinstance(batch, Batch) and batch.content.ndim == 4:
        found = tokenizer()
        check_batch(batch, shape=(found.network.config.in_channels, *height_width(found.image_size)))
    else:
        check_batch(batch, shape=(config.num_tokens,))
    wrong = batch.labels[(batch.labels < 0) | (batch.labels >= config.num_classes)]
    if len(wrong):
        raise ValueError(
            f"labels of the data must be in [0, {config.num_classes}), the classes of the model, got {int(wrong[0])}; "
            "number the classes from 0, and build the model with num_classes of the data"
        )


class OptimizedModel(CheckpointedModule):
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
        """Sets the learning rate of the first step: a resumed run may have another decay or number of steps.

        A subclass with optimizers of its own keeps their rates.
        """
        if type(self).configure_optimizers is not OptimizedModel.configure_optimizers:
            return
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
