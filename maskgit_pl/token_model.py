"""Stage 2, what its two models share: a transformer that is trained on tokens, its average, its samples, its export.

``mvtm.MaskedTokenModel`` predicts masked tokens, ``autoregressive.AutoregressiveModel`` the next one.
"""

from __future__ import annotations

import math
import shutil
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from maskgit_pl.checks import check_choice, check_number
from maskgit_pl.data import Batch, flip
from maskgit_pl.decoding import DecodingConfig, DecodingStep
from maskgit_pl.imaging import to_unit_range
from maskgit_pl.losses import masked_cross_entropy
from maskgit_pl.networks.transformer import Transformer, TransformerConfig, Vocabulary
from maskgit_pl.pretrained import (
    PretrainedTokenizer,
    load_tokenizer,
    load_transformer,
    save_transformer,
    weights_for,
)
from maskgit_pl.randomness import random_bits, random_uniform
from maskgit_pl.training.checkpoints import full_state
from maskgit_pl.training.ema import frozen_copy, update_ema
from maskgit_pl.training.execution import ActivationCheckpointing, Compiled, prepare_blocks
from maskgit_pl.training.guards import Guard, clip_gradients
from maskgit_pl.training.optimizers import AdamWKind, LearningRate, build_adamw, check_betas, parameter_groups
from maskgit_pl.training.strategies import check_precision, shard_blocks

__all__ = ["NUM_BINS", "TokenModel", "check_fit"]

NUM_BINS = 4
"""Groups of tokens whose losses are logged apart."""


