"""Stage 2: masked visual token modeling. The transformer learns to predict masked tokens from the visible ones.

``MaskedTokenModel`` owns the mask schedule and hands the one object to its ``MaskSampler`` and its ``ParallelDecoder``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from torch import Tensor

from maskgit_pl.data import Batch
from maskgit_pl.decoding import ConditionalModel, DecodingConfig, DecodingStep, decode_classes
from maskgit_pl.masking import MaskSampler
from maskgit_pl.networks.transformer import MaskedTransformer, TransformerConfig
from maskgit_pl.schedules import mask_schedules
from maskgit_pl.token_model import NUM_BINS, TokenModel
from maskgit_pl.training.optimizers import LearningRate

__all__ = ["MaskedTokenModel"]


class MaskedTokenModel(TokenModel):
    """Trains a ``MaskedTransformer`` to predict masked tokens.

    Args:
        network: Sizes of the transformer.
        learning_rate: As of ``TokenModel``.
        tokenizer: As of ``TokenModel``.
        mask_schedule: Name or mapping of a registered mask schedule, for training and decoding alike.
        decoding: How sample pictures, and later users of the exported model, decode.
        min_mask_ratio: Lower bound of the mask ratio in training, in [0, 1].
        shared: As of ``TokenModel``.

    Raises:
        ValueError: More decoding steps than tokens, an unknown name, or guidance without a null class.

    Source: paper, training objective.
    """

    binned_by = "mask-ratio"

    def __init__(
        self,
        network: TransformerConfig,
        learning_rate: LearningRate,
        tokenizer: str,
        *,
        mask_schedule: str | dict[str, Any] = "cosine",
        decoding: DecodingConfig = DecodingConfig(),  # noqa: B008  # frozen
        min_mask_ratio: float = 0.0,
        **shared: Any,
    ) -> None:
        super().__init__(MaskedTransformer(network), learning_rate, tokenizer, decoding=decoding, **shared)
        self.mask_schedule_spec = mask_schedule
        self.mask_schedule = mask_schedules.build(mask_schedule)
        self.mask_sampler = MaskSampler(self.mask_schedule, self.seed, min_mask_ratio)
        self.decoder = decoding.decoder(self.mask_schedule)
        self.decoder.masked_counts([network.num_tokens], network.num_tokens)  # refuses too many steps

    def _mask(self, batch: Batch) -> Tensor:
        return self.mask_sampler.mask(
            self.config.num_tokens,
            index=batch.index,
            epoch=batch.epoch,
            position=batch.position,
            global_batch=self.trainer.datamodule.global_batch,  # type: ignore[attr-defined]  # set by fit(datamodule=)
        )

    def _visible(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return tokens.masked_fill(mask, self.config.mask_token_id)

    def _bins(self, mask: Tensor) -> Tensor:
        """By the mask ratio of the token's row."""
        of_row = ((mask.float().mean(1) * NUM_BINS).ceil().long() - 1).clamp(0, NUM_BINS - 1)
        return of_row.unsqueeze(1).expand_as(mask)[mask]

    def _decode(self, labels: Sequence[int], seeds: Sequence[int]) -> Iterator[DecodingStep]:
        return decode_classes(
            ConditionalModel.of(cast("MaskedTransformer", self.averaged_network), self.device),
            labels,
            seeds,
            decoder=self.decoder,
            scales=self.decoding.scales(),
        )
