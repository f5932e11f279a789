"""Stage 2: masked visual token modeling. The transformer learns to predict masked tokens from the visible ones.

``MaskedTokenModel`` owns the mask schedule, and passes the same object to ``MaskSampler`` and ``ParallelDecoder``. See
``token_model`` for the steps of training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from maskgit_pl.checks import check_integer
from maskgit_pl.data import Batch
from maskgit_pl.decoding import ConditionalModel, DecodingConfig, DecodingStep, decode_classes
from maskgit_pl.masking import Draws, MaskSampler, mask_positions, mask_ratios, true_positions
from maskgit_pl.networks.backbone import create_network
from maskgit_pl.objectives import (
    Corruption,
    Objective,
    TokenLosses,
    balanced_clusters,
    corruptions,
    objectives,
)
from maskgit_pl.registry import Registry
from maskgit_pl.schedules import mask_schedules
from maskgit_pl.training.optimized_model import TokenModelConfig, check_decoding
from maskgit_pl.training.token_model import NUM_BINS, StepLosses, TokenModel

__all__ = ["MaskedTokenConfig", "MaskedTokenModel"]

_PARTS: dict[str, Registry[Any]] = {  # field of the configuration -> registry of its names
    "mask_schedule": mask_schedules,
    "mask_ratio": mask_ratios,
    "mask_positions": mask_positions,
    "objective": objectives,
    "corruption": corruptions,
}
_NUM_SIZES = 8  # numbers of predicted tokens that a compiled step is made for; torch compiles 8 variants at most


@dataclass(frozen=True)
class MaskedTokenConfig(TokenModelConfig):
    """The configuration of ``MaskedTokenModel``.

    Args:
        network: Configuration of the backbone, with bidirectional attention.
        optimizer: The optimizer and its learning rate.
        tokenizer: Path of the pretrained tokenizer folder.
        label_smoothing: Label smoothing of the training loss, in [0, 1).
        loss_vocabulary: Columns of the softmax of the loss: ``codes``, or ``all`` rows of the token embedding.
            With token groups it is ``codes``: the softmax of each group.
        ema_decay: Decay of the averaged weights, which are sampled, evaluated and exported, in [0, 1); 0 for none.
        flip_probability: Probability of a horizontal flip, in [0, 1]; only for images that are encoded on the fly.
        seed: Seed of masks, class dropout, flips and dropout, in [0, 2**32).
        activation_checkpointing: ``blocks`` saves memory by computing the blocks again in the backward pass.
        compiled: ``blocks`` compiles the blocks of the trained network with ``torch.compile``, ``step`` forward pass
            and loss as one graph.
        global_batch: Samples per step over all ranks and micro-batches. The mask ratios of a global batch are
            stratified; see ``MaskSampler``.
        mask_schedule: Name or mapping of a registered mask schedule, for training and decoding; this and the following
            parts may be objects of registered classes, too.
        min_mask_ratio: Lower bound of the mask ratio in training, in [0, 1].
        mask_ratio: Name or mapping of a registered distribution of the mask ratio in training.
        mask_positions: Name or mapping of a registered rule for the positions that are masked in training.
        objective: Name or mapping of a registered objective, the loss of the training.
        corruption: Name or mapping of a registered corruption of visible tokens in training; None for none.
        decoding: Decoding settings for sample images, and of the exported model.

    Raises:
        ValueError: if a number is out of range, a name is unknown, there are more decoding steps than tokens, guidance
            is set without a null class, the objective ``elbo`` is given mask ratios that leave out some counts, or an
            objective with clusters does not fit the codebook.
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
        for name, registry in _PARTS.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, registry.spec(getattr(self, name)))
        check_integer("global_batch", self.global_batch, "[1, 4294967296]")
        self.built_objective.check(self.sampler, self.network, tokenizer=self.tokenizer)
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
    code_clusters: Tensor | None  # (n, K / n) int64: the codes of each cluster; None if the objective needs none

    def __init__(self, config: MaskedTokenConfig) -> None:
        super().__init__(config, create_network(config.network), config.decoding)
        self.mask_schedule_spec = config.mask_schedule
        # One schedule for training and decoding.
        self.mask_sampler = config.sampler
        self.mask_schedule = config.sampler.mask_schedule
        self.decoder = config.decoding.build_decoder(self.mask_schedule)
        self.objective, self.corruption = config.built_objective, config.built_corruption
        codes, num_clusters = torch.arange(config.network.codebook_size), self.objective.num_clusters
        self.register_buffer("code_clusters", codes.view(num_clusters, -1) if num_clusters else None)

    def _compute_training_losses(self, batch: Batch, tokens: Tensor) -> StepLosses:
        """Computes the loss of the paper, the cross-entropy at the masked tokens, or another objective."""
        draws = batch.draws
        assert draws is not None
        # 5. Mask, and predict the masked tokens.
        hidden = batch.content.masked_fill(draws.mask, self.config.network.mask_token_id)  # (B, N)
        losses, nll, hits, cluster_losses = self._predict(
            self.transformer, hidden, batch, tokens, smoothing=self.config.label_smoothing, clusters=self.code_clusters
        )  # (M,) each
        # 6. Average over the tokens of each image, then over images.
        loss = self.objective(TokenLosses.of(losses, draws, cluster_losses=cluster_losses))
        return StepLosses(loss, nll, hits, draws.counted)

    def setup(self, stage: str) -> None:
        """Computes the clusters of the tokenizer's codes, if the objective needs them; a checkpoint replaces them."""
        if stage == TrainerFn.FITTING and self.code_clusters is not None:
            every = torch.arange(self.config.network.codebook_size, device=self.device)
            codes = self.tokenizer.network.quantizer.lookup(every)  # (K, D)
            self.code_clusters.copy_(balanced_clusters(codes, len(self.code_clusters), seed=self.config.seed))

    def draw_on_host(self, batch: Batch) -> Batch:
        """Checks the size of a batch, and adds the random draws of the step.

        Raises:
            ValueError: if the size does not fit ``config.global_batch``.
        """
        if self.training:  # validation batches may have other sizes
            self._check_batch(len(batch.labels))
        return super().draw_on_host(batch)

    def _draw_mask(self, batch: Batch) -> Tensor:
        return self.mask_sampler.mask(
            self.config.network.num_tokens, **self._place(batch), grid=self.config.network.grid
        )

    def _place(self, batch: Batch) -> dict[str, Any]:
        """Returns the arguments of the mask sampler that say which samples of the training a batch holds."""
        place = {"index": batch.index, "epoch": batch.epoch, "position": batch.position}
        return {**place, "global_batch": self.config.global_batch}

    def _draw(self, batch: Batch) -> Draws:
        draws = super()._draw(batch)
        if not self.training:
            return draws
        if self.corruption is not None:
            replaced, uniform = self.corruption.draw(
                draws.mask, seed=self.config.seed, index=batch.index, epoch=batch.epoch
            )
            draws = draws._replace(replaced=replaced, replaced_positions=true_positions(replaced), uniform=uniform)
            draws = draws.predict(draws.mask | replaced)
        if self.objective.needs_slopes:
            draws = draws._replace(slopes=self.mask_sampler.slope(draws.mask.shape[1], **self._place(batch)))
        if self.objective.visible_weight > 0:
            return draws.predict(torch.ones_like(draws.mask))
        if self.config.compiled == "step":
            return draws.pad(max(1, draws.mask.numel() // _NUM_SIZES))
        return draws

    def _prepare(self, batch: Batch, tokens: Tensor) -> Batch:
        """Replaces some visible tokens, if there is a corruption; see ``TokenModel``."""
        return super()._prepare(batch, tokens if self.corruption is None else self._corrupt(batch, tokens))

    @torch.no_grad()
    def _corrupt(self, batch: Batch, tokens: Tensor) -> Tensor:
        """Replaces some visible tokens, and returns the tokens (B, N)."""
        draws, network = batch.draws, self.averaged_network.eval()
        assert self.corruption is not None
        assert draws is not None
        mask, labels, wanted, places = draws.mask, draws.labels, draws.replaced, draws.replaced_positions
        assert wanted is not None
        assert places is not None
        assert draws.uniform is not None
        vectors = batch.vectors_for(self.config.network.condition_dim)

        def predict(replaced: Tensor) -> Tensor:
            positions = places if replaced is wanted else true_positions(replaced)
            hidden = self._hide(tokens, mask | replaced)
            return network.forward_selected(hidden, labels, positions, vectors=vectors)

        size = self.config.network.codebook_size
        seen = self.corruption.corrupt(tokens, wanted, draws.uniform, codebook_size=size, predict=predict)
        self.transformer.train(self.training)  # without an average, it is the network that drew
        torch.clear_autocast_cache()  # casts of weights made without gradients would cut the graph
        return seen

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

    def _assign_bins(self, mask: Tensor, positions: Tensor) -> Tensor:
        """Groups tokens by the mask ratio of their row: bin i holds ratios in (i / 4, (i + 1) / 4]."""
        row_bins = ((mask.float().mean(1) * NUM_BINS).ceil().long() - 1).clamp(0, NUM_BINS - 1)  # (B,)
        return row_bins[positions // mask.shape[1]]  # (M,)

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
