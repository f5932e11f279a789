"""The peers of the benchmarks: networks by the code of other projects, a plain decoding loop, and sizes of stage 2."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from maskgit_pl.data import Batch
from maskgit_pl.masking import MaskSampler
from maskgit_pl.networks.adaln import AdaLNConfig
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.schedules import mask_schedules

Decode = Callable[[], Tensor]
"""Decodes a batch and gives its tokens (B, N)."""

NUM_STEPS = 8
VQMODEL = "diffusers VQModel"


@dataclass(frozen=True)
class Task:
    """The sizes of the network and the batch, without dropout.

    The vocabulary of ``bert`` is codebook_size + num_classes + 1: 2025 as released.
    """

    batch: int = 8
    depth: int = 4
    embed_dim: int = 768
    mlp_dim: int = 3072
    num_heads: int = 16
    grid: tuple[int, int] = (16, 16)
    codebook_size: int = 1024
    num_classes: int = 1000
    backbone: str = "bert"

    @property
    def network(self) -> TransformerConfig | AdaLNConfig:
        is_adaln = self.backbone == "adaln"
        # SwiGLU has three matrices, an ordinary MLP two.
        mlp_dim = 2 * self.mlp_dim // 3 if is_adaln else self.mlp_dim
        return (AdaLNConfig if is_adaln else TransformerConfig)(
            self.codebook_size, self.num_classes, self.grid, self.embed_dim, self.depth, self.num_heads, mlp_dim,
            dropout=0.0, class_dropout=0.0,
        )  # fmt: skip

    @property
    def labels(self) -> list[int]:
        """The classes that are decoded: all in turn."""
        return [number % self.num_classes for number in range(self.batch)]

    def describe(self) -> str:
        """Returns the sizes in words."""
        return f"{self.depth} layers x {self.embed_dim}, {self.network.num_tokens + 1} tokens, batch {self.batch}"

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


class Peer(nn.Module):
    """A network of another project that is called like ours.

    Args:
        network: The network.
        mask_token_id: Its id of the mask token.
        call: Function of tokens (B, N) and labels (B,), both int64, that returns its logits (B, N, V).
    """

    def __init__(self, network: nn.Module, mask_token_id: int, call: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.mask_token_id, self.forward = network, mask_token_id, call


def build_dome272(task: Task) -> Peer:
    """Returns the network of dome272/MaskGIT-pytorch: 8 heads, no classes. The class is a token, as in ours."""
    from bidirectional_transformer import BidirectionalTransformer

    config = task.network
    sizes = SimpleNamespace(
        num_image_tokens=config.num_tokens, num_codebook_vectors=config.vocabulary_size - 2, dim=config.embed_dim,
        hidden_dim=config.mlp_dim, n_layers=config.depth,
    )  # fmt: skip
    network = BidirectionalTransformer(sizes)

    def call(tokens: Tensor, labels: Tensor) -> Tensor:
        logits: Tensor = network(torch.cat([labels.unsqueeze(1) + config.codebook_size, tokens], dim=1))
        return logits[:, 1:]

    return Peer(network, config.mask_token_id, call)


def build_image_bert(task: Task) -> Peer:
    """Returns the network of bytedance/1d-tokenizer, around the ``BertModel`` of transformers."""
    from modeling.maskgit import ImageBert

    sizes = {
        "condition_num_classes": task.num_classes, "image_seq_len": task.network.num_tokens, "dropout": 0.0,
        "hidden_size": task.embed_dim, "num_hidden_layers": task.depth, "num_attention_heads": task.num_heads,
        "intermediate_size": task.mlp_dim, "attn_drop": 0.0,
    }  # fmt: skip
    network = ImageBert({"model": {"vq_model": {"codebook_size": task.codebook_size}, "generator": sizes}})
    return Peer(network, task.codebook_size, partial(network, cond_drop_prob=0.0))


def build_halton(task: Task) -> Peer:
    """Returns the network of valeoai/Halton-MaskGIT: adaLN-zero, and a SwiGLU MLP of two thirds of ``mlp_dim``."""
    from Network.transformer import Transformer

    sizes = task.grid[0], task.embed_dim, task.codebook_size, task.depth, task.num_heads, task.mlp_dim
    network = Transformer(*sizes, nclass=task.num_classes)

    def call(tokens: Tensor, labels: Tensor) -> Tensor:
        logits: Tensor = network(tokens.unflatten(1, task.grid), labels, drop_label=labels < 0)
        return logits

    return Peer(network, task.codebook_size, call)


PEERS: Mapping[str, Callable[[Task], Peer]] = {
    "dome272/MaskGIT-pytorch": build_dome272,
    "bytedance/1d-tokenizer": build_image_bert,
    "valeoai/Halton-MaskGIT": build_halton,
}
"""Functions that build the networks of other projects, by the name of their repository on GitHub."""


def build_peer(name: str, task: Task, folder: Path) -> Peer:
    """Returns a peer's network with random weights, by the unchanged code of its clone in a folder."""
    clone = str(folder / Path(name).name)
    sys.path.insert(0, clone)  # their modules import each other from the root of the repository
    try:
        with redirect_stdout(None):  # they print their layers
            return PEERS[name](task)
    finally:
        sys.path.remove(clone)  # other clones have modules of the same names


def list_available(names: Sequence[str], folder: Path | None = None) -> list[str]:
    """Returns the contenders whose code is there, and prints how to get the others."""
    missing = {}
    if importlib.util.find_spec("diffusers") is None:
        missing[VQMODEL] = "python -m pip install -e '.[benchmarks]'"
    for name in PEERS:
        if folder is None or not (folder / Path(name).name).is_dir():
            missing[name] = f"git clone https://github.com/{name}, and --peers with the folder of the clone"
    for name in names:
        if name in missing:
            print(f"{name} is left out; to measure it: {missing[name]}")
    return [name for name in names if name not in missing]


def build_plain(network: Peer, task: Task) -> Decode:
    """Returns a plain decoding loop for a peer's network: all logits in each step, Gumbel draws, cosine schedule."""
    network.eval().requires_grad_(requires_grad=False)
    labels, mask_token_id = torch.tensor(task.labels), network.mask_token_id

    @torch.no_grad()
    def decode() -> Tensor:
        num_tokens = task.network.num_tokens
        tokens = torch.full((task.batch, num_tokens), mask_token_id)
        for step in range(NUM_STEPS):
            logits = network(tokens, labels)[..., : task.codebook_size].float()
            drawn = (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)
            masked = tokens == mask_token_id
            drawn = torch.where(masked, drawn, tokens)
            confidence = logits.log_softmax(-1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
            confidence -= 4.5 * (1 - (step + 1) / NUM_STEPS) * torch.empty_like(confidence).exponential_().log()
            confidence[~masked] = torch.inf  # known tokens stay
            count = int(num_tokens * math.cos(math.pi / 2 * (step + 1) / NUM_STEPS))
            tokens = drawn
            if count:
                last = confidence.topk(count, largest=False).indices
                tokens = drawn.scatter(1, last, mask_token_id)
        return tokens

    return decode
