"""The peers of ``decode.py`` and ``stage2_step.py``: networks of other projects, and plain decoding loops for them."""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maskgit_pl.data import Batch
from maskgit_pl.masking import MaskSampler
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.schedules import mask_schedules

__all__ = [
    "AMUSED",
    "BERT",
    "MUSE",
    "NUM_STEPS",
    "PEERS",
    "BertPeer",
    "Decode",
    "EncoderPeer",
    "MuseClasses",
    "Task",
    "build_amused",
    "build_muse",
    "build_plain",
    "is_installed",
]

Decode = Callable[[], Tensor]
"""Decodes a batch and gives its tokens (B, N)."""

NUM_STEPS = 8

MUSE, AMUSED = "muse-maskgit-pytorch", "diffusers aMUSEd"
BERT = "BertModel of transformers, as 1d-tokenizer"
PEERS = {MUSE: ("muse_maskgit_pytorch",), AMUSED: ("diffusers", "transformers"), BERT: ("transformers",)}
"""The packages that each peer needs."""


def is_installed(peer: str) -> bool:
    """Returns True if all packages that a peer needs are installed."""
    return all(importlib.util.find_spec(package) is not None for package in PEERS[peer])


@dataclass(frozen=True)
class Task:
    """The sizes of the network and the batch. There is no dropout, because the peer has none.

    The vocabulary is codebook_size + num_classes + 1: 2025 as released.
    """

    batch: int = 8
    depth: int = 4
    embed_dim: int = 768
    mlp_dim: int = 3072
    num_heads: int = 16
    grid: tuple[int, int] = (16, 16)
    codebook_size: int = 1024
    num_classes: int = 1000

    @property
    def network(self) -> TransformerConfig:
        return TransformerConfig(
            self.codebook_size, self.num_classes, self.grid, self.embed_dim, self.depth, self.num_heads, self.mlp_dim,
            dropout=0.0, class_dropout=0.0,
        )  # fmt: skip

    def data(self) -> Batch:
        """Returns the batch that every contender trains on in every round."""
        chance = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.codebook_size, (self.batch, self.network.num_tokens), generator=chance)
        labels = torch.randint(self.num_classes, (self.batch,), generator=chance)
        # Sample i is at position i of epoch 0, and no row is padding.
        index = torch.arange(self.batch)
        return Batch(tokens, labels, index, torch.zeros_like(index), index, index >= 0)

    def mask(self) -> Tensor:
        """Returns the mask (B, N) bool that training draws for ``data``."""
        batch = self.data()
        return MaskSampler(mask_schedules.build("cosine"), seed=0).mask(
            self.network.num_tokens,
            index=batch.index,
            epoch=batch.epoch,
            position=batch.position,
            global_batch=self.batch,
        )


