"""Costs of a stage (memory, FLOPs, disk space), calculated from its module. Used by ``preflight`` and ``build``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from maskgit_pl.checks import ImageSize, height_width
from maskgit_pl.data import Batch
from maskgit_pl.losses import rows_at_once
from maskgit_pl.mvtm import MaskedTokenModel
from maskgit_pl.networks.backbone import Backbone, BackboneConfig
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.networks.weights import skeletons
from maskgit_pl.objectives import Corruption
from maskgit_pl.runs.flops import (
    Checkpointing,
    CountedStep,
    Precision,
    count_backbone,
    count_step,
    fake_tensors,
    mean_num_masked,
    step_flops,
    transformer_activations,
)
from maskgit_pl.runs.memory import (
    FLOAT,
    HALF,
    Activations,
    Group,
    Memory,
    Strategy,
    checkpoint_bytes,
    estimate_memory,
    group_of,
)
from maskgit_pl.tokenizer import Tokenizer
from maskgit_pl.training.optimizers import state_values
from maskgit_pl.training.token_model import TokenModel
from maskgit_pl.training.tokenizer_losses import AdversarialConfig, TokenizerConfig

__all__ = ["Costs", "TokenizerCosts", "TransformerCosts", "useful_flops"]


@dataclass
class Costs(ABC):
    """The costs of a stage.

    Args:
        strategy: Strategy of the Trainer.
        ranks: Number of ranks.
        precision: Precision of the Trainer.
        checkpointing: ``model.activation_checkpointing``.
        module: The module that would be trained. It stays as it is.
    """

    strategy: Strategy
    ranks: int
    precision: Precision = "32-true"
    checkpointing: Checkpointing = "none"
    module: TokenModel | Tokenizer = field(kw_only=True)

    @property
    @abstractmethod
    def groups(self) -> tuple[list[Group], Group]:
        """The groups that FSDP2 gathers one after the other, and the group of all other parameters."""

    @property
    @abstractmethod
    def averaged(self) -> int:
        """The number of parameters in the moving average."""

    @abstractmethod
    def memory(self, per_device: int) -> Memory:
        """Returns the peak memory of a rank with ``per_device`` samples in a micro-batch."""

    @abstractmethod
    def flops(self, global_batch: int) -> float:
        """Returns the FLOPs of a step over all ranks, without recomputation."""

    @abstractmethod
    def checkpoint(self) -> int:
        """Returns the size of a checkpoint in bytes."""

    @property
    def trained(self) -> int:
        """The number of trained parameters."""
        blocks, root = self.groups
        return sum(group.numel for group in (*blocks, root))

    @cached_property
    def moments(self) -> float:
        """The number of values that the optimizer keeps for each trained parameter."""
        return state_values(self.module.config.optimizer)

    @property
    def num_tensors(self) -> int:
        """The number of trained tensors."""
        blocks, root = self.groups
        return sum(len(group.shapes) for group in (*blocks, root))

    def largest_batch(self, per_rank: int, limit: float) -> int | None:
        """Returns the largest micro-batch that divides a rank's samples and fits ``limit`` bytes, or None."""
        divisors = (size for size in range(per_rank, 0, -1) if per_rank % size == 0)
        return next((size for size in divisors if self.memory(size).total <= limit), None)

    @property
    def casts(self) -> int:
        """The bytes of bfloat16 copies of the trained weights."""
        return HALF * self.trained if self.precision == "bf16-mixed" else 0


