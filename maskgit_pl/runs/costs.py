"""Costs of a stage (memory, FLOPs, traffic, disk space), calculated from its module. Used by ``preflight``."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from maskgit_pl.corruption import Corruption
from maskgit_pl.data import Batch
from maskgit_pl.estimates.backbone import has_chunked_loss, masked_token_flops, replay_backbone
from maskgit_pl.estimates.replay import Replay, fake_tensors, replay
from maskgit_pl.estimates.run import Memory, checkpoint_bytes, estimate_memory
from maskgit_pl.estimates.sharding import FLOAT, HALF, Group, Strategy, Traffic, ddp_traffic, fsdp_traffic, group_of
from maskgit_pl.estimates.transformer import (
    Activations,
    Checkpointing,
    Precision,
    mean_num_masked,
    recomputed_flops,
    step_flops,
    transformer_activations,
)
from maskgit_pl.image_format import ImageSize, height_width
from maskgit_pl.losses import needs_chunks, rows_at_once
from maskgit_pl.mvtm import MaskedTokenModel
from maskgit_pl.networks.backbone import BackboneConfig
from maskgit_pl.networks.skeleton import skeletons
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.token_model import TokenModel
from maskgit_pl.tokenizer import Tokenizer
from maskgit_pl.tokenizer_config import AdversarialConfig, TokenizerConfig
from maskgit_pl.training.compile_and_checkpointing import prepare_blocks
from maskgit_pl.training.optimizers import state_values

__all__ = ["Costs", "TokenizerCosts", "TransformerCosts", "useful_flops"]

_MANY_IMAGES = 64
_MOST_CHUNKS = 16  # of a loss that is replayed; each takes 20 ms or more


@dataclass
class Costs:
    """The costs of a stage.

    Args:
        strategy: Strategy of the Trainer.
        ranks: Number of ranks.
        precision: Precision of the Trainer.
        checkpointing: ``model.activation_checkpointing``.
        module: The module that would be trained.
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
    def flops(self, global_batch: int, per_device: int | None = None) -> tuple[float, float]:
        """Returns the FLOPs of a step over all ranks: useful, and executed (including recomputation).

        Args:
            global_batch: Samples of a step.
            per_device: Samples of a micro-batch, which decide whether a large loss is computed in chunks; None for no.
        """

    @abstractmethod
    def checkpoint(self) -> int:
        """Returns the size of a checkpoint in bytes."""

    @abstractmethod
    def traffic(self, micro_batches: int) -> Traffic:
        """Returns the bytes that each rank sends in a step with ``micro_batches`` micro-batches per rank."""

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


