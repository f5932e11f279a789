"""Stage 1: trains the VQGAN that turns images into tokens and back.

Optimization is manual, because a GAN has two optimizers. A training step is one global batch. For each of its
micro-batches (the code repeats the numbers):

1. Convert the images to float32 in [0, 1], and flip some of them.
2. Run the generator (the VQGAN) forward once. Differentiate the terms of the loss (``TokenizerLoss``:
   ``l2``, ``perceptual``, or your own) at the reconstructed image and at the features, not further.
3. From ``adversarial.start_step``, run the discriminator on real images and reconstructions. Differentiate the
   generator's adversarial loss at the reconstructed image too. Compute the discriminator's loss, which keeps its graph.
4. Propagate the sum of the gradients at the image through the generator once, then the discriminator's loss
   through the discriminator. The result is the gradient of the weighted sum of losses. The adaptive weight
   needs no second pass through the discriminator.

After the last micro-batch:

5. Clip the gradients of each network. All ranks vote: if one has a non-finite value, no rank steps.
6. Step the discriminator, then the generator, whose step advances ``global_step``.
7. Update the codebook statistics, the LeCam means and the averaged weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from maskgit_pl.checks import (
    check_integer,
    height_width,
)
from maskgit_pl.data import Batch, flip
from maskgit_pl.data.batches import check_batch
from maskgit_pl.distributed import mean_over_ranks
from maskgit_pl.networks.blocks import prepare_blocks
from maskgit_pl.networks.discriminators import discriminators
from maskgit_pl.networks.vqgan import VQGAN, to_unit_range
from maskgit_pl.networks.weights import load_weights
from maskgit_pl.pretrained.networks import load_tokenizer, save_tokenizer
from maskgit_pl.tokenizer.adversarial import AdversarialStep
from maskgit_pl.tokenizer.config import TokenizerConfig
from maskgit_pl.tokenizer.losses import (
    LossInputs,
    LossTerms,
)
from maskgit_pl.training.health import measure_usage
from maskgit_pl.training.loading import RunModule
from maskgit_pl.training.optimizers import (
    build_optimizer,
    freeze,
    frozen_copy,
    parameter_groups,
    update_ema,
)
from maskgit_pl.training.stopping import StepCheck, clip_gradients
from maskgit_pl.training.strategies import check_precision

_NUM_PICTURES = 16  # validation images kept for a reconstruction grid
_LECAM_DECAY = 0.999  # of the moving averages of the logits, for each global batch


class Tokenizer(RunModule):
    """The LightningModule of stage 1. Its ``ema_network`` has the averaged weights, which are evaluated and exported.

    The module accumulates and clips gradients itself, and ``max_steps`` counts global batches.

    Args:
        config: Network, losses and optimizer.
        accumulation: Micro-batches of a global batch on each rank, >= 1. It depends on the number of devices,
            and may be set until training starts.

    Attributes:
        reconstructions: Validation images and their reconstructions, (B, C, H, W) uint8; None before a validation.

    Raises:
        ValueError: if ``accumulation`` is below 1, or the weights of the perceptual network cannot be read.
    """

    config: TokenizerConfig
    stage = "tokenizer"
    config_class = TokenizerConfig

    def __init__(self, config: TokenizerConfig, *, accumulation: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        check_integer("accumulation", accumulation, "[1, inf)")
        self.config = config
        self.accumulation = accumulation
        self.network = VQGAN(config.network)
        # Convolutions in this layout are faster on most GPUs.
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's types
        self.ema_network = frozen_copy(self.network)
        for half in (self.network.encoder, self.network.decoder):
            prepare_blocks(half.blocks, activation_checkpointing=config.activation_checkpointing)
        for part in config.freeze:
            freeze(getattr(self.network, part))
        if not any(parameter.requires_grad for parameter in self.network.parameters()):  # codes may have no gradients
            raise ValueError(
                f"freeze must leave weights to train, got {list(config.freeze)}, and the quantizer "
                f"{config.network.quantizer} has none; leave the encoder or the decoder out of model.freeze"
            )
        self.grid = config.network.grid(config.image_size)
        self.discriminator: nn.Module | None = None
        if config.adversarial is not None:
            spec, in_channels = discriminators.build(config.adversarial.discriminator), config.network.in_channels
            self.discriminator = spec.create(in_channels=in_channels, image_size=config.image_size)
            self.discriminator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as above
            self.register_buffer("lecam_means", torch.zeros(2))  # moving averages of the real and the fake logits
        self.loss_terms = LossTerms(config.terms)

        self.squared_error = MeanMetric()
        self.codebook_usage = CodebookUsage(config.network.codebook_size)
        self._wrapped: dict[str, nn.Module] = {}
        self._pending = _PendingUpdate()
        self.reconstructions: tuple[Tensor, Tensor] | None = None

    step_check: StepCheck | None = None  # set by a callback; without it no update is skipped
    lecam_means: Tensor  # (2,) float32

    # Set-up

    def wrap_networks(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Wraps the training forward passes of both networks, for example with DistributedDataParallel.

        The wrappers stay outside of the module tree, so the names in a state dict do not change.
        """
        self._wrapped["network"] = wrap(self.network)
        if self.discriminator is not None:
            self._wrapped["discriminator"] = wrap(self.discriminator)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Builds an optimizer for the generator, and another one for the discriminator if there is one."""
        networks = [self.network] if self.discriminator is None else [self.network, self.discriminator]
        config = self.config.optimizer
        return [build_optimizer(parameter_groups(network, config.weight_decay), config) for network in networks]

    def on_fit_start(self) -> None:
        """Checks the precision, and moves the networks of the loss to the device."""
        check_precision(self.trainer.precision)
        self.loss_terms.to(self.device)

    # Training

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds the gradients of one micro-batch. The last one of a global batch steps both optimizers."""
        images = self.prepare_images(batch, flip_probability=self.config.flip_probability)  # 1
        is_last = len(self._pending.tokens) + 1 == self.accumulation
        with self._sync_gradients(is_last=is_last):
            metrics = self.add_gradients(images, step=self.global_step, backward=self.manual_backward)  # 2 to 4
        if not is_last:
            return
        metrics |= self._step_optimizers()  # 5 to 7
        if self.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # set late
            named = {f"train/{name}": value for name, value in metrics.items()}
            rate = torch.tensor(self.trainer.optimizers[0].param_groups[0]["lr"], dtype=torch.float64)
            self._log_metrics({**named, "learning-rate": rate}, bar=f"train/{next(iter(self.loss_terms.terms))}")

    def add_gradients(self, images: Tensor, *, step: int, backward: Callable[[Tensor], None]) -> dict[str, Tensor]:
        """Adds the gradients of one micro-batch to both networks, without an optimizer step.

        Args:
            images: (B, C, H, W) float32 in [0, 1].
            step: Step of the training, which decides on the adversarial loss and the R1 penalty.
            backward: Propagates a scalar, such as ``torch.autograd.backward``.

        Returns:
            Detached losses by name.
        """
        # 2. Generator. The detached tensors are leaves, where the gradients of the losses stop. Losses are in float32.
        micro_batch = len(self._pending.tokens)
        self.network.quantizer.begin_micro_batch(seed=self.config.seed, step=step, micro_batch=micro_batch)
        output = self._run_network("network", images)
        image = output.reconstruction.detach().float().requires_grad_()
        features = output.features.detach().requires_grad_()
        gradient, at_features, metrics = self.loss_terms.gradients(LossInputs(images, image, features, step))
        # 3. Discriminator.
        discriminator_loss = None
        if self._has_adversarial_loss(step):
            adversarial = self._run_discriminator(images, image, step)
            gradient = gradient + adversarial.generator_gradient(
                image,
                reconstruction=output.reconstruction,
                similarity=gradient,
                last_layer=self.network.decoder.head.weight,
            )
            discriminator_loss = adversarial.discriminator_loss(self.lecam_means)
            if adversarial.config.lecam_weight > 0:
                self._pending.logits.append(adversarial.mean_logits)
            metrics |= adversarial.metrics
        # 4. Backward. The gradient g is a constant, so d(sum(reconstruction * g)) = sum(g * d(reconstruction)), which
        # is the gradient of the losses with respect to the weights.
        propagated = (output.reconstruction.float() * gradient).sum() + output.quantized.loss
        if at_features is not None:
            propagated = propagated + (output.features.float() * at_features).sum()
        backward(propagated / self.accumulation)
        if discriminator_loss is not None:
            backward(discriminator_loss / self.accumulation)
        self._pending.tokens.append(output.quantized.tokens)
        self._pending.features.append(output.quantized.features)
        return metrics | {"quantizer": output.quantized.loss.detach()}

    def _has_adversarial_loss(self, step: int) -> bool:
        return self.config.adversarial is not None and step >= self.config.adversarial.start_step

    def _run_discriminator(self, images: Tensor, image: Tensor, step: int) -> AdversarialStep:
        """Runs the discriminator on real images and reconstructions, (B, C, H, W) float32 each."""
        config = self.config.adversarial
        assert config is not None
        assert self.discriminator is not None
        real = images.detach().requires_grad_(config.has_r1_penalty(step))
        # Only the first call uses the wrapper: each forward of DistributedDataParallel prepares its gradient
        # hooks, and a second forward before the backward pass would prepare them again. The hooks run when
        # the gradient of a parameter is complete, with the parts of both calls. R1 differentiates twice, in
        # the dtype of this pass. Not in bfloat16: oneDNN's kernel for the second derivative of a convolution
        # is wrong for some sizes on CPUs with AMX, and elsewhere the penalty's gradient is noise.
        with torch.autocast(real.device.type, enabled=False) if real.requires_grad else nullcontext():
            real_logits = self._run_network("discriminator", real)
        return AdversarialStep(config, real, real_logits, self.discriminator(image), config.weight_at(step))

    # Optimizer step

    def _step_optimizers(self) -> dict[str, Tensor]:
        """Makes one step of both optimizers, updates the statistics (5 to 7), and returns the norms before clipping."""
        step, optimizers = self.global_step, self.optimizers()
        generator, *rest = optimizers if isinstance(optimizers, list) else [optimizers]
        assert isinstance(generator, LightningOptimizer)
        # The discriminator has no gradients, and does not step, before its start step.
        active = [*rest, generator] if self._has_adversarial_loss(step) else [generator]
        self._set_learning_rate(step)
        # 5. Clip, and vote.
        norms = [clip_gradients(optimizer.optimizer, self.config.gradient_clip) for optimizer in active]
        is_skipped = self.step_check is not None and self.step_check.should_skip_update(self.trainer, norms)
        # 6. Step.
        for optimizer in active:
            if is_skipped:
                optimizer.zero_grad()  # without gradients the step changes neither weights nor moments
            # Lightning counts each step of a LightningOptimizer in global_step. The discriminator steps its
            # plain optimizer, which is not counted, so max_steps counts global batches.
            (optimizer if optimizer is generator else optimizer.optimizer).step()
            optimizer.zero_grad()
        # 7. Statistics. A skipped step leaves them as they are.
        if is_skipped:
            self._pending = _PendingUpdate()
        else:
            self._update_statistics(step)
        return dict(zip(("gradient/generator", "gradient/discriminator"), reversed(norms), strict=False))

    def _set_learning_rate(self, step: int) -> None:
        if type(self).configure_optimizers is not Tokenizer.configure_optimizers:
            return  # a subclass has optimizers of its own
        learning_rate = self.config.optimizer.learning_rate
        rate = learning_rate.peak * learning_rate.factor(step, self.trainer.max_steps)
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def _update_statistics(self, step: int) -> None:
        pending, self._pending = self._pending, _PendingUpdate()
        if "quantizer" not in self.config.freeze:
            with torch.autocast(self.device.type, enabled=False):  # the step is inside that of the Trainer
                self.network.quantizer.update(pending.tokens, pending.features, seed=self.config.seed, step=step)
        if pending.logits:
            means = mean_over_ranks(torch.stack(pending.logits).mean(0))
            self.lecam_means.lerp_(means, 1 - _LECAM_DECAY)
        update_ema(self.ema_network, self.network, decay=self.config.ema_decay, step=step)

    # Validation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds the reconstruction error and the codes of a batch, without rows whose ``valid`` is False."""
        images = self.prepare_images(batch, flip_probability=0.0)
        tokens = self.ema_network.encode(images)
        # The network pads sizes that the downsampling does not divide; the padding is cut off.
        reconstruction = self.ema_network.decode(tokens, self.grid)[..., : images.shape[-2], : images.shape[-1]]
        reconstruction = reconstruction.float().clamp(0, 1)
        errors = (reconstruction - images).square().flatten(1).mean(1)  # (B,)
        self.squared_error.update(errors, weight=batch.valid.float())
        self.codebook_usage.update(tokens, batch.valid)
        if batch_idx == 0:
            self.reconstructions = _to_uint8(images[:_NUM_PICTURES]), _to_uint8(reconstruction[:_NUM_PICTURES])

    def on_validation_model_zero_grad(self) -> None:
        """Keeps the gradients: validation may run between the micro-batches of a global batch."""

    def on_validation_epoch_end(self) -> None:
        """Logs PSNR in dB (of the mean squared error of all images), codebook usage and perplexity over all ranks."""
        psnr = -10 * torch.log10(self.squared_error.compute())
        values = {"psnr": psnr, **self.codebook_usage.compute()}
        self.squared_error.reset()
        self.codebook_usage.reset()
        self._log_metrics({f"val/{name}": value for name, value in values.items()}, bar="val/psnr")

    def start_from(self, folder: Path) -> None:
        """Replaces the initial weights by those of a pretrained tokenizer folder. Call it before the first step.

        Raises:
            FileNotFoundError: if there is no such folder.
            ValueError: if the folder holds no tokenizer, or one of other sizes.
        """
        weights = load_tokenizer(folder).network.state_dict()
        for network in (self.network, self.ema_network):
            load_weights(network, weights, folder)

    def export(self, folder: Path | str) -> None:
        """Writes the averaged weights to ``folder/tokenizer``. Call it on all ranks; rank 0 writes."""
        if self.global_rank == 0:
            weights = self.ema_network.state_dict()
            save_tokenizer(Path(folder) / "tokenizer", self.network.config, weights, image_size=self.config.image_size)

    # Helpers

    def prepare_images(self, batch: Batch, *, flip_probability: float) -> Tensor:
        """Converts the uint8 images of a batch to (B, C, H, W) float32 in [0, 1], and flips some of them."""
        check_batch(batch, shape=(self.network.config.in_channels, *height_width(self.config.image_size)))
        images = batch.content
        if flip_probability > 0:
            images = flip(
                images, probability=flip_probability, seed=self.config.seed, index=batch.index, epoch=batch.epoch
            )
        return to_unit_range(images).to(memory_format=torch.channels_last)

    def _run_network(self, name: Literal["network", "discriminator"], images: Tensor) -> Any:
        """Runs the training forward of a network, through its wrapper if it has one."""
        return self._wrapped.get(name, getattr(self, name))(images)

    @contextmanager
    def _sync_gradients(self, *, is_last: bool) -> Iterator[None]:
        """Averages gradients over ranks in the last micro-batch of a global batch only."""
        with ExitStack() as stack:
            for wrapped in self._wrapped.values():
                if not is_last and isinstance(wrapped, nn.parallel.DistributedDataParallel):
                    stack.enter_context(wrapped.no_sync())
            yield

    def _log_metrics(self, metrics: dict[str, Tensor], *, bar: str) -> None:
        """Logs metrics for callbacks and loggers, with one logger call for all metrics of a step."""
        distributed = self.trainer.world_size > 1 and self.trainer.validating
        bar_value = metrics.pop(bar)
        self.log(bar, bar_value, prog_bar=True, logger=False, batch_size=1, sync_dist=distributed)
        self.log_dict(metrics, logger=False, batch_size=1, sync_dist=distributed)
        if not self.trainer.sanity_checking:
            values = {name: float(value) for name, value in {bar: bar_value, **metrics}.items()}
            for logger in self.loggers:
                logger.log_metrics(values, step=self.global_step)