@dataclass(kw_only=True)
class TransformerCosts(Costs):
    """The costs of stage 2: by closed formulas for the transformer of the paper, counted for other backbones.

    Args:
        module: The module that would be trained.
        tokenizer: Sizes of the tokenizer and its image size in pixels, if known.
        encodes: True if training encodes images, instead of reading tokens.
    """

    module: TokenModel
    tokenizer: tuple[VQGANConfig, ImageSize] | None = None
    encodes: bool = False

    @cached_property
    def _network(self) -> Backbone:
        with skeletons():
            return self._config.create()

    @cached_property
    def groups(self) -> tuple[list[Group], Group]:
        in_blocks = {id(parameter) for parameter in self._network.blocks.parameters()}
        others = [parameter for parameter in self._network.parameters() if id(parameter) not in in_blocks]
        return [group_of([block]) for block in self._network.blocks], Group(tuple(tuple(each.shape) for each in others))

    @property
    def averaged(self) -> int:
        return self.trained if self.module.config.ema_decay > 0 else 0

    @property
    def _config(self) -> BackboneConfig:
        return self.module.config.network

    @cached_property
    def _encoder(self) -> VQGAN | None:
        if self.tokenizer is None:
            return None
        with skeletons():
            return VQGAN(self.tokenizer[0]).requires_grad_(requires_grad=False)

    @cached_property
    def _encoding_flops(self) -> int:
        """The FLOPs of encoding one image."""
        encoder = self._encoder
        if encoder is None or self.tokenizer is None or not self.encodes:
            return 0
        with fake_tensors(encoder):
            images = torch.empty(1, encoder.config.in_channels, *height_width(self.tokenizer[1]))
            return count_step(lambda: encoder.encode(images), [encoder]).flops

    def _encoding_bytes(self) -> int:
        """Returns the memory of encoding one image: five tensors of a block at full resolution, the largest."""
        if self.tokenizer is None or not self.encodes:
            return 0
        config, size = self.tokenizer
        height, width = height_width(size)
        return 5 * FLOAT * config.base_channels * config.channel_multipliers[0] * height * width // config.patch_size**2

    @cached_property
    def _kept_by_image(self) -> int:
        """The bytes that an image keeps, without what all images share, such as casts of weights."""
        one, two = (
            count_backbone(
                self._config,
                images=images,
                masked=self._config.num_tokens,
                vocabulary=self.module.config.loss_vocabulary,
                precision=self.precision,
            ).kept(self.checkpointing)
            for images in (1, 2)
        )
        return two - one

    def activations(self, per_device: int) -> Activations:
        """Returns the activations of a micro-batch whose tokens are all masked, the largest that there can be."""
        config, vocabulary = self._config, self.module.config.loss_vocabulary
        if isinstance(config, TransformerConfig):
            made = transformer_activations(
                config,
                batch=per_device,
                precision=self.precision,
                checkpointing=self.checkpointing,
                vocabulary=vocabulary,
            )
        else:
            rows, columns = per_device * config.num_tokens, config.num_columns(config.loss_columns(vocabulary))
            at_once = rows_at_once(rows, columns) if self._network.takes_project else rows
            # Each image keeps its log-probabilities; of a loss in chunks, only those of a chunk exist. The logits,
            # their gradient and that of the log-probabilities have the same size.
            unkept = FLOAT * columns * (rows - at_once)
            made = Activations(per_device * self._kept_by_image - unkept, self.casts, 3 * FLOAT * columns * at_once)
        # Encoding ends before the network starts.
        return replace(made, working=max(made.working, per_device * self._encoding_bytes() - made.kept))

    def memory(self, per_device: int) -> Memory:
        blocks, root = self.groups
        frozen = [] if self._encoder is None else [*self._encoder.parameters(), *self._encoder.buffers()]
        return estimate_memory(
            blocks, root, self.activations(per_device), strategy=self.strategy, ranks=self.ranks,
            averaged=None if self.averaged else 0, frozen=sum(each.nbytes for each in frozen), moments=self.moments,
        )  # fmt: skip

    def flops(self, global_batch: int) -> float:
        module, share = self.module, float(self._config.num_tokens)
        before = float(self._encoding_flops)  # of what precedes the network
        if isinstance(module, MaskedTokenModel):
            share, replaced = _count_predicted(module)
            if num_passes := _count_predictions(module.corruption):  # a forward pass is a third of a step
                before += num_passes * self._network_flops(replaced) / 3
        return (self._network_flops(share) + before) * global_batch

    def _network_flops(self, masked: float) -> float:
        """Returns the FLOPs of an image with a mean number of masked tokens."""
        config = self._config
        if isinstance(config, TransformerConfig):
            return step_flops(config, images=1, masked=masked, vocabulary=self.module.config.loss_vocabulary)
        most, least = self._flops_of_all_and_one
        return most - (config.num_tokens - masked) * (most - least) / max(1, config.num_tokens - 1)

    @cached_property
    def _flops_of_all_and_one(self) -> tuple[int, int]:
        """The FLOPs of an image with all tokens masked, and with one."""
        config, vocabulary = self._config, self.module.config.loss_vocabulary
        most, least = (count_backbone(config, masked=n, vocabulary=vocabulary).flops for n in (config.num_tokens, 1))
        return most, least

    def checkpoint(self) -> int:
        return checkpoint_bytes(self.trained, averaged=self.averaged, tensors=self.num_tensors, moments=self.moments)


