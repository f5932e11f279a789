"""Stage 1: trains the VQGAN that turns images into tokens and back.

Manual optimisation, because a GAN has two optimisers. The generator runs forward once a batch; each loss is
differentiated once at the reconstructed image, and the weighted sum of those gradients is propagated once through the
network. That gives the gradients of the weighted sum of losses, and the discriminator's layers are never differentiated
twice for the adaptive weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from maskgit_pl import losses
from maskgit_pl.checks import check_integer, check_number
from maskgit_pl.data import Batch, flip
from maskgit_pl.imaging import to_unit_range
from maskgit_pl.networks.discriminator import Discriminator, DiscriminatorConfig
from maskgit_pl.networks.features import FeatureOutput, feature_networks
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.pretrained import load_tokenizer, load_weights, save_tokenizer
from maskgit_pl.training.ema import frozen_copy, update_ema
from maskgit_pl.training.execution import ActivationCheckpointing, prepare_blocks
from maskgit_pl.training.guards import Guard, clip_gradients
from maskgit_pl.training.optimizers import AdamWKind, LearningRate, build_adamw, check_betas, parameter_groups
from maskgit_pl.training.strategies import check_precision

__all__ = ["AdversarialConfig", "CodebookUse", "PerceptualConfig", "Tokenizer"]

_PICTURES = 16  # validation images kept for a reconstruction grid
_LECAM_DECAY = 0.999


@dataclass(frozen=True)
class PerceptualConfig:
    """The perceptual loss: weight x mean squared difference of a pretrained network's outputs.

    Attributes:
        network: Name or spec of a feature network.
        weight: Factor of the loss, positive.
        output: What is compared: the classifier's ``logits`` (released configuration) or the pooled ``features``.

    Raises:
        ValueError: The weight is not positive, or the network is unknown.

    Source: released configuration: ResNet-50 logits at 224 px, 0.1.
    """

    network: str | Mapping[str, Any]
    weight: float = 0.1
    output: Literal["logits", "features"] = "logits"

    def __post_init__(self) -> None:
        check_number("perceptual weight", self.weight, "(0, 1e6]")
        feature_networks.build(self.network)

    def create_network(self) -> nn.Module:
        """Makes the frozen network.

        Raises:
            ValueError: Its weights cannot be read.
        """
        try:
            return feature_networks.build(self.network).create()
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(
                f"model.perceptual.network: {error}; --model.perceptual.network.weights FILE names them, "
                "--model.perceptual=null trains without"
            ) from error


@dataclass(frozen=True)
class AdversarialConfig:
    """The adversarial loss and its discriminator. The defaults are the released configuration's.

    Attributes:
        discriminator: Sizes of the discriminator.
        loss: ``non-saturating`` or ``hinge``.
        weight: Factor of the generator's loss, positive.
        weight_rule: ``fixed``: the weight as it is; ``adaptive``: times |gradient of the other losses| / |gradient of
            the adversarial loss| at the decoder's last layer, over the global micro-batch.
        start_step: First step with a discriminator: before it, neither network sees an adversarial loss.
        r1_cost: Factor of the R1 penalty on real images, at least 0.
        r1_every: The penalty is computed every so many steps, times as much.
        lecam_weight: Factor of the LeCam regularisation, at least 0.

    Raises:
        ValueError: A number is out of range.
    """

    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: losses.AdversarialLoss = "non-saturating"
    weight: float = 0.1
    weight_rule: Literal["fixed", "adaptive"] = "fixed"
    start_step: int = 0
    r1_cost: float = 10.0
    r1_every: int = 1
    lecam_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("weight", "r1_cost", "lecam_weight"):
            check_number(f"adversarial {name}", getattr(self, name), "[0, 1e6]")
        check_integer("adversarial start_step", self.start_step, "[0, inf)")
        check_integer("adversarial r1_every", self.r1_every, "[1, inf)")


class CodebookUse(Metric):
    """How a set of tokens uses the codebook: the share of codes used at least once, and the perplexity.

    perplexity = exp(-sum_k p_k log p_k), p_k the share of tokens that are code k; in [1, K].

    Args:
        num_codes: K.
    """

    full_state_update = False
    counts: Tensor  # (K,) float64

    def __init__(self, num_codes: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(num_codes, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, tokens: Tensor, weight: Tensor) -> None:
        """Counts (B, N) int64 tokens in [0, K), each row (B,) times its weight (0: padding)."""
        weights = weight.to(self.counts.dtype).unsqueeze(1).expand_as(tokens)
        self.counts.index_add_(0, tokens.flatten(), weights.flatten())

    def compute(self) -> dict[str, Tensor]:
        """``codebook_usage`` in [0, 1] and ``perplexity`` in [1, K]."""
        shares = self.counts / self.counts.sum().clamp(min=1)
        return {
            "codebook_usage": (self.counts > 0).float().mean(),
            "perplexity": torch.special.entr(shares).sum().exp().float(),
        }


class Tokenizer(LightningModule):
    """Trains a VQGAN; ``ema_network`` is what evaluation, pictures and exports use.

    A step is one global batch: the module accumulates and clips itself, and only the generator's optimiser advances
    ``global_step``, so that ``max_steps`` counts global batches.

    Args:
        network: Sizes of the VQGAN.
        image_size: Edge of the square images, in pixels.
        learning_rate: Of both optimisers.
        reconstruction_loss: ``l2`` (released) or ``l1``, weight 1.
        perceptual: The perceptual loss, if any.
        adversarial: The adversarial loss and the discriminator, if any.
        betas: Of Adam, both networks. Source: released configuration.
        weight_decay: Of Linear and Conv weights.
        gradient_clip: Largest gradient norm of each network, if any.
        ema_decay: Of the weight average, in [0, 1).
        flip_probability: Share of training images mirrored left to right, in [0, 1].
        seed: Of flips and restarts of dead codes.
        accumulation: Micro-batches of a global batch on each rank.
        memory_format: Layout of images and convolution weights; ``channels_last`` is quicker on most GPUs.
        activation_checkpointing: ``blocks`` saves memory: the blocks of encoder and decoder run again in the backward
            pass.
        adamw: How the optimisers step.

    Raises:
        ValueError: A number is out of range, or an unknown word.
    """

    def __init__(
        self,
        network: VQGANConfig,
        *,
        image_size: int,
        learning_rate: LearningRate,
        reconstruction_loss: losses.ReconstructionLoss = "l2",
        perceptual: PerceptualConfig | None = None,
        adversarial: AdversarialConfig | None = None,
        betas: tuple[float, float] = (0.0, 0.99),
        weight_decay: float = 0.0,
        gradient_clip: float | None = None,
        ema_decay: float = 0.999,
        flip_probability: float = 0.0,
        seed: int = 0,
        accumulation: int = 1,
        memory_format: Literal["contiguous", "channels_last"] = "contiguous",
        activation_checkpointing: ActivationCheckpointing = "none",
        adamw: AdamWKind = "fused",
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.image_size = image_size
        self.learning_rate = learning_rate
        self.reconstruction_loss = reconstruction_loss
        self.perceptual = perceptual
        self.adversarial = adversarial
        self.betas = betas
        self.weight_decay = weight_decay
        self.gradient_clip = gradient_clip
        self.ema_decay = ema_decay
        self.flip_probability = flip_probability
        self.seed = seed
        self.accumulation = accumulation
        _check_numbers(self)
        self.memory_format = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format

        self.adamw: AdamWKind = adamw

        self.network = _laid_out(VQGAN(network), self.memory_format)
        self.ema_network = frozen_copy(self.network)
        for half in (self.network.encoder, self.network.decoder):
            prepare_blocks(half.blocks, activation_checkpointing=activation_checkpointing)
        self.grid = network.grid(image_size)
        self.discriminator: Discriminator | None = None
        if adversarial is not None:
            opponent = Discriminator(adversarial.discriminator, in_channels=network.in_channels, image_size=image_size)
            self.discriminator = _laid_out(opponent, self.memory_format)
            self.register_buffer("lecam_means", torch.zeros(2))  # moving averages of the real and the fake logits
        # In a tuple, so that a frozen pretrained network is no submodule and stays out of checkpoints.
        self._features: tuple[nn.Module, ...] = () if perceptual is None else (perceptual.create_network(),)

        self.squared_error = MeanMetric()
        self.codebook_use = CodebookUse(network.num_codes)
        self._wrapped: dict[str, nn.Module] = {}
        self._pending = _Pending()
        self._pictures: tuple[Tensor, Tensor] | None = None

    guard: Guard | None = None  # set by the callback; without it every update counts
    lecam_means: Tensor  # (2,) float32

    # Set-up

    def wrap_networks(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Has the training forwards of generator and discriminator go through wrappers, e.g. DistributedDataParallel.

        The wrappers are kept outside the module tree: the names in a state dict do not change.

        Args:
            wrap: Called once with each trained network.
        """
        self._wrapped["network"] = wrap(self.network)
        if self.discriminator is not None:
            self._wrapped["discriminator"] = wrap(self.discriminator)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for the generator, then one for the discriminator where there is one."""
        networks = [self.network] if self.discriminator is None else [self.network, self.discriminator]
        return [
            build_adamw(parameter_groups(network, self.weight_decay), self.learning_rate, self.betas, self.adamw)
            for network in networks
        ]

    def on_fit_start(self) -> None:
        """Refuses what this stage cannot train with, and moves the perceptual network to the device.

        Raises:
            ValueError: A precision in which this would not train.
        """
        check_precision(self.trainer.precision)
        for network in self._features:
            network.to(self.device)

    # Training

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One micro-batch: adds its gradients; the last of a global batch steps both optimisers."""
        images = self._images(batch, flip_probability=self.flip_probability)
        last = len(self._pending.tokens) + 1 == self.accumulation
        with self._gradient_sync(last=last):
            metrics = self._add_gradients(images)
        if not last:
            return
        self._step_optimizers()
        if self.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # set late
            self._record({f"train/{name}": value for name, value in metrics.items()}, bar="train/reconstruction")

    def _add_gradients(self, images: Tensor) -> dict[str, Tensor]:
        """Adds the gradients of one (B, C, H, W) micro-batch to both networks and returns its losses."""
        output = self._call("network", images)
        image = output.reconstruction.detach().requires_grad_()
        gradient, metrics = self._similarity_gradient(image, images)
        discriminator_loss = None
        if self._adversarial_started():
            real, fake = self._logits(images, image)
            adversarial, adversarial_metrics = self._adversarial_gradient(fake, image, output.reconstruction, gradient)
            gradient = gradient + adversarial
            discriminator_loss, discriminator_metrics = self._discriminator_loss(real, fake)
            metrics |= adversarial_metrics | discriminator_metrics
        # The gradient of this sum is the propagated one: d(reconstruction . gradient) = gradient . d(reconstruction).
        propagated = (output.reconstruction.float() * gradient).sum() + output.quantized.loss
        self.manual_backward(propagated / self.accumulation)
        if discriminator_loss is not None:
            self.manual_backward(discriminator_loss / self.accumulation)
        self._pending.tokens.append(output.quantized.tokens)
        self._pending.features.append(output.quantized.features)
        return metrics | {"quantizer": output.quantized.loss.detach()}

    def _similarity_gradient(self, image: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradient of reconstruction and perceptual loss at the reconstructed image, (B, C, H, W) float32."""
        reconstruction = losses.reconstruction_loss(image, images, kind=self.reconstruction_loss)
        metrics = {"reconstruction": reconstruction.detach()}
        total = reconstruction
        if self.perceptual is not None:
            perceptual = self._perceptual_loss(image, images, self.perceptual)
            metrics["perceptual"] = perceptual.detach()
            total = total + self.perceptual.weight * perceptual
        return _gradient(total, image), metrics

    def _perceptual_loss(self, image: Tensor, images: Tensor, config: PerceptualConfig) -> Tensor:
        network = self._features[0]
        with torch.no_grad():
            wanted: FeatureOutput = network(images)
        got: FeatureOutput = network(image)
        return F.mse_loss(getattr(got, config.output).float(), getattr(wanted, config.output).float())

    # The adversarial part. Both networks' gradients are taken at the weights before the step, so that one forward of
    # the discriminator over the reconstructions serves both losses, and accumulation does not change the result.

    def _adversarial_started(self) -> bool:
        return self.adversarial is not None and self.global_step >= self.adversarial.start_step

    def _logits(self, images: Tensor, image: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Real images (which may need a gradient) with their logits, and the logits of reconstructions, (B, 1) each."""
        real = images.detach().requires_grad_(self._r1_due())
        # The first call goes through the wrapper, which arms its gradient hooks; a second one would arm them twice. The
        # hooks fire when a parameter's whole gradient of the backward pass has come in, from both calls.
        real_logits = self._call("discriminator", real)
        assert self.discriminator is not None
        return (real, real_logits), self.discriminator(image)

    def _r1_due(self) -> bool:
        config = self.adversarial
        return config is not None and config.r1_cost > 0 and self.global_step % config.r1_every == 0

    def _adversarial_gradient(
        self, fake_logits: Tensor, image: Tensor, reconstruction: Tensor, similarity: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted gradient of the generator's adversarial loss at the reconstructed image, (B, C, H, W)."""
        config = self.adversarial
        assert config is not None
        loss = losses.generator_loss(fake_logits, kind=config.loss)
        gradient = _gradient(loss, image, retain_graph=True)
        weight = torch.tensor(config.weight, device=gradient.device)
        if config.weight_rule == "adaptive":
            weight = weight * self._adaptive_weight(reconstruction, similarity, gradient)
        return weight * gradient, {"generator": loss.detach(), "adversarial_weight": weight}

    def _adaptive_weight(self, reconstruction: Tensor, similarity: Tensor, adversarial: Tensor) -> Tensor:
        """The rule at the decoder's last layer: only that layer's backward pass runs, once for each gradient."""
        last = self.network.decoder.head.weight
        both = torch.stack(
            [
                torch.autograd.grad(reconstruction, last, part.to(reconstruction.dtype), retain_graph=True)[0]
                for part in (similarity, adversarial)
            ]
        )
        similarity_part, adversarial_part = _mean_over_ranks(both)
        return losses.adaptive_weight(similarity_part, adversarial_part)

    def _discriminator_loss(self, real: tuple[Tensor, Tensor], fake_logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss with its penalties: scalar with a graph."""
        config = self.adversarial
        assert config is not None
        images, real_logits = real
        loss = losses.discriminator_loss(real_logits, fake_logits, kind=config.loss)
        metrics = {"discriminator": loss.detach()}
        if self._r1_due():
            penalty = losses.r1_penalty(real_logits, images)
            metrics["r1"] = penalty.detach()
            loss = loss + config.r1_cost * config.r1_every * penalty
        if config.lecam_weight > 0:
            real_mean, fake_mean = self.lecam_means.clone()
            lecam = losses.lecam_loss(real_logits, fake_logits, real_mean=real_mean, fake_mean=fake_mean)
            metrics["lecam"] = lecam.detach()
            loss = loss + config.lecam_weight * lecam
            self._pending.logits.append(torch.stack([real_logits.mean(), fake_logits.mean()]).detach().float())
        return loss, metrics

    # The step

    def _step_optimizers(self) -> None:
        """Steps both optimisers once for a global batch, then everything that follows the weights."""
        step, optimizers = self.global_step, self.optimizers()
        generator, *rest = optimizers if isinstance(optimizers, list) else [optimizers]
        assert isinstance(generator, LightningOptimizer)
        stepping = [generator]
        # The discriminator first: the generator's step advances global_step, and with it whether the loss has started.
        if self._adversarial_started():
            stepping = [*rest, generator]
        self._set_learning_rate(step)
        norms = [clip_gradients(optimizer.optimizer, self.gradient_clip) for optimizer in stepping]
        skips = self.guard is not None and self.guard.skips_update(self.trainer, norms)
        for optimizer in stepping:
            if skips:
                optimizer.zero_grad()  # without gradients the optimiser leaves weights and moments alone
            # Lightning counts every step of a LightningOptimizer in global_step; the plain optimiser's are not counted,
            # so that max_steps means global batches.
            (optimizer if optimizer is generator else optimizer.optimizer).step()
            optimizer.zero_grad()
        if skips:
            self._pending = _Pending()
        else:
            self._follow_weights(step)

    def _set_learning_rate(self, step: int) -> None:
        rate = self.learning_rate.peak * self.learning_rate.factor(step, self.trainer.max_steps)
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def _follow_weights(self, step: int) -> None:
        pending, self._pending = self._pending, _Pending()
        self.network.quantizer.update(pending.tokens, pending.features, seed=self.seed, step=step)
        if pending.logits:
            means = _mean_over_ranks(torch.stack(pending.logits).mean(0))
            self.lecam_means.lerp_(means, 1 - _LECAM_DECAY)
        update_ema(self.ema_network, self.network, decay=self.ema_decay, step=step)

    # Validation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the error and the code counts; rows with ``valid`` False count nothing."""
        images = self._images(batch, flip_probability=0.0)
        tokens = self.ema_network.encode(images)
        reconstruction = self.ema_network.decode(tokens, self.grid)[..., : images.shape[-2], : images.shape[-1]]
        reconstruction = reconstruction.float().clamp(0, 1)
        errors = (reconstruction - images).square().flatten(1).mean(1)  # (B,)
        self.squared_error.update(errors, weight=batch.valid.float())
        self.codebook_use.update(tokens, batch.valid)
        if batch_idx == 0:
            self._pictures = _as_bytes(images[:_PICTURES]), _as_bytes(reconstruction[:_PICTURES])

    def on_validation_model_zero_grad(self) -> None:
        """Leaves the gradients alone: a validation may fall between the micro-batches of a global batch."""

    def on_validation_epoch_end(self) -> None:
        """Logs PSNR of the pooled error in dB, codebook usage and perplexity over all ranks."""
        psnr = -10 * torch.log10(self.squared_error.compute())
        values = {"psnr": psnr, **self.codebook_use.compute()}
        self.squared_error.reset()
        self.codebook_use.reset()
        self._record({f"val/{name}": value for name, value in values.items()}, bar="val/psnr")

    def reconstructions(self) -> tuple[Tensor, Tensor] | None:
        """First validation images and their reconstructions, (B, C, H, W) uint8; None before the first validation."""
        return self._pictures

    def start_from(self, folder: Path) -> None:
        """Begins from a pretrained tokenizer's weights instead of random ones; called before the first step.

        Args:
            folder: Pretrained tokenizer folder.

        Raises:
            FileNotFoundError: No such folder.
            ValueError: Not a tokenizer, or one of other sizes.
        """
        weights = load_tokenizer(folder).network.state_dict()
        for network in (self.network, self.ema_network):
            load_weights(network, weights, folder)

    def export(self, folder: Path) -> None:
        """Writes ``folder/tokenizer`` from the averaged weights; called on every rank, rank 0 writes."""
        if self.global_rank == 0:
            weights = self.ema_network.state_dict()
            save_tokenizer(folder / "tokenizer", self.network.config, weights, image_size=self.image_size)

    # Small parts

    def _images(self, batch: Batch, *, flip_probability: float) -> Tensor:
        """uint8 images of a batch -> (B, C, H, W) float32 in [0, 1], mirrored where the sample's number says so."""
        images = batch.content
        if flip_probability > 0:
            images = flip(images, probability=flip_probability, seed=self.seed, index=batch.index, epoch=batch.epoch)
        return to_unit_range(images).to(memory_format=self.memory_format)

    def _call(self, name: Literal["network", "discriminator"], images: Tensor) -> Any:
        """The training forward of a network, through its wrapper where it has one."""
        return self._wrapped.get(name, getattr(self, name))(images)

    @contextmanager
    def _gradient_sync(self, *, last: bool) -> Iterator[None]:
        """Gradients are exchanged between ranks only in the last micro-batch of a global batch."""
        with ExitStack() as stack:
            for wrapped in self._wrapped.values():
                if not last and isinstance(wrapped, nn.parallel.DistributedDataParallel):
                    stack.enter_context(wrapped.no_sync())
            yield

    def _record(self, metrics: dict[str, Tensor], *, bar: str) -> None:
        """Shows metrics to callbacks and loggers, on the axis of global batches; one call for all of them."""
        distributed = self.trainer.world_size > 1 and self.trainer.validating
        shown = metrics.pop(bar)
        self.log(bar, shown, prog_bar=True, logger=False, batch_size=1, sync_dist=distributed)
        self.log_dict(metrics, logger=False, batch_size=1, sync_dist=distributed)
        if not self.trainer.sanity_checking:
            values = {name: float(value) for name, value in {bar: shown, **metrics}.items()}
            for logger in self.loggers:
                logger.log_metrics(values, step=self.global_step)


@dataclass
class _Pending:
    """What the micro-batches of the current global batch leave for its step."""

    tokens: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)  # (2,) each: mean real and fake logit


_Network = TypeVar("_Network", bound=nn.Module)


def _laid_out(network: _Network, memory_format: torch.memory_format) -> _Network:
    network.to(memory_format=memory_format)  # type: ignore[call-overload]  # the overload is missing in torch's types
    return network


def _gradient(loss: Tensor, image: Tensor, *, retain_graph: bool = False) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, image, retain_graph=retain_graph)
    return gradient.float()


def _mean_over_ranks(value: Tensor) -> Tensor:
    if not dist.is_available() or not dist.is_initialized():
        return value
    dist.all_reduce(value)
    return value / dist.get_world_size()


def _as_bytes(images: Tensor) -> Tensor:
    """(B, C, H, W) float in [0, 1] -> uint8 on the CPU."""
    scaled: Tensor = images * 255
    return scaled.round().to(torch.uint8).cpu()


def _check_numbers(module: Tokenizer) -> None:
    check_integer("model.image_size", module.image_size, "[1, 16384]")
    check_betas(module.betas)
    check_number("model.weight_decay", module.weight_decay, "[0, 10]")
    check_number("model.ema_decay", module.ema_decay, "[0, 1)")
    check_number("model.flip_probability", module.flip_probability, "[0, 1]")
    check_integer("model.accumulation", module.accumulation, "[1, inf)")
    if module.gradient_clip is not None:
        check_number("model.gradient_clip", module.gradient_clip, "(0, inf)")
