"""What a stage of a run costs a device, from the module that would be trained; ``maskgit doctor`` asks."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from maskgit_pl.data import Batch
from maskgit_pl.estimates.replay import Replay, replay, without_content
from maskgit_pl.estimates.run import Memory, checkpoint_bytes, memory_of
from maskgit_pl.estimates.sharding import FLOAT, HALF, Group, Strategy, Traffic, ddp_traffic, fsdp_traffic, group_of
from maskgit_pl.estimates.transformer import (
    Activations,
    Checkpointing,
    Precision,
    block_group,
    mean_masked,
    recomputed_flops,
    root_group,
    step_flops,
    transformer_activations,
)
from maskgit_pl.mvtm import MaskedTokenModel
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.token_model import TokenModel
from maskgit_pl.tokenizer import Tokenizer

__all__ = ["Costs", "TokenizerCosts", "TransformerCosts"]


@dataclass
class Costs:
    """What a stage costs, whatever its recipe.

    Args:
        strategy: How ranks share.
        ranks: n.
        precision: Of the Trainer.
        checkpointing: ``model.activation_checkpointing``.
    """

    strategy: Strategy
    ranks: int
    precision: Precision = "32-true"
    checkpointing: Checkpointing = "none"

    @property
    @abstractmethod
    def groups(self) -> tuple[list[Group], Group]:
        """What FSDP2 gathers one after the other, and the rest."""

    @property
    @abstractmethod
    def averaged(self) -> int:
        """Numbers in the moving average of the weights."""

    @abstractmethod
    def memory(self, per_device: int) -> Memory:
        """Of a rank, with so many samples in a micro-batch."""

    @abstractmethod
    def flops(self, global_batch: int) -> tuple[float, float]:
        """Of a step over all ranks: useful ones, and executed ones."""

    @abstractmethod
    def checkpoint(self) -> int:
        """Bytes of a checkpoint."""

    @abstractmethod
    def traffic(self, micro_batches: int) -> Traffic:
        """Bytes that a rank sends in a step."""

    @property
    def trained(self) -> int:
        """Numbers that are trained."""
        blocks, root = self.groups
        return sum(group.numel for group in (*blocks, root))

    @property
    def num_tensors(self) -> int:
        """Tensors that are trained."""
        blocks, root = self.groups
        return sum(len(group.shapes) for group in (*blocks, root))

    def largest_batch(self, per_rank: int, limit: float) -> int | None:
        """The largest micro-batch that divides a rank's samples of a step and needs at most ``limit`` bytes."""
        divisors = (size for size in range(per_rank, 0, -1) if per_rank % size == 0)
        return next((size for size in divisors if self.memory(size).total <= limit), None)


@dataclass
class TransformerCosts(Costs):
    """Stage 2, by closed formulas.

    Args:
        module: What would be trained.
        tokenizer: Sizes of the tokenizer that encodes on the fly and its images' edge, if it is known.
        encodes: Whether it encodes on the fly.
    """

    module: TokenModel | None = None
    tokenizer: tuple[VQGANConfig, int] | None = None
    encodes: bool = False

    @property
    def _model(self) -> TokenModel:
        assert self.module is not None
        return self.module

    @property
    def groups(self) -> tuple[list[Group], Group]:
        config = self._model.config.network
        return [block_group(config)] * config.depth, root_group(config)

    @property
    def averaged(self) -> int:
        return self.trained if self._model.config.ema_decay > 0 else 0

    @cached_property
    def _encoding(self) -> tuple[int, Replay]:
        """Bytes of the frozen tokenizer's weights, and what it takes to encode an image."""
        if self.tokenizer is None:
            return 0, Replay(0, 0)
        config, size = self.tokenizer
        with torch.device("meta"):
            network = VQGAN(config).requires_grad_(False)
        weights = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
        with without_content(network):
            images = torch.empty(1, config.in_channels, size, size)
            return weights, replay(lambda: network.encode(images), [network], precision=self.precision)

    def activations(self, per_device: int) -> Activations:
        """Of a micro-batch whose tokens are all masked: none needs more."""
        made = transformer_activations(
            self._model.config.network, batch=per_device, precision=self.precision, checkpointing=self.checkpointing
        )
        encoding = self._encoding[1].peak_of(per_device) if self.encodes else 0  # is over before the network begins
        return Activations(made.kept, made.casts, max(made.working, encoding - made.kept))

    def memory(self, per_device: int) -> Memory:
        blocks, root = self.groups
        return memory_of(
            blocks, root, self.activations(per_device), strategy=self.strategy, ranks=self.ranks,
            averaged=None if self.averaged else 0, frozen=self._encoding[0],
        )  # fmt: skip

    def flops(self, global_batch: int) -> tuple[float, float]:
        config, module = self._model.config.network, self._model
        share = float(config.num_tokens)
        if isinstance(module, MaskedTokenModel):
            ratio = module.config.min_mask_ratio
            share = mean_masked(module.mask_schedule, config.num_tokens, min_mask_ratio=ratio)
        masked = share * global_batch
        encoding = self._encoding[1].flops * global_batch if self.encodes else 0
        useful = step_flops(config, images=global_batch, masked=masked) + encoding
        again = recomputed_flops(config, images=global_batch, masked=masked) if self.checkpointing == "blocks" else 0
        return useful, useful + again

    def checkpoint(self) -> int:
        return checkpoint_bytes(self.trained, averaged=self.averaged, tensors=self.num_tensors)

    def traffic(self, micro_batches: int) -> Traffic:
        blocks, root = self.groups
        if self.strategy == "fsdp":
            weight = HALF if self.precision == "bf16-mixed" else FLOAT
            return fsdp_traffic(blocks, root, self.ranks, micro_batches=micro_batches, weight=weight)
        return ddp_traffic([*blocks, root], self.ranks)