class TokenModel(LightningModule):
    """Trains a transformer on tokens, or on images that a frozen tokenizer turns into tokens on the fly.

    A subclass says which tokens of a batch are to be predicted, what the network sees of them, and how it samples.

    Args:
        transformer: The network, with first weights.
        learning_rate: Peak, warm-up and decay.
        tokenizer: Pretrained tokenizer folder.
        decoding: How sample pictures, and later users of the exported model, decode.
        label_smoothing: In [0, 1).
        loss_vocabulary: Whether the loss's softmax runs over the codes or over all rows of the word table.
        betas: Of AdamW.
        weight_decay: Of Linear weights alone.
        ema_decay: Of the averaged weights that sample, are evaluated and exported; 0 for none.
        flip_probability: Chance of a horizontal flip, for images as the source.
        seed: Of all that is drawn: masks, class dropout, flips and dropout, in [0, 2**32).
        activation_checkpointing: ``blocks`` saves memory: the trained network's blocks run again in the backward pass.
        compiled: ``blocks``: the trained network's blocks go through ``torch.compile``, which takes its time at first.
        adamw: How the optimiser steps.

    Raises:
        ValueError: if a number is out of range, a word is unknown, or guidance is set without a null class.

    Source: paper, training; learning rate, betas, decay and smoothing of the released configuration are its recipes'.
    """

    mask_schedule_spec: str | dict[str, Any] | None = None  # as a recipe names it, of those that have one
    guard: Guard | None = None  # set by the callback; without it every update counts
    _skips_update = False
    binned_by: str  # what ``_bins`` looks at, in the names of what is logged

    def __init__(
        self,
        transformer: Transformer,
        learning_rate: LearningRate,
        tokenizer: str,
        *,
        decoding: DecodingConfig,
        label_smoothing: float = 0.1,
        loss_vocabulary: Vocabulary = "all",
        betas: tuple[float, float] = (0.9, 0.96),
        weight_decay: float = 0.045,
        ema_decay: float = 0.999,
        flip_probability: float = 0.0,
        seed: int = 0,
        activation_checkpointing: ActivationCheckpointing = "none",
        compiled: Compiled = "none",
        adamw: AdamWKind = "fused",
    ) -> None:
        super().__init__()
        check_number("model.label_smoothing", label_smoothing, "[0, 1)")
        check_choice("model.loss_vocabulary", loss_vocabulary, get_args(Vocabulary))
        check_betas(betas)
        check_number("model.weight_decay", weight_decay, "[0, 10]")
        check_number("model.ema_decay", ema_decay, "[0, 1)")
        check_number("model.flip_probability", flip_probability, "[0, 1]")
        self.config = transformer.config
        self.learning_rate = learning_rate
        self.tokenizer_folder = Path(tokenizer)
        self.decoding = decoding
        self.label_smoothing = label_smoothing
        self.loss_vocabulary: Vocabulary = loss_vocabulary
        self.betas = betas
        self.weight_decay = weight_decay
        self.ema_decay = ema_decay
        self.flip_probability = flip_probability
        self.seed = seed
        self.adamw: AdamWKind = adamw
        self.transformer = transformer
        self.ema_network = frozen_copy(transformer) if ema_decay > 0 else None
        prepare_blocks(transformer.blocks, activation_checkpointing=activation_checkpointing, compiled=compiled)
        self._tokenizer: PretrainedTokenizer | None = None
        self._validation_loss = MeanMetric()
        self._validation_accuracy = MeanMetric()
        self._binned = torch.zeros(NUM_BINS, 3)  # of predicted tokens: count, summed loss, summed hits
        _check_guidance(self.config, decoding)

    @abstractmethod
    def _mask(self, batch: Batch) -> Tensor:
        """(B, N) bool: which tokens are predicted, a function of the samples alone."""

    @abstractmethod
    def _visible(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """What the network is given of tokens (B, N): (B, N) int64."""

    @abstractmethod
    def _bins(self, mask: Tensor) -> Tensor:
        """(M,) int64 in [0, 4): where what is logged sorts the M predicted tokens."""

    @abstractmethod
    def _decode(self, labels: Sequence[int], seeds: Sequence[int]) -> Iterator[DecodingStep]:
        """As of ``sample``, with the averaged network in evaluation mode."""

    @property
    def averaged_network(self) -> Transformer:
        """The network that samples, is evaluated and exported: the moving average, or the trained one without it."""
        return self.transformer if self.ema_network is None else self.ema_network

    @property
    def tokenizer(self) -> PretrainedTokenizer:
        """The frozen tokenizer, read when it is first asked for, on this module's device; never in a checkpoint."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_folder)
            check_fit(self.config, self._tokenizer)
        self._tokenizer.network.to(self.device)
        return self._tokenizer

    def configure_model(self) -> None:
        """Under FSDP2: shards block by block; the tied word table stays in the root group.

        Raises:
            ValueError: A precision in which this would not train.
        """
        check_precision(self.trainer.precision)
        if self.device_mesh is None:
            return
        mesh = self.device_mesh["data_parallel"]
        shard_blocks(self.transformer, self.transformer.blocks, mesh, precision=self.trainer.precision)
        if self.ema_network is not None:  # whole, as it samples and is evaluated
            shard_blocks(self.ema_network, self.ema_network.blocks, mesh, precision="32-true")

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        groups = parameter_groups(self.transformer, self.weight_decay, prefix="transformer.")
        optimizer = build_adamw(groups, self.learning_rate, self.betas, self.adamw)
        max_steps = int(self.trainer.max_steps)
        scheduler = LambdaLR(optimizer, lambda step: self.learning_rate.factor(step, max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Limits the norm, if the recipe says so; a step that any rank cannot take is taken by none.

        Raises:
            ValueError: Another algorithm than ``norm``.
        """
        if gradient_clip_algorithm not in (None, "norm"):
            raise ValueError(f"trainer.gradient_clip_algorithm: 'norm' is needed, got {gradient_clip_algorithm!r}")
        norm = clip_gradients(optimizer, gradient_clip_val)
        self._skips_update = self.guard is not None and self.guard.skips_update(self.trainer, [norm])
        if self._skips_update:
            optimizer.zero_grad()  # without gradients the optimiser leaves weights and moments alone

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Nothing: ``optimizer_step`` leaves no gradients."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Optimizer | Any, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, *args, **kwargs)
        optimizer.zero_grad()  # Lightning would keep the gradients in memory through the next forward pass
        if self.ema_network is not None and not self._skips_update:
            step = self.trainer.global_step  # this one is not counted yet
            update_ema(self.ema_network, self.transformer, decay=self.ema_decay, step=step)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self._reseed_dropout(batch_idx)
        tokens, mask = self.tokens_and_mask(batch)
        labels = self._drop_classes(batch)
        loss, token_loss, hits = self._losses(self.transformer, tokens, labels, mask, smoothing=self.label_smoothing)
        self._collect(mask, token_loss, hits)
        is_logged = (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]  # set late
        if is_logged and (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:  # the step's last micro-batch
            self._log_training(loss.detach())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        tokens, mask = self.tokens_and_mask(batch)
        mask = mask & batch.valid.unsqueeze(1)
        _, token_loss, hits = self._losses(self.averaged_network, tokens, batch.labels, mask, smoothing=0.0)
        self._validation_loss.update(token_loss)
        self._validation_accuracy.update(hits)

    def on_validation_epoch_end(self) -> None:
        metrics = {"val/loss": self._validation_loss, "val/accuracy": self._validation_accuracy}
        values = {name: metric.compute() for name, metric in metrics.items()}  # over all ranks
        is_fitting = self.trainer.state.fn == TrainerFn.FITTING
        self.log_dict(values, prog_bar=True, logger=False if is_fitting else None, sync_dist=True)
        if is_fitting and not self.trainer.sanity_checking:  # Lightning would log a step before the pictures
            self._log_metrics({name: float(value) for name, value in values.items()}, self.trainer.global_step)
        for metric in metrics.values():
            metric.reset()

    def tokens_and_mask(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What a batch teaches: tokens (B, N) int64 and which of them are predicted (B, N) bool."""
        mask = self._mask(batch)
        return self._tokens(batch), mask

    @torch.no_grad()
    def sample(self, labels: Sequence[int], seeds: Sequence[int]) -> Iterator[DecodingStep]:
        """Decodes one image for each label and seed, step by step and exactly, with the averaged network."""
        self.averaged_network.eval()
        yield from self._decode(labels, seeds)
        self.transformer.train(self.training)

    def start_from(self, folder: Path) -> None:
        """Begins from a pretrained transformer's weights instead of random ones; called before the first step.

        Args:
            folder: Pretrained transformer folder; see ``pretrained.weights_for`` for what becomes of its classes.

        Raises:
            FileNotFoundError: No such folder.
            ValueError: Not a transformer, or one of other sizes.
        """
        weights = weights_for(self.config, load_transformer(folder))
        for network in self._networks():
            network.load_state_dict(weights)

    def export(self, folder: Path, *, class_names: tuple[str, ...]) -> None:
        """Writes what ``MaskGIT.from_pretrained`` reads; called on every rank, rank 0 writes.

        The averaged weights go to ``folder/transformer``, and with them goes the tokenizer whose tokens they know.

        Args:
            folder: Where ``transformer`` and ``tokenizer`` go.
            class_names: One for each class.
        """
        weights, own = full_state(self.averaged_network), folder / "tokenizer"
        if self.global_rank == 0:
            if self.tokenizer_folder.resolve() != own.resolve():
                shutil.copytree(self.tokenizer_folder, own, dirs_exist_ok=True)
            save_transformer(
                folder / "transformer",
                self.config,
                weights,
                mask_schedule=self.mask_schedule_spec,
                decoding=self.decoding,
                class_names=class_names,
                tokenizer_fingerprint=self.tokenizer.fingerprint,
            )

    def _tokens(self, batch: Batch) -> Tensor:
        if batch.content.ndim == 2:
            return batch.content
        images = batch.content
        if self.training and self.flip_probability > 0:
            images = flip(
                images, probability=self.flip_probability, seed=self.seed, index=batch.index, epoch=batch.epoch
            )
        with torch.no_grad():
            return self.tokenizer.network.encode(to_unit_range(images))

    def _drop_classes(self, batch: Batch) -> Tensor:
        null_label = self.config.null_label
        if null_label is None:
            return batch.labels
        chance = random_uniform("class-dropout", seed=self.seed, index=batch.index, epoch=batch.epoch)[:, 0]
        return batch.labels.masked_fill(chance < self.config.class_dropout, null_label)

    def _networks(self) -> list[Transformer]:
        """The trained network, and its average if there is one."""
        return [self.transformer] if self.ema_network is None else [self.transformer, self.ema_network]

    def _losses(
        self, network: Transformer, tokens: Tensor, labels: Tensor, mask: Tensor, *, smoothing: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (), and of each predicted token its negative log-likelihood and whether the likeliest code is right."""
        logits = network.forward_masked(
            self._visible(tokens, mask), labels, mask, vocabulary=self.loss_vocabulary
        )  # (M, V)
        rows = mask.nonzero()[:, 0]
        targets = tokens[mask]
        loss, token_loss = masked_cross_entropy(logits, targets, rows, num_rows=len(tokens), label_smoothing=smoothing)
        return loss, token_loss, (logits.detach().argmax(-1) == targets).float()

    def _reseed_dropout(self, batch_idx: int) -> None:
        """Dropout masks as a function of (seed, step, micro-batch, rank): exact for the same topology."""
        if self.config.dropout == 0:
            return
        place = batch_idx % self.trainer.accumulate_grad_batches * self.trainer.world_size + self.global_rank
        word = random_bits("dropout", seed=self.seed, index=place, epoch=self.trainer.global_step)
        torch.manual_seed(int(word))

    def _collect(self, mask: Tensor, token_loss: Tensor, hits: Tensor) -> None:
        """Adds the step's predicted tokens to their bins."""
        values = torch.stack([torch.ones_like(hits), token_loss.detach(), hits], dim=1)  # (M, 3)
        self._binned = self._binned.to(values.device).index_add(0, self._bins(mask), values)

    def _log_training(self, loss: Tensor) -> None:
        """One dict every ``log_every_n_steps`` steps; the bins' sums are those of this rank."""
        value, *sums = torch.cat([loss.reshape(1), self._binned.flatten()]).tolist()  # one wait for the device
        self._binned = torch.zeros_like(self._binned)
        bins = list(zip(sums[::3], sums[1::3], sums[2::3], strict=True))
        accuracy = sum(hits for *_, hits in bins) / sum(count for count, *_ in bins)
        metrics = {"train/loss": value, "train/accuracy": accuracy}
        for number, (count, summed_loss, hits) in enumerate(bins):
            if count:
                name = f"{self.binned_by}-{number / NUM_BINS:.2f}-{(number + 1) / NUM_BINS:.2f}"
                metrics[f"train/loss/{name}"] = summed_loss / count
                metrics[f"train/accuracy/{name}"] = hits / count
        self.log("train/loss", loss, prog_bar=True, logger=False)
        finite = {name: each for name, each in metrics.items() if math.isfinite(each)}
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self._log_metrics({**finite, "learning-rate": rate}, self.trainer.global_step + 1)

    def _log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Writes metrics to all loggers, on the axis of steps that are done."""
        for logger in self.loggers:
            logger.log_metrics(metrics, step=step)


def _check_guidance(config: TransformerConfig, decoding: DecodingConfig) -> None:
    """Refuses before the first step what would otherwise be refused at the first sample pictures."""
    if any(decoding.scales()) and config.null_label is None:
        raise ValueError(
            f"model.decoding.guidance: it needs a null class, got {decoding.guidance!r} with class_dropout 0; "
            "set model.network.class_dropout above 0 or model.decoding.guidance to constant"
        )


def check_fit(config: TransformerConfig, tokenizer: PretrainedTokenizer) -> None:
    """Refuses a transformer whose codebook or grid is not the tokenizer's.

    Raises:
        ValueError: With both sizes and the recipe keys.
    """
    pairs = (("num_codes", config.num_codes, tokenizer.network.config.num_codes), ("grid", config.grid, tokenizer.grid))
    for name, wanted, has in pairs:
        if wanted != has:
            raise ValueError(
                f"model.network.{name}: the tokenizer has {has}, got {wanted}; "
                "leave the key out or name another tokenizer"
            )