@dataclass(kw_only=True)
class TokenizerCosts(Costs):
    """The costs of stage 1, from its step with one image; n images cost n times as much.

    Args:
        module: The module that would be trained.
    """

    module: Tokenizer

    @property
    def _networks(self) -> list[nn.Module]:
        return _trained_networks(self.module)

    @property
    def groups(self) -> tuple[list[Group], Group]:
        *blocks, root = (group_of([network]) for network in self._networks)
        return blocks, root

    @property
    def averaged(self) -> int:
        return sum(parameter.numel() for parameter in self.module.ema_network.parameters())

    @property
    def _untrained(self) -> int:
        """The bytes of the frozen parts of the trained networks."""
        parameters = (each for network in self._networks for each in network.parameters())
        return sum(each.nbytes for each in parameters if not each.requires_grad)

    @cached_property
    def _step(self) -> CountedStep:
        return self._count_step(_first_full_step(self.module.config.adversarial))

    def _count_step(self, step: int) -> CountedStep:
        twin, mode = self._twin
        networks = [*_trained_networks(twin), *_perceptual_networks(twin)]
        blocks = [*twin.network.encoder.blocks, *twin.network.decoder.blocks]
        with mode:
            return count_step(lambda: twin.replay_step(_one_image(twin.config), step=step), networks, blocks=blocks)

    @cached_property
    def _twin(self) -> tuple[Tokenizer, FakeTensorMode]:
        """A module without content and activation checkpointing, and its context."""
        with torch.random.fork_rng(devices=[]):  # it draws weights, which become fake
            twin = Tokenizer(replace(self.module.config, activation_checkpointing="none"))
        mode = fake_tensors(*_trained_networks(twin), *_perceptual_networks(twin))
        with mode:
            # Gradients exist between steps.
            for parameter in (each for network in _trained_networks(twin) for each in network.parameters()):
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        return twin, mode

    def memory(self, per_device: int) -> Memory:
        blocks, root = self.groups
        # In float32 with bf16-mixed, too: an upper bound, as norms and the R1 penalty stay in float32.
        activations = Activations(per_device * self._step.kept(self.checkpointing), self.casts, 0)
        # Buffers count twice, since the average has copies of them.
        buffers = sum(buffer.nbytes for network in self._networks for buffer in network.buffers())
        perceptual = [each for network in _perceptual_networks(self.module) for each in network.parameters()]
        frozen = sum(each.nbytes for each in perceptual) + self._untrained
        return estimate_memory(
            blocks, root, activations, strategy=self.strategy, ranks=self.ranks,
            averaged=self.averaged, frozen=frozen + 2 * buffers, moments=self.moments,
        )  # fmt: skip

    def flops(self, global_batch: int) -> float:
        """Returns the mean over the steps from one R1 penalty to the next."""
        config, most = self.module.config.adversarial, self._step.flops
        if config is None or config.r1_weight == 0 or config.r1_every == 1:
            return float(most * global_batch)
        without = self._count_step(_first_full_step(config) + 1).flops  # as all others that have none
        return (without + (most - without) / config.r1_every) * global_batch

    def checkpoint(self) -> int:
        buffers = sum(tensor.nbytes for tensor in self.module.network.buffers())
        return checkpoint_bytes(
            self.trained,
            averaged=self.averaged,
            others=2 * buffers + self._untrained,
            tensors=self.num_tensors,
            moments=self.moments,
        )


def useful_flops(module: TokenModel | Tokenizer, *, global_batch: int, encodes: bool) -> float:
    """Returns the FLOPs of a step of the model over all ranks, without recomputation. The module stays as it is.

    Args:
        module: The module that trains.
        global_batch: Samples of a step.
        encodes: True if stage 2 encodes images, instead of reading tokens.
    """
    if isinstance(module, TokenModel):
        sizes = (module.tokenizer.network.config, module.tokenizer.image_size) if encodes else None
        return TransformerCosts("auto", 1, module=module, tokenizer=sizes, encodes=encodes).flops(global_batch)
    return TokenizerCosts("auto", 1, module=module).flops(global_batch)


def _trained_networks(module: Tokenizer) -> list[nn.Module]:
    return [module.network] if module.discriminator is None else [module.network, module.discriminator]


def _perceptual_networks(module: Tokenizer) -> list[nn.Module]:
    perceptual = module.similarity_loss.network
    return [] if perceptual is None else [perceptual]


def _one_image(config: TokenizerConfig) -> Batch:
    image = torch.empty(1, config.network.in_channels, *height_width(config.image_size), dtype=torch.uint8)
    number = torch.zeros(1, dtype=torch.int64)
    return Batch(image, number, number, number, number, number == 0)


def _first_full_step(config: AdversarialConfig | None) -> int:
    """Returns the first step with discriminator and R1 penalty: the most expensive kind of step."""
    return 0 if config is None else -(-config.start_step // config.r1_every) * config.r1_every


def _count_predicted(module: MaskedTokenModel) -> tuple[float, float]:
    """Returns the mean numbers of tokens per image at which training computes logits, and which it replaces."""
    num_tokens, sampler = module.config.network.num_tokens, module.mask_sampler
    masked = mean_num_masked(
        module.mask_schedule, num_tokens, min_mask_ratio=sampler.min_mask_ratio, mask_ratio=sampler.mask_ratio
    )
    replaced = 0.0 if module.corruption is None else module.corruption.fraction * (num_tokens - masked)
    return float(num_tokens) if module.objective.visible_weight > 0 else masked + replaced, replaced


def _count_predictions(corruption: Corruption | None) -> int:
    """Returns the number of forward passes of a corruption, which it makes for a token, too."""
    calls = 0

    def predict(replaced: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.zeros(int(replaced.sum()), 2)

    if corruption is not None:
        token = torch.zeros(1, 1, dtype=torch.int64)
        corruption.corrupt(token, token == 0, torch.full((1,), 0.5), codebook_size=2, predict=predict)
    return calls
