"""Stage 2: masked visual token modeling. The transformer learns to predict masked tokens from the visible ones.

``MaskedTokenModel`` owns the mask schedule, and passes the same object to ``MaskSampler`` and
``ParallelDecoder``. ``transformer.token_model`` lists the steps of the training, and calls the methods here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from maskgit_pl.data.batches import Batch
from maskgit_pl.decoding.corruption import Mask
from maskgit_pl.decoding.decoder import DecodingStep, decode_classes
from maskgit_pl.decoding.predictors import ConditionalModel
from maskgit_pl.masking import Draws
from maskgit_pl.networks.backbone import create_network
from maskgit_pl.randomness import random_uniform
from maskgit_pl.transformer.config import MaskedTokenConfig
from maskgit_pl.transformer.losses import TokenLosses
from maskgit_pl.transformer.token_model import NUM_BINS, TokenModel


class MaskedTokenModel(TokenModel):
    """The LightningModule that trains a backbone to predict masked tokens. Source: paper, objective."""

    config: MaskedTokenConfig
    config_class = MaskedTokenConfig
    binned_by = "mask-ratio"

    def __init__(self, config: MaskedTokenConfig) -> None:
        super().__init__(config, create_network(config.network), config.decoding)
        self.mask_schedule_spec = config.mask_schedule
        # One schedule for training and decoding.
        self.mask_sampler = config.sampler
        self.mask_schedule = config.sampler.mask_schedule
        self.corruption = config.built_corruption
        self.decoding_corruption = self.corruption if self.corruption.in_decoding else None
        self.decoder = config.decoding.build_decoder(self.mask_schedule, self.decoding_corruption)
        self.objective = config.built_objective

    def on_fit_start(self) -> None:
        """Checks that the masks are stratified over the batches of the data module, if it tells their size.

        Raises:
            ValueError: if the model has another global batch.
        """
        own = self.config.global_batch
        given = getattr(getattr(self.trainer, "datamodule", None), "global_batch", own)
        if given != own:
            raise ValueError(
                f"global_batch of the model must be {given}, that of the data module, got {own}; give both the same"
            )

    def _draw(self, batch: Batch) -> Draws:
        network = self.config.network
        mask = self.mask_sampler.mask(
            network.num_tokens,
            index=batch.index,
            epoch=batch.epoch,
            position=batch.position,
            global_batch=self.config.global_batch,
            grid=network.grid,
        )
        draws = self._draws_of(batch, mask)
        if self.training and self.objective.visible_weight > 0:
            return draws._replace(positions=torch.arange(mask.numel(), device=mask.device))  # all tokens are predicted
        return draws

    @property
    def _needs(self) -> frozenset[str]:
        return self.objective.needs

    def _hide(self, tokens: Tensor, batch: Batch) -> Tensor:
        """Returns the corrupted tokens; in validation those of masks only, unless the corruption is of decoding too."""
        network, corruption = self.config.network, self.corruption

        def uniform(name: str) -> Tensor:
            seed, size = self.config.seed, network.num_tokens
            return random_uniform(f"corruption/{name}", seed=seed, index=batch.index, epoch=batch.epoch, count=size)

        seen = corruption if self.training or corruption.in_decoding else Mask()
        codes, mask_id = network.codebook_size, network.mask_token_id
        return seen(tokens, batch.step_draws.mask, uniform, codebook_size=codes, mask_token_id=mask_id)

    def _average(self, losses: Tensor, draws: Draws, extras: Mapping[str, Any]) -> Tensor:
        """Returns the loss of the paper, the cross-entropy at the masked tokens, or another objective."""
        if not self.training and self.objective.needs:
            return super()._average(losses, draws, {})  # the loss of the paper: validation logs no other
        return self.objective(TokenLosses(losses, draws.rows, len(draws.mask), draws.is_masked, **extras))

    def _assign_bins(self, mask: Tensor, positions: Tensor) -> Tensor:
        """Groups tokens by the mask ratio of their row: bin i holds ratios in (i / 4, (i + 1) / 4]."""
        row_bins = ((mask.float().mean(1) * NUM_BINS).ceil().long() - 1).clamp(0, NUM_BINS - 1)  # (B,)
        return row_bins[positions // mask.shape[1]]  # (M,)

    def sample(
        self, labels: Sequence[int], seeds: Sequence[int], vectors: Tensor | None = None
    ) -> Iterator[DecodingStep]:
        vectors = None if vectors is None else vectors.to(self.device)
        model = ConditionalModel(self.ema_network, self.device).bind(vectors)
        return decode_classes(model, labels, seeds, decoder=self.decoder, scales=self.decoding.scales())
