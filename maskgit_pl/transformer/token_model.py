"""Stage 2: the base of both models and of their configurations, with optimization, averages, samples and export.

``mvtm.MaskedTokenModel`` predicts masked tokens, ``autoregressive.AutoregressiveModel`` the next token. A
training step does for each micro-batch (the code of this file repeats the numbers, in their order):

1. Draw the mask (B, N) of the tokens to predict (``_draw``). MaskedTokenModel draws it from (seed, sample,
   epoch, position): ceil(ratio N) positions with ratio = gamma(u). AutoregressiveModel predicts all tokens.
2. Replace each label by the null class with probability ``class_dropout``, a function of (seed, sample,
   epoch). The null class also hides the vector of the sample, if the network is conditioned on vectors.
3. Seed dropout with (seed, step, micro-batch, rank).
4. Take the tokens (B, N) of the batch, or flip some of its images and encode them with the frozen tokenizer.
5. Replace the masked tokens by the mask token, or corrupt the tokens in another way (causal attention keeps all
   tokens), and compute logits at the M predicted tokens only.
6. Compute the loss, with label smoothing: the mean over rows of (sum of the row's cross-entropies / their number), or
   another objective, with the logits and hidden states that it asks for.

The data modules run 1 and 2 on the host, before the batch is copied to the device (``draw_on_host``). M is then known
on the host, so that no later operation has a size that depends on values, and the host does not wait for the device.
With another data module they run in the step, on its device.

Lightning runs the backward pass. After the last micro-batch:

7. Clip the gradients. All ranks vote: if one has a non-finite value, no rank steps.
8. Step the optimizer, free the gradients, and update the averaged weights.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from maskgit_pl.checks import check_class_names, height_width
from maskgit_pl.data.batches import Batch, check_batch, flip
from maskgit_pl.decoding.config import DecodingConfig
from maskgit_pl.decoding.corruption import Corruption
from maskgit_pl.decoding.decoder import DecodingStep
from maskgit_pl.masking import Draws, true_positions
from maskgit_pl.networks.backbone import Backbone, BackboneConfig
from maskgit_pl.networks.blocks import prepare_blocks
from maskgit_pl.networks.vqgan import to_unit_range
from maskgit_pl.pretrained.fine_tuning import weights_for
from maskgit_pl.pretrained.networks import (
    PretrainedTokenizer,
    copy_stage_folder,
    fingerprint,
    load_tokenizer,
    load_transformer,
    save_transformer,
)
from maskgit_pl.randomness import random_bits, random_uniform
from maskgit_pl.training.checkpoints import full_state
from maskgit_pl.training.loading import RunModule
from maskgit_pl.training.optimizers import build_optimizer, frozen_copy, parameter_groups, update_ema
from maskgit_pl.training.stopping import StepCheck, clip_gradients
from maskgit_pl.training.strategies import (
    check_precision,
    shard_blocks,
)
from maskgit_pl.transformer.config import TokenModelConfig
from maskgit_pl.transformer.losses import StepLosses, mean_over_rows, outputs_of, token_statistics

NUM_BINS = 4
"""The number of groups of predicted tokens whose losses are logged separately."""


def check_tokenizer(config: BackboneConfig, tokenizer: PretrainedTokenizer) -> None:
    """Checks that a transformer has the codebook size and the grid of a tokenizer."""
    has = {"codebook_size": tokenizer.network.config.codebook_size, "grid": tokenizer.grid}
    for name, expected in has.items():
        if (value := getattr(config, name)) != expected:
            raise ValueError(
                f"model.network.{name} must be {expected}, that of the tokenizer, got {value}; leave the key out, or "
                "name another tokenizer"
            )


class TokenModel(RunModule):
    """The LightningModule of stage 2: trains a transformer on tokens, or on images that it encodes on the fly.

    Args:
        config: Network, optimizer, tokenizer and loss.
        transformer: The network that trains, with initial weights.
        decoding: Decoding settings for sample images, and of the exported model.

    Attributes:
        ema_network: The averaged network, which is sampled, evaluated and exported.
        step_check: Set by a callback; without it no update is skipped.

    Source: paper, training; the numbers of the released configuration are in ``recipes/transformer``.
    """

    config: TokenModelConfig
    stage = "transformer"
    mask_schedule_spec: str | dict[str, Any] | None = None  # in the form of a recipe; None with causal attention
    decoding_corruption: Corruption | None = None  # of models whose decoding shows corrupted tokens, too
    binned_by: str  # the quantity that ``_assign_bins`` groups by, in the names of logged values
    step_check: StepCheck | None = None
    _skips_update = False

    def __init__(self, config: TokenModelConfig, transformer: Backbone, decoding: DecodingConfig) -> None:
        super().__init__()
        self.config = config
        self.decoding = decoding
        self.transformer = transformer
        self.ema_network = frozen_copy(transformer)
        prepare_blocks(
            transformer.blocks,
            activation_checkpointing=config.activation_checkpointing,
            compiled=config.compiled,
        )
        self._tokenizer: PretrainedTokenizer | None = None
        self._validation_loss = MeanMetric()
        self._validation_accuracy = MeanMetric()
        self._bins = BinnedMeans(self.binned_by)

    @abstractmethod
    def _draw(self, batch: Batch) -> Draws:
        """Returns the tokens to predict and the labels, as a function of the samples only (``_draws_of``)."""

    @abstractmethod
    def _assign_bins(self, mask: Tensor, positions: Tensor) -> Tensor:
        """Returns the group in the logs, (M,) int64 in [0, 4), of the M positions, for a mask (B, N)."""

    @abstractmethod
    def sample(
        self, labels: Sequence[int], seeds: Sequence[int], vectors: Tensor | None = None
    ) -> Iterator[DecodingStep]:
        """Decodes an image for each label and seed in [0, 2**32) by the averaged network; yields each step.

        ``vectors`` (B, C) float are those of the images; None for a network without conditioning vectors.
        """

    @property
    def tokenizer(self) -> PretrainedTokenizer:
        """The frozen tokenizer on this module's device. It is loaded at its first use and stays out of checkpoints."""
        if self.config.tokenizer is None:
            raise ValueError("model.tokenizer must be a pretrained folder for images and code vectors, got None")
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.config.tokenizer)
            check_tokenizer(self.config.network, self._tokenizer)
        self._tokenizer.network.to(self.device)
        return self._tokenizer

    # 1, 2: the draws of a step

    def draw_on_host(self, batch: Batch) -> Batch:
        """Adds the random draws of the step to a batch that is on the host; the data modules call it."""
        batch = self._with_draws(batch)
        return batch._replace(draws=batch.step_draws.pin_memory()) if self.device.type == "cuda" else batch

    def _with_draws(self, batch: Batch) -> Batch:
        """Returns the batch with its random draws, unless it has them already."""
        if isinstance(batch, Batch) and batch.draws is not None:
            return batch
        self._check_samples(batch)
        return batch._replace(draws=self._draw(batch))  # 1; ``_draw`` calls ``_draws_of``

    def _check_samples(self, batch: Batch) -> None:
        """Checks that the samples of a batch are those of the network, or images of its tokenizer."""
        shape: tuple[int, ...] = (self.config.network.num_tokens,)
        if isinstance(batch, Batch) and batch.content.ndim == 4:
            tokenizer = self.tokenizer
            shape = (tokenizer.channels, *height_width(tokenizer.image_size))
        check_batch(batch, shape=shape)
        # The rows of the embedding beside those of the classes are codes, the null class and the mask token.
        num_classes = self.config.network.num_classes
        wrong = batch.labels[(batch.labels < 0) | (batch.labels >= num_classes)]
        if len(wrong):
            raise ValueError(
                f"labels of the data must be in [0, {num_classes}), the classes of the model, got {int(wrong[0])}; "
                "number the classes from 0, and build the model with num_classes of the data"
            )
        size, tokens = self.config.network.codebook_size, batch.content
        if tokens.ndim == 2 and len(wrong := tokens[(tokens < 0) | (tokens >= size)]):
            raise ValueError(
                f"tokens of the data must be in [0, {size}), the codes of the model, got {int(wrong[0])}; build the "
                "model with codebook_size of the tokenizer"
            )

    def _draws_of(self, batch: Batch, mask: Tensor) -> Draws:
        """Returns the draws that predict the tokens of ``mask`` (B, N) bool; in validation without class dropout."""
        if self.training:
            return Draws(self._drop_classes(batch), mask, true_positions(mask))  # 2
        # Rows that only pad the last batch do not count.
        return Draws(batch.labels, mask, true_positions(mask & batch.valid.unsqueeze(1)))

    def _drop_classes(self, batch: Batch) -> Tensor:
        """Returns the labels (B,) int64, some of them replaced by the null label."""
        network = self.config.network
        if network.null_label is None:
            return batch.labels
        chance = random_uniform("class-dropout", seed=self.config.seed, index=batch.index, epoch=batch.epoch)[:, 0]
        return batch.labels.masked_fill(chance < network.class_dropout, network.null_label)

    # 3 to 6: dropout, tokens and losses

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Computes the loss of one micro-batch, scalar float32."""
        batch = self._with_draws(batch)  # 1, 2, if the data module has not made them on the host
        self._reseed_dropout(batch_idx)  # 3
        losses = self._compute_training_losses(batch._replace(content=self._encode(batch)))  # 4, 5, 6
        self._log_step(batch, losses, batch_idx)
        return losses.loss

    def _reseed_dropout(self, batch_idx: int) -> None:
        """Seeds dropout by (seed, step, micro-batch, rank): a resumed run is bit-exact on the same number of ranks."""
        if self.config.network.dropout == 0:
            return
        index = batch_idx % self.trainer.accumulate_grad_batches * self.trainer.world_size + self.global_rank
        word = random_bits("dropout", seed=self.config.seed, index=index, epoch=self.trainer.global_step)
        torch.manual_seed(int(word))

    def _encode(self, batch: Batch) -> Tensor:
        """Returns the tokens of a batch, (B, N) int64 in [0, K); images are flipped in training only."""
        if batch.content.ndim == 2:
            return batch.content
        images, config = batch.content, self.config
        if self.training and config.flip_probability > 0:
            images = flip(
                images, probability=config.flip_probability, seed=config.seed, index=batch.index, epoch=batch.epoch
            )
        # In float32 in any precision of the Trainer, as `maskgit tokenize` and the pipeline encode.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self.tokenizer.network.encode(to_unit_range(images))

    def _compute_training_losses(self, batch: Batch) -> StepLosses:
        """Returns loss and statistics of the trained network for a batch of tokens."""
        return self.compute_losses(self.transformer, batch, batch.content, smoothing=self.config.label_smoothing)

    def compute_losses(self, network: Backbone, batch: Batch, tokens: Tensor, *, smoothing: float) -> StepLosses:
        """Computes logits at the M predicted tokens, their losses and the mean of these.

        Args:
            network: The network.
            batch: The batch with its draws.
            tokens: (B, N) int64 in [0, K), the true tokens.
            smoothing: Label smoothing, in [0, 1).
        """
        draws, config = batch.step_draws, self.config.network
        targets = tokens.flatten()[draws.positions]  # (M,)
        needs = self._needs if self.training else frozenset()

        def measure(logits: Tensor, place: slice) -> Tensor:
            statistics = token_statistics(
                logits, targets[place], label_smoothing=smoothing, num_token_groups=config.num_token_groups
            )
            return torch.cat([statistics, logits], dim=1) if "logits" in needs else statistics

        with outputs_of(network.blocks, kept="hidden" in needs) as hidden:
            measures = network.measure_selected(
                self._hide(tokens, batch),  # 5
                draws.labels,
                draws.positions,
                measure,
                vectors=batch.vectors_for(config.condition_dim),
                vocabulary=self.config.loss_columns,
            )
        losses, nll, hits = measures[:, :3].unbind(1)
        extras = {
            "targets": lambda: targets,
            "logits": lambda: measures[:, 3:],
            "hidden": lambda: tuple(hidden),
            "code_vectors": self._code_vectors,
        }
        loss = self._average(losses, draws, {name: extras[name]() for name in needs})  # 6
        # A column of a tensor with a graph has one: sums of the logs would keep the graphs of their steps.
        return StepLosses(loss, nll.detach(), hits.detach())

    @property
    def _needs(self) -> frozenset[str]:
        """The names of the fields of ``losses.TokenLosses`` that the loss reads beside the cross-entropies."""
        return frozenset()

    def _hide(self, tokens: Tensor, batch: Batch) -> Tensor:
        """Returns what the network sees of the tokens (B, N) of a batch with its draws."""
        return tokens

    def _code_vectors(self) -> Tensor:
        """Returns the vectors (K, D) float32 of the codes of the tokenizer."""
        quantizer = self.tokenizer.network.quantizer
        return quantizer.lookup(torch.arange(quantizer.codebook_size, device=self.device)).float()

    def _average(self, losses: Tensor, draws: Draws, extras: Mapping[str, Any]) -> Tensor:
        """Returns the loss, scalar float32, from the cross-entropies (M,) float32 of the predicted tokens.

        ``extras`` are the values that ``_needs`` names.
        """
        return mean_over_rows(losses, draws.rows, num_rows=len(draws.mask))

    # 7, 8: the optimizer and the average

    def configure_model(self) -> None:
        """Checks the precision, and shards the networks block by block under FSDP2.

        The token embedding, which is tied to the output layer, stays in the root group.
        """
        if self._trainer is None:  # ``load_from_checkpoint``
            return
        check_precision(self.trainer.precision)
        if self.device_mesh is None:
            return
        mesh = self.device_mesh["data_parallel"]
        shard_blocks(self.transformer, self.transformer.blocks, mesh, precision=self.trainer.precision)
        # The average samples and is evaluated in float32, without mixed precision.
        shard_blocks(self.ema_network, self.ema_network.blocks, mesh, precision="32-true")

    def trained_groups(self) -> list[dict[str, Any]]:
        """Returns the parameter groups of the optimizer."""
        return parameter_groups(self.transformer, self.config.optimizer.weight_decay, prefix="transformer.")

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Builds the optimizer and its learning rate schedule, which advances with each step."""
        config = self.config.optimizer
        optimizer = build_optimizer(self.trained_groups(), config)
        max_steps = int(self.trainer.max_steps)
        scheduler = LambdaLR(optimizer, lambda step: config.learning_rate.factor(step, max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Sets the learning rate of the first step: a resumed run may have another decay or number of steps.

        A subclass with optimizers of its own keeps their rates.
        """
        if type(self).configure_optimizers is not TokenModel.configure_optimizers:
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
        """Clips the gradient norm at the Trainer's limit. All ranks skip the step if one norm is non-finite."""
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
        if not self._skips_update:
            step = self.trainer.global_step  # the current step is not counted yet
            update_ema(self.ema_network, self.transformer, decay=self.config.ema_decay, step=step)

    # Logs and validation

    def _log_step(self, batch: Batch, losses: StepLosses, batch_idx: int) -> None:
        """Adds the tokens of a micro-batch to the means of this rank, which the last one of a step logs."""
        draws = batch.step_draws
        bins = self._assign_bins(draws.mask, draws.positions).masked_fill(~draws.is_masked, NUM_BINS)
        self._bins.add(bins, losses.token_losses, losses.hits)
        is_logged = (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]  # set late
        if not is_logged or (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return
        loss = losses.loss.detach()
        self.log("train/loss", loss, prog_bar=True, logger=False)
        finite = {name: value for name, value in self._bins.take(loss).items() if math.isfinite(value)}
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self._log_metrics({**finite, "learning-rate": rate}, self.trainer.global_step + 1)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds loss and accuracy of the averaged network, without class dropout and label smoothing."""
        batch = self._with_draws(batch)
        losses = self.compute_losses(self.ema_network, batch, self._encode(batch), smoothing=0.0)
        self._validation_loss.update(losses.token_losses)
        self._validation_accuracy.update(losses.hits)

    def on_validation_epoch_end(self) -> None:
        """Logs loss and accuracy over all predicted tokens of all ranks."""
        metrics = {"val/loss": self._validation_loss, "val/accuracy": self._validation_accuracy}
        values = {name: metric.compute() for name, metric in metrics.items()}  # over all ranks
        is_fitting = self.trainer.state.fn == TrainerFn.FITTING
        self.log_dict(values, prog_bar=True, logger=False if is_fitting else None, sync_dist=True)
        if is_fitting and not self.trainer.sanity_checking:  # Lightning's own logging would be a step too early
            self._log_metrics({name: float(value) for name, value in values.items()}, self.trainer.global_step)
        for metric in metrics.values():
            metric.reset()

    def _log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Writes metrics to all loggers; ``step`` counts finished steps."""
        for logger in self.loggers:
            logger.log_metrics(metrics, step=step)

    # Weights

    def start_from(self, folder: Path) -> None:
        """Replaces the initial weights by those of a pretrained transformer folder. Call it before the first step.

        See ``pretrained.fine_tuning.weights_for`` for other classes.
        """
        transformer, beside = load_transformer(folder), Path(folder).with_name("tokenizer")
        if beside.is_dir():
            transformer.check_tokenizer(fingerprint(beside))
        weights = weights_for(self.config.network, transformer)
        for network in (self.transformer, self.ema_network):
            network.load_state_dict(weights)

    def export(self, folder: Path | str, *, class_names: Sequence[str]) -> None:
        """Writes a folder for ``MaskGIT.from_pretrained``. Call it on all ranks; rank 0 writes.

        Args:
            folder: Output folder, for ``transformer`` with the averaged weights and a copy of ``tokenizer``, if any.
            class_names: Name of each class.
        """
        names = check_class_names("class_names", class_names, self.config.network.num_classes)
        # Under FSDP2 all ranks gather the weights, so this line must not depend on the rank.
        weights, tokenizer_folder = full_state(self.ema_network), Path(folder) / "tokenizer"
        if self.global_rank == 0:
            if self.config.tokenizer is not None:
                copy_stage_folder(Path(self.config.tokenizer), tokenizer_folder)
            save_transformer(
                tokenizer_folder.with_name("transformer"),
                self.config.network,
                weights,
                mask_schedule=self.mask_schedule_spec,
                decoding=self.decoding,
                class_names=names,
                tokenizer_fingerprint=None if self.config.tokenizer is None else self.tokenizer.fingerprint,
                corruption=self.decoding_corruption,
            )


class BinnedMeans:
    """Sums over the predicted tokens of this rank since the last reading, by ranges of ``binned_by``."""

    def __init__(self, binned_by: str) -> None:
        self.binned_by = binned_by
        self._sums: Tensor | None = None  # (bins + 1, 3) of predicted tokens: count, summed loss, summed hits

    def add(self, bins: Tensor, token_loss: Tensor, hits: Tensor) -> None:
        """Adds M tokens, with the group in [0, 4], loss and hit of each; those of group 4 are not counted."""
        values = torch.stack([torch.ones_like(hits), token_loss.detach(), hits], dim=1)  # (M, 3)
        # Made on the device: a copy from the host would wait. Each call has sums of its own: in float32,
        # single values that are added to a sum of millions are rounded.
        sums = torch.zeros(NUM_BINS + 1, 3, device=values.device).index_add(0, bins, values)
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self, loss: Tensor) -> dict[str, float]:
        """Returns the scalar loss of a step and the means of the groups with tokens, and starts new sums."""
        # One copy to the host for all values: each copy waits for the device.
        assert self._sums is not None
        value, *sums = torch.cat([loss.reshape(1), self._sums[:NUM_BINS].flatten()]).tolist()
        self._sums = None
        bins = list(zip(sums[::3], sums[1::3], sums[2::3], strict=True))
        accuracy = sum(hits for *_, hits in bins) / sum(count for count, *_ in bins)
        metrics = {"train/loss": value, "train/accuracy": accuracy}
        for number, (count, summed_loss, hits) in enumerate(bins):
            if count:
                name = f"{self.binned_by}-{number / NUM_BINS:.2f}-{(number + 1) / NUM_BINS:.2f}"
                metrics[f"train/loss/{name}"] = summed_loss / count
                metrics[f"train/accuracy/{name}"] = hits / count
        return metrics