class CodebookUsage(Metric):
    """The use of a codebook of K codes by a set of tokens; see ``training.health.measure_usage``."""

    full_state_update = False
    counts: Tensor  # (K,) float64

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(codebook_size, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, tokens: Tensor, weight: Tensor) -> None:
        """Counts tokens (B, N) int64 in [0, K), with a weight (B,) of each row, 0 for padding."""
        weights = weight.to(self.counts.dtype).unsqueeze(1).expand_as(tokens)
        self.counts.index_add_(0, tokens.flatten(), weights.flatten())

    def compute(self) -> dict[str, Tensor]:
        """Returns ``codebook_usage`` in [0, 1] and ``perplexity`` in [1, K]."""
        return {name: value.float() for name, value in measure_usage(self.counts).items()}


@dataclass
class _PendingUpdate:
    """The results of the micro-batches of the current global batch that step 7 needs."""

    tokens: list[Tensor] = field(default_factory=list)  # (B, N) int64 each
    features: list[Tensor] = field(default_factory=list)  # encoder outputs, see ``networks.quantizers``
    logits: list[Tensor] = field(default_factory=list)  # (2,) each: mean real and fake logit


def _to_uint8(images: Tensor) -> Tensor:
    """Converts (B, C, H, W) float in [0, 1] to uint8 on the CPU."""
    scaled: Tensor = images * 255
    return scaled.round().to(torch.uint8).cpu()