@dataclass(kw_only=True)
class TransformerCosts(Costs):
    """The costs of stage 2: by closed formulas for the transformer of the paper, from replays for other backbones.

    Args:
        module: The module that would be trained.
        tokenizer: Sizes of the tokenizer and its image size in pixels, if known.
        encodes: True if training encodes images, instead of reading tokens.
    """

    module: TokenModel
    tokenizer: tuple[VQGANConfig, ImageSize] | None = None
    encodes: bool = False

    @cached_property
    def groups(self) -> tuple[list[Group], Group]:
        with skeletons():
            network = self._config.create()
        in_blocks = {id(parameter) for parameter in network.blocks.parameters()}
        others = [parameter for parameter in network.parameters() if id(parameter) not in in_blocks]
        return [group_of([block]) for block in network.blocks], Group(tuple(tuple(each.shape) for each in others))

    @property
    def averaged(self) -> int:
        return self.trained if self.module.config.ema_decay > 0 else 0

    @property
    def _config(self) -> BackboneConfig:
        return self.module.config.network

    @cached_property
    def _encoding(self) -> tuple[int, Replay]:
        """The bytes of the frozen tokenizer's weights, and the replay of encoding one image."""
        if self.tokenizer is None:
            return 0, Replay(0, 0)
        config, size = self.tokenizer
        with skeletons():
            network = VQGAN(config).requires_grad_(requires_grad=False)
        weights = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
        with fake_tensors(network):
            images = torch.empty(1, config.in_channels, *height_width(size))
            # In float32 in any precision of the Trainer, as training encodes.
            return weights, replay(lambda: network.encode(images), [network])

    def _replay(self, checkpointing: Checkpointing, chunked_images: int | None = None) -> Replay:
        """Returns the replay of one image, or of several whose loss is computed in chunks; each is made once."""
        key = checkpointing, chunked_images
        if key not in self._replays:
            self._replays[key] = replay_backbone(
                self._config,
                chunked_images=chunked_images,
                vocabulary=self.module.config.loss_vocabulary,
                precision=self.precision,
                prepare=partial(prepare_blocks, activation_checkpointing=checkpointing),
            )
        return self._replays[key]

    @cached_property
    def _replays(self) -> dict[tuple[Checkpointing, int | None], Replay]:
        return {}

    def _chunked_peak(self, images: int) -> int:
        """Returns the peak memory of images whose loss is computed in chunks; that of many images is extrapolated."""
        config = self._config
        columns = config.num_columns(config.loss_columns(self.module.config.loss_vocabulary))
        rows = rows_at_once(images * config.num_tokens, columns)
        most = max(2, _MOST_CHUNKS * rows // config.num_tokens)
        if images <= most:
            return self._replay(self.checkpointing, images).peak
        fewer, more = (self._replay(self.checkpointing, each).peak for each in (most // 2, most))
        return more + (images - most) * (more - fewer) // (most - most // 2)

    def activations(self, per_device: int) -> Activations:
        """Returns the activations of a micro-batch whose tokens are all masked, the largest that there can be."""
        config = self._config
        if isinstance(config, TransformerConfig):
            made = transformer_activations(
                config,
                batch=per_device,
                precision=self.precision,
                checkpointing=self.checkpointing,
                vocabulary=self.module.config.loss_vocabulary,
            )
        else:
            step = self._replay(self.checkpointing)
            is_chunked = has_chunked_loss(config, per_device, vocabulary=self.module.config.loss_vocabulary)
            peak = self._chunked_peak(per_device) if is_chunked else step.peak_of(per_device)
            made = Activations(peak - step.casts, step.casts, 0)
        encoding = self._encoding[1].peak_of(per_device) if self.encodes else 0  # ends before the network starts
        return Activations(made.kept, made.casts, max(made.working, encoding - made.kept))

    def memory(self, per_device: int) -> Memory:
        blocks, root = self.groups
        return estimate_memory(
            blocks, root, self.activations(per_device), strategy=self.strategy, ranks=self.ranks,
            averaged=None if self.averaged else 0, frozen=self._encoding[0], moments=self.moments,
        )  # fmt: skip

    def flops(self, global_batch: int, per_device: int | None = None) -> tuple[float, float]:
        config, module = self._config, self.module
        share = float(config.num_tokens)
        before = float(self._encoding[1].flops if self.encodes else 0)  # of what precedes the network
        if isinstance(module, MaskedTokenModel):
            share, replaced = _count_predicted(module)
            if num_passes := _count_predictions(module.corruption):  # a forward pass is a third of a step
                before += num_passes * self._network_flops(replaced)[0] / 3
        useful, again = self._network_flops(share)
        if per_device is not None:
            again += self._chunk_flops(share, per_device)
        return (useful + before) * global_batch, (useful + again + before) * global_batch

    def _network_flops(self, masked: float) -> tuple[float, float]:
        """Returns the FLOPs of an image with a mean number of masked tokens: useful, and of recomputation."""
        config, is_repeated = self._config, self.checkpointing == "blocks"
        if isinstance(config, TransformerConfig):
            vocabulary = self.module.config.loss_vocabulary
            again = recomputed_flops(config, images=1, masked=masked, vocabulary=vocabulary) if is_repeated else 0.0
            return step_flops(config, images=1, masked=masked, vocabulary=vocabulary), again
        whole = self._replay("none").flops
        saved = (config.num_tokens - masked) * masked_token_flops(config)
        return whole - saved, float(self._replay("blocks").flops - whole) if is_repeated else 0.0

    def _chunk_flops(self, masked: float, per_device: int) -> float:
        """Returns the FLOPs of an image whose logits are computed again, in chunks; 0 if they are computed at once."""
        config, vocabulary = self._config, self.module.config.loss_vocabulary
        columns = config.num_columns(config.loss_columns(vocabulary))
        if not needs_chunks(round(per_device * masked), columns) or not has_chunked_loss(
            config, per_device, vocabulary=vocabulary
        ):
            return 0.0
        if isinstance(config, TransformerConfig):
            return 2 * masked * config.embed_dim * columns
        images = next(each for each in range(1, per_device + 1) if needs_chunks(each * config.num_tokens, columns))
        chunked, whole = self._replay(self.checkpointing, images).flops / images, self._replay(self.checkpointing).flops
        return (chunked - whole) * masked / config.num_tokens

    def checkpoint(self) -> int:
        return checkpoint_bytes(self.trained, averaged=self.averaged, tensors=self.num_tensors, moments=self.moments)

    def traffic(self, micro_batches: int) -> Traffic:
        blocks, root = self.groups
        if self.strategy == "fsdp":
            # The precision policy of strategies.py: weights in bfloat16, gradients in float32.
            weight = HALF if self.precision == "bf16-mixed" else FLOAT
            return fsdp_traffic(blocks, root, self.ranks, micro_batches=micro_batches, weight=weight)
        return ddp_traffic([*blocks, root], self.ranks)


@dataclass(kw_only=True)
class TokenizerCosts(Costs):
    """The costs of stage 1, from replays of its step with fake images.

    n images have n times the FLOPs of one. The memory of n lies on the line through that of 1 and of 64 images: a part
    of it, such as copies of frozen weights, does not grow with n.

    Args:
        module: The module that would be trained. Its networks become fake tensors.
    """

    module: Tokenizer

    @property
    def _networks(self) -> list[nn.Module]:
        discriminator = self.module.discriminator
        return [self.module.network] if discriminator is None else [self.module.network, discriminator]

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

    @property
    def _frozen(self) -> list[nn.Module]:
        perceptual = self.module.similarity_loss.network
        return [] if perceptual is None else [perceptual]

    @cached_property
    def _replay(self) -> Replay:
        return self._replay_at(_first_full_step(self.module.config.adversarial))

    @cached_property
    def _peak_of_many(self) -> int:
        return self._replay_at(_first_full_step(self.module.config.adversarial), images=_MANY_IMAGES).peak

    def _replay_at(self, step: int, *, images: int = 1) -> Replay:
        networks = [*self._networks, *self._frozen]
        with self._fake_tensors, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batch = _images_of(self.module.config, images)
            return replay(lambda: self.module.replay_step(batch, step=step), networks, precision=self.precision)

    @cached_property
    def _fake_tensors(self) -> FakeTensorMode:
        """The context of all replays, in which the weights of the networks are fake."""
        mode = fake_tensors(*self._networks, *self._frozen)
        with mode:
            # Gradients exist between steps, so they must not count as allocations of the replay.
            for parameter in (each for network in self._networks for each in network.parameters()):
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
        return mode

    def memory(self, per_device: int) -> Memory:
        blocks, root = self.groups
        casts, one = self._replay.casts, self._replay.peak
        # A maximum of lines is below its chord, so that this is no less than a replay has, up to many images.
        peak = one + (per_device - 1) * (self._peak_of_many - one) // (_MANY_IMAGES - 1)
        activations = Activations(peak - casts, casts, 0)
        # Buffers count twice, since the average has copies of them.
        buffers = sum(buffer.nbytes for network in self._networks for buffer in network.buffers())
        frozen = sum(tensor.nbytes for network in self._frozen for tensor in network.parameters()) + self._untrained
        return estimate_memory(
            blocks, root, activations, strategy=self.strategy, ranks=self.ranks,
            averaged=self.averaged, frozen=frozen + 2 * buffers, moments=self.moments,
        )  # fmt: skip

    def flops(self, global_batch: int, per_device: int | None = None) -> tuple[float, float]:
        executed = self._mean_flops(self._replay.flops)
        useful = executed
        if self.checkpointing == "blocks":
            halves = self.module.network.encoder, self.module.network.decoder
            with _plain_forward([block for half in halves for block in half.blocks]):
                useful = self._mean_flops(self._replay_at(_first_full_step(self.module.config.adversarial)).flops)
        return useful * global_batch, executed * global_batch

    def _mean_flops(self, most: float) -> float:
        """Returns the mean FLOPs of an image over the steps from one R1 penalty, with ``most`` FLOPs, to the next."""
        config = self.module.config.adversarial
        if config is None or config.r1_weight == 0 or config.r1_every == 1:
            return float(most)
        without = self._replay_at(_first_full_step(config) + 1).flops  # as all others that have none
        return without + (most - without) / config.r1_every

    def checkpoint(self) -> int:
        buffers = sum(tensor.nbytes for tensor in self.module.network.buffers())
        return checkpoint_bytes(
            self.trained,
            averaged=self.averaged,
            others=2 * buffers + self._untrained,
            tensors=self.num_tensors,
            moments=self.moments,
        )

    def traffic(self, micro_batches: int) -> Traffic:
        blocks, root = self.groups
        buffers = sum(buffer.nbytes for network in self._networks for buffer in network.buffers())
        return ddp_traffic([*blocks, root], self.ranks, buffers=buffers, micro_batches=micro_batches)


def useful_flops(module: TokenModel | Tokenizer, *, global_batch: int, encodes: bool) -> float:
    """Returns the FLOPs of a step of the model over all ranks, without recomputation. The module stays as it is.

    Args:
        module: The module that trains.
        global_batch: Samples of a step.
        encodes: True if stage 2 encodes images, instead of reading tokens.
    """
    if isinstance(module, TokenModel):
        sizes = (module.tokenizer.network.config, module.tokenizer.image_size) if encodes else None
        return TransformerCosts("auto", 1, module=module, tokenizer=sizes, encodes=encodes).flops(global_batch)[0]
    with torch.random.fork_rng(devices=[]):  # the twin draws weights, which the replay discards
        twin = Tokenizer(replace(module.config, activation_checkpointing="none"))
    return TokenizerCosts("auto", 1, module=twin).flops(global_batch)[0]


@contextmanager
def _plain_forward(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Takes activation checkpointing, which replaces the method ``forward`` of each block, off in the context."""
    replaced = {block: vars(block).pop("forward") for block in blocks if "forward" in vars(block)}
    try:
        yield
    finally:
        for block, forward in replaced.items():
            block.forward = forward


def _images_of(config: TokenizerConfig, count: int) -> Batch:
    images = torch.empty(count, config.network.in_channels, *height_width(config.image_size), dtype=torch.uint8)
    numbers = torch.zeros(count, dtype=torch.int64)
    return Batch(images, numbers, numbers, numbers, numbers, numbers == 0)


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
