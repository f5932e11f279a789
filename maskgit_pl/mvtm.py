"""Stage 2: masked visual token modeling. The transformer learns to predict masked tokens from the visible ones.

``MaskedTokenModel`` owns the mask schedule, and passes the same object to ``MaskSampler`` and ``ParallelDecoder``. See
``token_model`` for the steps of training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import Tensor

from maskgit_pl.checks import check_integer, check_number
from maskgit_pl.data import Batch
from maskgit_pl.decoding import ConditionalModel, DecodingConfig, DecodingStep, decode_classes
from maskgit_pl.masking import MaskSampler
from maskgit_pl.networks.backbone import create_network
from maskgit_pl.schedules import mask_schedules
from maskgit_pl.token_model import NUM_BINS, TokenModel, TokenModelConfig, check_decoding

__all__ = ["MaskedTokenConfig", "MaskedTokenModel"]


@dataclass(frozen=True)
class MaskedTokenConfig(TokenModelConfig):
    """The configuration of ``MaskedTokenModel``.

    Args:
        network: Configuration of the backbone, with bidirectional attention.
        optimizer: Settings of AdamW and its learning rate.
        tokenizer: Path of the pretrained tokenizer folder.
        label_smoothing: Label smoothing of the training loss, in [0, 1).
        loss_vocabulary: Columns of the softmax of the loss: ``codes``, or ``all`` rows of the token embedding.
        ema_decay: Decay of the averaged weights, which are sampled, evaluated and exported, in [0, 1); 0 for none.
        flip_probability: Probability of a horizontal flip, in [0, 1]; only for images that are encoded on the fly.
        seed: Seed of masks, class dropout, flips and dropout, in [0, 2**32).
        activation_checkpointing: ``blocks`` saves memory by computing the blocks again in the backward pass.
        compiled: ``blocks`` compiles the blocks of the trained network with ``torch.compile``.
        global_batch: Samples per step over all ranks and micro-batches. The mask ratios of a global batch are
            stratified; see ``MaskSampler``.
        mask_schedule: Name or mapping of a registered mask schedule, for training and decoding.
        min_mask_ratio: Lower bound of the mask ratio in training, in [0, 1].
        decoding: Decoding settings for sample images, and of the exported model.

    Raises:
        ValueError: if a number is out of range, a name is unknown, there are more decoding steps than tokens, or
            guidance is set without a null class.
    """

    _: KW_ONLY
    global_batch: int
    mask_schedule: str | dict[str, Any] = "cosine"
    min_mask_ratio: float = 0.0
    decoding: DecodingConfig = DecodingConfig()  # noqa: RUF009  # frozen

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.network.attention != "bidirectional":
            raise ValueError(
                f"network.attention must be 'bidirectional' for MaskedTokenModel, got {self.network.attention!r}; "
                "AutoregressiveModel trains a causal transformer"
            )
        check_integer("global_batch", self.global_batch, "[1, 4294967296]")
        mask_schedules.build(self.mask_schedule)
        check_number("min_mask_ratio", self.min_mask_ratio, "[0, 1]")
        check_decoding(self.decoding, self.network, is_autoregressive=False)


class MaskedTokenModel(TokenModel):
    """The LightningModule that trains a backbone to predict masked tokens.

    Args:
        config: Network, mask schedule, optimizer, tokenizer and loss.

    Source: paper, training objective.
    """

    config: MaskedTokenConfig
    binned_by = "mask-ratio"

    def __init__(self, config: MaskedTokenConfig) -> None:
        super().__init__(config, create_network(config.network), config.decoding)
        self.mask_schedule_spec = config.mask_schedule
        self.mask_schedule = mask_schedules.build(config.mask_schedule)
        self.mask_sampler = MaskSampler(self.mask_schedule, config.seed, config.min_mask_ratio)
        self.decoder = config.decoding.build_decoder(self.mask_schedule)

    def _draw_mask(self, batch: Batch) -> Tensor:
        if self.training:  # validation batches may have other sizes
            self._check_batch(len(batch.labels))
        return self.mask_sampler.mask(
            self.config.network.num_tokens,
            index=batch.index,
            epoch=batch.epoch,
            position=batch.position,
            global_batch=self.config.global_batch,
        )

    def _check_batch(self, rows: int) -> None:
        """Checks the size of the batches against ``config.global_batch``: other sizes would leave strata empty.

        Raises:
            ValueError: if it differs.
        """
        ranks, accumulated = self.trainer.world_size, self.trainer.accumulate_grad_batches
        if rows * ranks * accumulated != self.config.global_batch:
            raise ValueError(
                f"global_batch must be the samples per step of the data, got {self.config.global_batch} and {rows} "
                f"samples x {ranks} ranks x {accumulated} accumulated; give MaskedTokenConfig the data's global batch"
            )

    def _mask_tokens(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return tokens.masked_fill(mask, self.config.network.mask_token_id)

    def _assign_bins(self, mask: Tensor) -> Tensor:
        """Groups tokens by the mask ratio of their row: bin i holds ratios in (i / 4, (i + 1) / 4]."""
        row_bins = ((mask.float().mean(1) * NUM_BINS).ceil().long() - 1).clamp(0, NUM_BINS - 1)  # (B,)
        return row_bins.unsqueeze(1).expand_as(mask)[mask]  # (M,)

    def _decode(self, labels: Sequence[int], seeds: Sequence[int], vectors: Tensor | None) -> Iterator[DecodingStep]:
        return decode_classes(
            ConditionalModel.from_network(self.averaged_network, self.device).bind(
                None if vectors is None else vectors.to(self.device)
            ),
            labels,
            seeds,
            decoder=self.decoder,
            scales=self.decoding.scales(),
        )
