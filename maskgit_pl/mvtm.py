"""Stage 2: masked visual token modeling. The transformer learns to predict masked tokens from the visible ones.

``MaskedTokenModel`` owns the mask schedule, and passes the same object to ``MaskSampler`` and
``ParallelDecoder``. The numbers of its comments are those of the steps in ``training.token_model``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from maskgit_pl.checks import check_integer
from maskgit_pl.data.batches import Batch
from maskgit_pl.decoding.config import DecodingConfig, set_specs
from maskgit_pl.decoding.decoder import DecodingStep, decode_classes
from maskgit_pl.decoding.predictors import ConditionalModel
from maskgit_pl.masking import Draws, MaskSampler, mask_positions, mask_ratios, true_positions
from maskgit_pl.networks.backbone import create_network
from maskgit_pl.objectives import (
    Corruption,
    Objective,
    TokenLosses,
    corruptions,
    objectives,
)
from maskgit_pl.schedules import mask_schedules
from maskgit_pl.training.token_model import NUM_BINS, StepLosses, TokenModel, TokenModelConfig, check_decoding

__all__ = ["MaskedTokenConfig", "MaskedTokenModel"]

_NUM_SIZES = 8  # numbers of predicted tokens that a compiled step is made for; torch compiles 8 variants at most


@dataclass(frozen=True)
class MaskedTokenConfig(TokenModelConfig):
    """The configuration of ``MaskedTokenModel``: that of ``TokenModelConfig``, with bidirectional attention, and masks.

    Args:
        global_batch: Samples per step over all ranks and micro-batches. The mask ratios of a global batch are
            stratified; see ``MaskSampler``.
        mask_schedule: Name or mapping of a registered mask schedule, for training and decoding; this and the
            following parts may be objects of registered classes, too.
        min_mask_ratio: Lower bound of the mask ratio in training, in [0, 1].
        mask_ratio: Name or mapping of a registered distribution of the mask ratio in training.
        mask_positions: Name or mapping of a registered rule for the positions that are masked in training.
        objective: Name or mapping of a registered objective, the loss of the training.
        corruption: Name or mapping of a registered corruption of visible tokens in training; None for none.
        decoding: Decoding settings for sample images, and of the exported model.

    Raises:
        ValueError: if a number is out of range, a name is unknown, there are more decoding steps than tokens, guidance
            is set without a null class, or the objective ``elbo`` is given mask ratios that leave out some counts.
    """

    _: KW_ONLY
    global_batch: int
    mask_schedule: str | dict[str, Any] = "cosine"
    min_mask_ratio: float = 0.0
    mask_ratio: str | dict[str, Any] = "schedule"
    mask_positions: str | dict[str, Any] = "uniform"
    objective: str | dict[str, Any] = "masked_cross_entropy"
    corruption: str | dict[str, Any] | None = None
    decoding: DecodingConfig = DecodingConfig()  # noqa: RUF009  # frozen

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.network.attention != "bidirectional":
            raise ValueError(
                f"network.attention must be 'bidirectional' for MaskedTokenModel, got {self.network.attention!r}; "
                "AutoregressiveModel trains a causal transformer"
            )
        set_specs(
            self,
            mask_schedule=mask_schedules,
            mask_ratio=mask_ratios,
            mask_positions=mask_positions,
            objective=objectives,
            corruption=corruptions,
        )
        check_integer("global_batch", self.global_batch, "[1, 4294967296]")
        self.built_objective.check(self.sampler, self.network.num_tokens)
        _ = self.built_corruption  # built now, so that it is checked
        check_decoding(self.decoding, self.network, is_autoregressive=False)

    @cached_property
    def sampler(self) -> MaskSampler:
        """The sampler of the masks. Its schedule is the one that decoding follows."""
        return MaskSampler(
            mask_schedules.build(self.mask_schedule),
            self.seed,
            self.min_mask_ratio,
            mask_ratios.build(self.mask_ratio),
            mask_positions.build(self.mask_positions),
        )

    @cached_property
    def built_objective(self) -> Objective:
        """The objective that ``objective`` names."""
        return objectives.build(self.objective)

    @cached_property
    def built_corruption(self) -> Corruption | None:
        """The corruption that ``corruption`` names."""
        return None if self.corruption is None else corruptions.build(self.corruption)


class MaskedTokenModel(TokenModel):
    """The LightningModule that trains a backbone to predict masked tokens.

    Args:
        config: Network, mask schedule, optimizer, tokenizer and loss.

    Source: paper, training objective.
    """

    config: MaskedTokenConfig
    config_class = MaskedTokenConfig
    binned_by = "mask-ratio"

    def __init__(self, config: MaskedTokenConfig) -> None:
        super().__init__(config, create_network(config.network), config.decoding)
        self.mask_schedule_spec = config.mask_schedule
        # One schedule for training and decoding.
        self.mask_sampler = config.sampler
        self.mask_schedule = config.sampler.mask_schedule
        self.decoder = config.decoding.build_decoder(self.mask_schedule)
        self.objective, self.corruption = config.built_objective, config.built_corruption

    def draw_on_host(self, batch: Batch) -> Batch:
        """Checks the size of a batch, which would leave strata empty, and adds the random draws of the step.

        Raises:
            ValueError: if the size does not fit ``config.global_batch``.
        """
        if self.training:  # validation batches may have other sizes
            rows, ranks, accumulated = len(batch.labels), self.trainer.world_size, self.trainer.accumulate_grad_batches
            if rows * ranks * accumulated != self.config.global_batch:
                raise ValueError(
                    f"global_batch must be the samples per step of the data, got {self.config.global_batch} and "
                    f"{rows} samples x {ranks} ranks x {accumulated} accumulated; give MaskedTokenConfig the data's "
                    "global batch"
                )
        return super().draw_on_host(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Computes the loss of one micro-batch, scalar float32."""
        batch = self._with_draws(batch)  # 1, 2, if the data module has not made them on the host
        self._reseed_dropout(batch_idx)  # 3
        tokens = self._encode(batch)  # 4 (B, N)
        seen = tokens if self.corruption is None else self._corrupt(batch, tokens)  # (B, N)
        losses = self._run_step(batch._replace(content=seen), tokens)  # 5, 6
        self._log_step(batch, losses, batch_idx)
        return losses.loss

    def _draw(self, batch: Batch) -> Draws:
        network = self.config.network
        key: dict[str, Any] = {
            "index": batch.index,
            "epoch": batch.epoch,
            "position": batch.position,
            "global_batch": self.config.global_batch,
        }
        # 1. Mask. 2. Drop classes.
        draws = self._draws_of(batch, self.mask_sampler.mask(network.num_tokens, **key, grid=network.grid))
        if not self.training:
            return draws
        # Corruptions and some objectives need more.
        if self.corruption is not None:
            replaced, uniform = self.corruption.draw(
                draws.mask, seed=self.config.seed, index=batch.index, epoch=batch.epoch
            )
            draws = draws._replace(replaced=replaced, replaced_positions=true_positions(replaced), uniform=uniform)
            draws = draws.predict(draws.mask | replaced)
        if self.objective.needs_slopes:
            draws = draws._replace(slopes=self.mask_sampler.slope(network.num_tokens, **key))
        if self.objective.visible_weight > 0:
            return draws.predict(torch.ones_like(draws.mask))
        if self.config.compiled == "step":
            return draws.pad(max(1, draws.mask.numel() // _NUM_SIZES))
        return draws

    def _compute_training_losses(self, batch: Batch, tokens: Tensor) -> StepLosses:
        """Computes the loss of the paper, the cross-entropy at the masked tokens, or another objective."""
        draws = batch.draws
        assert draws is not None
        # 5. Mask, and predict the masked tokens.
        hidden = batch.content.masked_fill(draws.mask, self.config.network.mask_token_id)  # (B, N)
        losses, nll, hits = self._predict(
            self.transformer, hidden, batch, tokens, smoothing=self.config.label_smoothing
        )  # (M,) each
        # 6. Average over the tokens of each image, then over images.
        loss = self.objective(TokenLosses.of(losses, draws))
        return StepLosses(loss, nll, hits)

    @torch.no_grad()
    def _corrupt(self, batch: Batch, tokens: Tensor) -> Tensor:
        """Replaces some visible tokens, and returns the tokens (B, N)."""
        draws, network = batch.draws, self.averaged_network.eval()
        assert self.corruption is not None
        assert draws is not None
        mask, replaced, places, uniform = draws.mask, draws.replaced, draws.replaced_positions, draws.uniform
        assert replaced is not None
        assert places is not None
        assert uniform is not None
        vectors = batch.vectors_for(self.config.network.condition_dim)

        def predict(hidden: Tensor) -> Tensor:
            positions = places if hidden is replaced else true_positions(hidden)
            seen = self._hide(tokens, mask | hidden)
            return network.forward_selected(seen, draws.labels, positions, vectors=vectors)

        size = self.config.network.codebook_size
        codes = self.corruption.codes(tokens, replaced, uniform, codebook_size=size, predict=predict)  # (R,)
        self.transformer.train(self.training)  # without an average, it is the network that drew
        torch.clear_autocast_cache()  # casts of weights made without gradients would cut the graph
        return tokens.masked_scatter(replaced, codes)

    def _assign_bins(self, mask: Tensor, positions: Tensor) -> Tensor:
        """Groups tokens by the mask ratio of their row: bin i holds ratios in (i / 4, (i + 1) / 4]."""
        row_bins = ((mask.float().mean(1) * NUM_BINS).ceil().long() - 1).clamp(0, NUM_BINS - 1)  # (B,)
        return row_bins[positions // mask.shape[1]]  # (M,)

    def _decode(self, labels: Sequence[int], seeds: Sequence[int], vectors: Tensor | None) -> Iterator[DecodingStep]:
        vectors = None if vectors is None else vectors.to(self.device)
        model = ConditionalModel.from_network(self.averaged_network, self.device).bind(vectors)
        return decode_classes(model, labels, seeds, decoder=self.decoder, scales=self.decoding.scales())
