"""Measures a training step of stage 2: ours with both backbones, and a plain one of our network and of peers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from measuring import (
    DTYPES,
    Contender,
    Precision,
    autocast,
    build_parser,
    compare,
    count_work,
    list_precisions,
    measure_peak_memory,
    start,
)
from peers import PEERS, Peer, Task, build_peer, list_available
from torch import Tensor, nn
from torch.optim import AdamW

from maskgit_pl.data.loader import StepDataModule
from maskgit_pl.training.optimizers import LearningRate, OptimizerConfig
from maskgit_pl.transformer.mvtm import MaskedTokenConfig, MaskedTokenModel

_RATE, _BETAS, _WEIGHT_DECAY, _CLIP, _SMOOTHING, _EMA_DECAY = 1e-4, (0.9, 0.96), 0.045, 1.0, 0.1, 0.999
PLAIN = "plain PyTorch"
NAMES = ("ours", "ours, adaln", PLAIN, *PEERS)


class Ours:
    """Our step: ``MaskedTokenModel`` and its hooks, called in the order of the Trainer."""

    def __init__(self, task: Task, precision: Precision) -> None:
        self.batch, self.precision, self.data = task.data(), precision, StepDataModule()
        config = MaskedTokenConfig(
            task.network,
            OptimizerConfig(LearningRate(_RATE), _BETAS, _WEIGHT_DECAY),
            tokenizer="",
            label_smoothing=_SMOOTHING,
            ema_decay=_EMA_DECAY,
            global_batch=task.batch,
        )
        self.module = MaskedTokenModel(config)
        self.trainer = SimpleNamespace(  # the module has only a weak reference to it
            global_step=1, max_steps=1_000_000, log_every_n_steps=1_000_001, accumulate_grad_batches=1, world_size=1
        )
        self.module.trainer = self.trainer  # type: ignore[assignment]  # stands in for the Trainer
        self.optimizer = self.module.configure_optimizers()["optimizer"]

    def __call__(self) -> Tensor:
        """Runs a step and returns its loss ()."""
        losses: list[Tensor] = []

        def closure() -> Tensor:
            drawn = self.module.draw_on_host(self.batch)
            batch = self.data.transfer_batch_to_device(drawn, self.module.device, 0)
            with autocast(self.precision, self.module.device.type):
                loss = self.module.training_step(batch, 0)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch: untyped
            nn.utils.clip_grad_norm_(self.module.transformer.parameters(), _CLIP)
            losses.append(loss.detach())
            return loss

        self.module.optimizer_step(0, 0, self.optimizer, closure)
        self.trainer.global_step += 1
        return losses[0]


class Plain:
    """A training step in plain PyTorch: fused AdamW, clipping and average by ``foreach``, the loss of our network.

    Args:
        network: Network to train, without dropout.
        task: Sizes and batch.
        precision: Precision of the forward pass.
    """

    def __init__(self, network: Peer | PlainTransformer, task: Task, precision: Precision) -> None:
        self.network, self.precision = network.eval(), precision  # eval: dome272's has dropout
        self.batch, self.mask = task.data(), task.mask()
        self.average = copy.deepcopy(network).requires_grad_(requires_grad=False)
        self.optimizer = AdamW(network.parameters(), _RATE, betas=_BETAS, weight_decay=_WEIGHT_DECAY, fused=True)

    def __call__(self) -> Tensor:
        """Runs a step and returns its loss ()."""
        with autocast(self.precision):
            loss = self._loss()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch: untyped
        nn.utils.clip_grad_norm_(self.network.parameters(), _CLIP)
        self.optimizer.step()
        with torch.no_grad():
            kept, new = (list(network.parameters()) for network in (self.average, self.network))
            torch._foreach_lerp_(kept, new, 1 - _EMA_DECAY)
        return loss.detach()

    def _loss(self) -> Tensor:
        tokens = self.batch.content.masked_fill(self.mask, self.network.mask_token_id)
        logits = self.network(tokens, self.batch.labels).float()
        # Of rows (B N, K): of a transposed view it would take twice as long.
        rows, codes = logits.flatten(0, 1), self.batch.content.flatten()
        losses = F.cross_entropy(rows, codes, label_smoothing=_SMOOTHING, reduction="none").view_as(self.mask)
        # Mean over the masked tokens of a row, then over the rows.
        return ((losses * self.mask).sum(1) / self.mask.sum(1)).mean()


class PlainBlock(nn.Module):
    """A post-norm BERT block."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        width = task.embed_dim
        self.num_heads = task.num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.fc1, self.fc2 = nn.Linear(width, task.mlp_dim), nn.Linear(task.mlp_dim, width)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, S, D) to (B, S, D)."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = self.attention_norm(x + self.proj(attended))
        normed: Tensor = self.mlp_norm(x + self.fc2(F.gelu(self.fc1(x), approximate="tanh")))
        return normed