@dataclass
class TokenizerCosts(Costs):
    """Stage 1: its step is replayed without content for one image; more of them take as many times as much.

    Args:
        module: What would be trained; its networks lose their content.
    """

    module: Tokenizer | None = None

    @property
    def _model(self) -> Tokenizer:
        assert self.module is not None
        return self.module

    @property
    def _networks(self) -> list[nn.Module]:
        opponent = self._model.discriminator
        return [self._model.network] if opponent is None else [self._model.network, opponent]

    @property
    def groups(self) -> tuple[list[Group], Group]:
        *blocks, root = (group_of([network]) for network in self._networks)
        return blocks, root

    @property
    def averaged(self) -> int:
        return sum(parameter.numel() for parameter in self._model.ema_network.parameters())

    @property
    def _frozen(self) -> list[nn.Module]:
        perceptual = self._model.similarity_loss.network
        return [] if perceptual is None else [perceptual]

    @cached_property
    def _replay(self) -> Replay:
        module = self._model
        networks = [*self._networks, *self._frozen]
        with without_content(*networks), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for parameter in (parameter for network in networks for parameter in network.parameters()):
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
            return replay(_micro_batch(module), networks, precision=self.precision)

    def memory(self, per_device: int) -> Memory:
        blocks, root = self.groups
        casts = self._replay.casts
        activations = Activations(self._replay.peak_of(per_device) - casts, casts, 0)
        buffers = sum(buffer.nbytes for network in self._networks for buffer in network.buffers())
        frozen = sum(tensor.nbytes for network in self._frozen for tensor in network.parameters())
        return memory_of(
            blocks, root, activations, strategy=self.strategy, ranks=self.ranks,
            averaged=self.averaged, frozen=frozen + 2 * buffers,
        )  # fmt: skip

    def flops(self, global_batch: int) -> tuple[float, float]:
        executed = float(self._replay.flops * global_batch)
        return executed, executed

    def checkpoint(self) -> int:
        buffers = sum(tensor.nbytes for tensor in self._model.network.buffers())
        return checkpoint_bytes(self.trained, averaged=self.averaged, others=2 * buffers, tensors=self.num_tensors)

    def traffic(self, micro_batches: int) -> Traffic:
        blocks, root = self.groups
        buffers = sum(buffer.nbytes for network in self._networks for buffer in network.buffers())
        return ddp_traffic([*blocks, root], self.ranks, buffers=buffers, micro_batches=micro_batches)


def _micro_batch(module: Tokenizer) -> Callable[[], None]:
    """A micro-batch of one image that is not the last of its step, with every loss that the recipe has."""
    channels, edge = module.config.network.in_channels, module.config.image_size
    images = torch.empty(1, channels, edge, edge, dtype=torch.uint8)
    numbers = torch.zeros(1, dtype=torch.int64)
    batch = Batch(images, numbers, numbers, numbers, numbers, numbers == 0)
    trainer = SimpleNamespace(
        global_step=_first_full_step(module), world_size=1, strategy=SimpleNamespace(backward=_backward)
    )

    def step() -> None:
        module.trainer = cast("Trainer", trainer)  # held weakly
        module.accumulation, module.config = 2, replace(module.config, flip_probability=0.0)
        module._pending = type(module._pending)()
        module.training_step(batch, 0)

    return step


def _first_full_step(module: Tokenizer) -> int:
    """A step with a discriminator and its penalty."""
    config = module.config.adversarial
    return 0 if config is None else -(-config.start_step // config.r1_every) * config.r1_every


def _backward(loss: Tensor, *_: object) -> None:
    loss.backward()  # type: ignore[no-untyped-call]  # torch: untyped