class MuseClasses(nn.Module):
    """The transformer of muse-maskgit-pytorch; a class is a text of one token."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        from muse_maskgit_pytorch import MaskGitTransformer
        from transformers import T5Config

        self.classes = nn.Embedding(task.num_classes, task.embed_dim)
        with tempfile.TemporaryDirectory() as folder:
            # Without this file, the peer downloads the configuration of a text encoder.
            T5Config(d_model=task.embed_dim).save_pretrained(folder)
            self.transformer = MaskGitTransformer(
                num_tokens=task.network.vocabulary_size - 1,  # the peer adds the mask token
                seq_len=task.network.num_tokens,
                dim=task.embed_dim,
                depth=task.depth,
                heads=task.num_heads,
                dim_head=task.embed_dim // task.num_heads,
                ff_mult=task.mlp_dim // task.embed_dim,
                flash=False,  # on a CPU, its flash attention is slower and fails in bf16
                t5_name=folder,
            )

    def forward(self, tokens: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        """Returns the loss () at the targets (B, N) int64 that are not -1."""
        text = self.classes(labels).unsqueeze(1)
        loss: Tensor = self.transformer(tokens, text_embeds=text, labels=targets, ignore_index=-1)
        return loss


class Encoder(nn.Module):
    """A post-norm layer of torch's own modules with the erf form of GELU, as in dome272/MaskGIT-pytorch."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        width = task.embed_dim
        self.attention = nn.MultiheadAttention(width, task.num_heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, task.mlp_dim), nn.GELU(), nn.Linear(task.mlp_dim, width))
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, S, D) to (B, S, D)."""
        attended, _ = self.attention(x, x, x, need_weights=False)
        x = self.attention_norm(x + attended)
        normed: Tensor = self.mlp_norm(x + self.mlp(x))
        return normed


class EncoderPeer(nn.Module):
    """The network of dome272/MaskGIT-pytorch: ``Encoder`` layers, and a head that is tied to the token embedding.

    Its released code has no classes; here the class is a token of the sequence, as in ours.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        config = task.network
        self.codebook_size = config.codebook_size
        self.tokens = nn.Embedding(config.vocabulary_size, config.embed_dim)
        self.positions = nn.Parameter(0.02 * torch.randn(config.num_tokens + 1, config.embed_dim))
        self.norm = nn.LayerNorm(config.embed_dim, eps=1e-12)
        self.layers = nn.Sequential(*(Encoder(task) for _ in range(config.depth)))
        self.head = nn.Sequential(
            nn.Linear(config.embed_dim, config.embed_dim), nn.GELU(), nn.LayerNorm(config.embed_dim, eps=1e-12)
        )
        self.bias = nn.Parameter(torch.zeros(config.num_tokens + 1, config.vocabulary_size))
        nn.init.trunc_normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Returns the logits (B, N, V) of tokens (B, N) int64 and labels (B,) int64."""
        sequence = torch.cat([labels.unsqueeze(1) + self.codebook_size, tokens], dim=1)
        x = self.layers(self.norm(self.tokens(sequence) + self.positions))
        logits: Tensor = self.head(x) @ self.tokens.weight.T + self.bias
        return logits[:, 1:]


class BertPeer(nn.Module):
    """The network of 1d-tokenizer's ``ImageBert``: the ``BertModel`` of transformers, and a linear head."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = task.network
        self.codebook_size = config.codebook_size
        self.model = BertModel(
            BertConfig(
                vocab_size=config.vocabulary_size,
                hidden_size=config.embed_dim,
                num_hidden_layers=config.depth,
                num_attention_heads=config.num_heads,
                intermediate_size=config.mlp_dim,
                max_position_embeddings=config.num_tokens + 1,
                hidden_act="gelu",
            ),
            add_pooling_layer=False,
        )
        self.head = nn.Linear(config.embed_dim, config.codebook_size)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Returns the logits (B, N, K) of tokens (B, N) int64 and labels (B,) int64."""
        sequence = torch.cat([labels.unsqueeze(1) + self.codebook_size, tokens], dim=1)
        logits: Tensor = self.head(self.model(sequence).last_hidden_state[:, 1:])
        return logits


def build_plain(network: nn.Module, task: Task) -> Decode:
    """Returns a plain decoding loop for a peer's network: all logits in each step, Gumbel draws, cosine schedule."""
    network.eval().requires_grad_(requires_grad=False)
    labels = torch.arange(task.batch) % task.num_classes

    @torch.no_grad()
    def decode() -> Tensor:
        num_tokens = task.network.num_tokens
        tokens = torch.full((task.batch, num_tokens), task.network.mask_token_id)
        for step in range(NUM_STEPS):
            logits = network(tokens, labels)[..., : task.codebook_size].float()
            drawn = (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)
            masked = tokens == task.network.mask_token_id
            drawn = torch.where(masked, drawn, tokens)
            confidence = logits.log_softmax(-1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
            confidence -= 4.5 * (1 - (step + 1) / NUM_STEPS) * torch.empty_like(confidence).exponential_().log()
            confidence[~masked] = torch.inf  # known tokens stay
            count = int(num_tokens * math.cos(math.pi / 2 * (step + 1) / NUM_STEPS))
            tokens = drawn
            if count:
                last = confidence.topk(count, largest=False).indices
                tokens = drawn.scatter(1, last, task.network.mask_token_id)
        return tokens

    return decode


class _NoTokenizer(nn.Module):
    """A stand-in for a peer's tokenizer that returns tokens unchanged."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def get_encoded_fmap_size(self, image_size: int) -> int:
        return self.rows

    def decode_from_ids(self, tokens: Tensor) -> Tensor:
        return tokens


def build_muse(task: Task) -> Decode:
    """Returns muse-maskgit-pytorch's ``MaskGit.generate`` without guidance; a class is a text of one token."""
    from muse_maskgit_pytorch import muse_maskgit_pytorch as peer

    peer.tqdm = lambda steps, **_: steps  # no progress bar
    classes = MuseClasses(task).eval()
    transformer = classes.transformer
    transformer.encode_text = lambda texts: classes.classes(torch.arange(len(texts))).unsqueeze(1)
    model = peer.MaskGit.__new__(peer.MaskGit)  # its __init__ accepts only its own tokenizer
    nn.Module.__init__(model)
    model.vae, model.transformer, model.mask_id = _NoTokenizer(task.grid[0]), transformer, transformer.mask_id
    # The options of its __init__: no self-conditioning, no critic, cosine schedule.
    model.image_size, model.self_cond, model.noise_schedule = None, False, peer.cosine_schedule
    model.token_critic, model.resize_image_for_cond_image, model.no_mask_token_prob = None, False, 0.0

    def decode() -> Tensor:
        tokens: Tensor = model.generate([""] * task.batch, timesteps=NUM_STEPS, cond_scale=1)
        return tokens.flatten(1)

    return decode


def build_amused(task: Task) -> Decode:
    """Returns the aMUSEd pipeline of diffusers without guidance and tokenizer; a class is a text of one token."""
    from diffusers.utils import logging

    logging.set_verbosity_error()  # silences the deprecation warning of the pipeline
    from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel

    network = UVit2DModel(
        hidden_size=task.embed_dim,
        cond_embed_dim=task.embed_dim,
        encoder_hidden_size=task.embed_dim,
        vocab_size=task.codebook_size + 1,
        codebook_size=task.codebook_size,
        in_channels=task.embed_dim,
        block_out_channels=task.embed_dim,
        num_res_blocks=0,  # leaves out the convolutions at both ends: the number of layers is the same as ours
        block_num_heads=task.num_heads,
        num_hidden_layers=task.depth,
        num_attention_heads=task.num_heads,
        intermediate_size=task.mlp_dim * 2 // 3,  # gated: three matrices instead of two
        sample_size=task.grid[0],
    ).eval()
    classes = nn.Embedding(task.num_classes, task.embed_dim)
    pipeline = AmusedPipeline(None, None, None, network, AmusedScheduler(mask_token_id=task.codebook_size))
    pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def decode() -> Tensor:
        embedded = classes(torch.arange(task.batch) % task.num_classes)
        tokens: Tensor = pipeline(
            prompt_embeds=embedded,
            encoder_hidden_states=embedded.unsqueeze(1),
            num_inference_steps=NUM_STEPS,
            guidance_scale=1.0,
            output_type="latent",
            return_dict=False,
        )[0]
        return tokens.flatten(1)

    return decode