class PlainTransformer(nn.Module):
    """The network of ``maskgit_pl.networks.transformer`` in plain PyTorch, with the same names and initial weights."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        config = task.network
        self.codebook_size, self.mask_token_id = config.codebook_size, config.mask_token_id
        self.token_embedding = nn.Embedding(config.vocabulary_size, config.embed_dim)
        self.position_embedding = nn.Embedding(config.num_tokens + 1, config.embed_dim)
        self.embedding_norm = nn.LayerNorm(config.embed_dim, eps=1e-12)
        self.blocks = nn.Sequential(*(PlainBlock(task) for _ in range(config.depth)))
        self.head_dense = nn.Linear(config.embed_dim, config.embed_dim)
        self.head_norm = nn.LayerNorm(config.embed_dim, eps=1e-12)
        self.head_bias = nn.Parameter(torch.zeros(config.vocabulary_size))
        torch.manual_seed(0)
        self.load_state_dict(config.create().state_dict())

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Returns logits (B, N, V) of tokens (B, N) int64 and labels (B,) int64."""
        sequence = torch.cat([labels.unsqueeze(1) + self.codebook_size, tokens], dim=1)
        x = self.blocks(self.embedding_norm(self.token_embedding(sequence) + self.position_embedding.weight))
        x = self.head_norm(F.gelu(self.head_dense(x), approximate="tanh"))
        # The head is tied to the token embedding, as released.
        return F.linear(x, self.token_embedding.weight, self.head_bias)[:, 1:]


def build(name: str, task: Task, precision: Precision, peers: Path | None = None) -> Ours | Plain:
    """Builds a training step; ours and the plain one start from the same weights."""
    torch.manual_seed(0)
    if name.startswith("ours"):
        return Ours(replace(task, backbone="adaln" if "adaln" in name else "bert"), precision)
    if name == PLAIN:
        return Plain(PlainTransformer(task), task, precision)
    assert peers is not None
    return Plain(build_peer(name, task, peers), task, precision)


def train_two_steps(name: str, task: Task, precision: Precision, peers: Path | None) -> None:
    """Builds a step and runs it twice: the second time, there is optimizer state."""
    step = build(name, task, precision, peers)
    for _ in range(2):
        step()


def build_contender(
    name: str, task: Task, precision: Precision, peers: Path | None = None, *, with_memory: bool = False
) -> Contender:
    """Returns a training step after its first call, with the work of one step; no step draws its masks."""
    memory = measure_peak_memory(partial(train_two_steps, name, task, precision, peers)) if with_memory else None
    step = build(name, task, precision, peers)
    if isinstance(step, Ours):
        step.batch = step.module.draw_on_host(step.batch)
    step()
    return Contender(precision, name, step, work=count_work(step), dtype=DTYPES[precision], memory=memory)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = build_parser(__doc__, repeats=7, batch_size=Task.batch, depth=Task.depth)
    parser.add_argument("--memory", action="store_true", help="also measure the peak memory, in processes of their own")
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="folder with clones of the peers")
    arguments = start(parser, argv)
    task = Task(batch=arguments.batch_size, depth=arguments.depth)
    print(f"{task.describe()}, {100 * float(task.mask().float().mean()):.0f} % of the tokens masked")
    names = list_available(NAMES, arguments.peers)
    contenders = [
        build_contender(name, task, precision, arguments.peers, with_memory=arguments.memory)
        for precision in list_precisions()
        for name in names
    ]
    compare(arguments, contenders)


if __name__ == "__main__":
    main()
