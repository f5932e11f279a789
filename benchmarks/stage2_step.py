"""Measures a training step of stage 2: ours, a plain one of the same network, and one with layers of torch.

    python benchmarks/stage2_step.py --repeats 5 --json stage2_step.json

benchmarks/README.md describes the contenders and the columns of the table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
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
from peers import ENCODER, EncoderPeer, Task
from torch import Tensor, nn
from torch.optim import AdamW

from maskgit_pl.data import Batch
from maskgit_pl.data.loader import StepDataModule
from maskgit_pl.mvtm import MaskedTokenConfig, MaskedTokenModel
from maskgit_pl.networks.transformer import MaskedTransformer
from maskgit_pl.training.optimizers import LearningRate, OptimizerConfig
from maskgit_pl.training.strategies import Compiled

_RATE, _BETAS, _WEIGHT_DECAY, _CLIP, _SMOOTHING, _EMA_DECAY = 1e-4, (0.9, 0.96), 0.045, 1.0, 0.1, 0.999


class Ours:
    """Our step: ``MaskedTokenModel`` and its hooks, called in the order of the Trainer."""

    def __init__(self, task: Task, precision: Precision, *, compiled: Compiled = "none") -> None:
        self.batch, self.precision, self.data = task.data(), precision, StepDataModule()
        config = MaskedTokenConfig(
            task.network,
            OptimizerConfig(LearningRate(_RATE), _BETAS, _WEIGHT_DECAY),
            tokenizer="",
            label_smoothing=_SMOOTHING,
            ema_decay=_EMA_DECAY,
            compiled=compiled,
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
    """A straightforward training step: default AdamW, and a moving average that loops over the weights.

    Args:
        network: Network to train.
        loss: Function of network, batch and mask (B, N) bool, True = masked; returns the loss ().
        task: Sizes and batch.
        precision: Precision of the forward pass.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[nn.Module, Batch, Tensor], Tensor],
        task: Task,
        precision: Precision,
    ) -> None:
        self.network, self.loss, self.task, self.precision = network, loss, task, precision
        self.batch = task.data()
        self.average = copy.deepcopy(network).requires_grad_(requires_grad=False)
        self.optimizer = AdamW(network.parameters(), _RATE, betas=_BETAS, weight_decay=_WEIGHT_DECAY)

    def __call__(self) -> Tensor:
        """Runs a step and returns its loss ()."""
        with autocast(self.precision):
            loss = self.loss(self.network, self.batch, self.task.mask())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch: untyped
        nn.utils.clip_grad_norm_(self.network.parameters(), _CLIP)
        self.optimizer.step()
        with torch.no_grad():
            # The moving average moves by (1 - decay) of the difference to the new weight.
            for kept, new in zip(self.average.parameters(), self.network.parameters(), strict=True):
                kept.mul_(_EMA_DECAY).add_(new, alpha=1 - _EMA_DECAY)
        return loss.detach()


class NaiveBlock(nn.Module):
    """A post-norm BERT block with separate projections of queries, keys and values, and explicit attention."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        width = task.embed_dim
        self.num_heads = task.num_heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.fc1 = nn.Linear(width, task.mlp_dim)
        self.fc2 = nn.Linear(task.mlp_dim, width)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, S, D) to (B, S, D)."""
        query, key, value = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5  # (B, heads, S, S)
        attended = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        x = self.attention_norm(x + self.proj(attended))
        # Post-norm: the residual is added before the norm, as in BERT.
        hidden = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        normed: Tensor = self.mlp_norm(x + hidden)
        return normed


class NaiveTransformer(nn.Module):
    """The network of ``maskgit_pl.networks.transformer`` without its optimizations: all logits at all positions."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        config = task.network
        self.codebook_size = config.codebook_size
        self.token_embedding = nn.Embedding(config.vocabulary_size, config.embed_dim)
        self.position_embedding = nn.Embedding(config.num_tokens + 1, config.embed_dim)
        self.embedding_norm = nn.LayerNorm(config.embed_dim, eps=1e-12)
        self.blocks = nn.ModuleList(NaiveBlock(task) for _ in range(config.depth))
        self.head_dense = nn.Linear(config.embed_dim, config.embed_dim)
        self.head_norm = nn.LayerNorm(config.embed_dim, eps=1e-12)
        self.head_bias = nn.Parameter(torch.zeros(config.vocabulary_size))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Returns logits (B, N, V) of tokens (B, N) int64 and labels (B,) int64."""
        sequence = torch.cat([labels.unsqueeze(1) + self.codebook_size, tokens], dim=1)
        x = self.embedding_norm(self.token_embedding(sequence) + self.position_embedding.weight)
        for block in self.blocks:
            x = block(x)
        x = self.head_norm(F.gelu(self.head_dense(x), approximate="tanh"))
        # The head is tied to the token embedding, as released.
        logits: Tensor = x @ self.token_embedding.weight.T + self.head_bias
        return logits[:, 1:]


def rename_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns our weights, or their gradients, with the names of ``NaiveTransformer``."""
    renamed = {name: tensor for name, tensor in weights.items() if "qkv" not in name}
    for name in weights.keys() - renamed.keys():
        # Our qkv projection stacks the three matrices along its rows.
        for part, third in zip(("query", "key", "value"), weights[name].chunk(3), strict=True):
            renamed[name.replace("qkv", part)] = third
    return renamed


def build_naive(task: Task, precision: Precision) -> Plain:
    """Returns the plain step with the initial weights of ``Ours``."""
    # The first draw from the seed, as in ours, so that both start from the same weights.
    weights = rename_weights(MaskedTransformer(task.network).state_dict())
    network = NaiveTransformer(task)
    network.load_state_dict(weights)
    mask_token_id = task.network.mask_token_id

    def loss(network: nn.Module, batch: Batch, mask: Tensor) -> Tensor:
        logits = network(batch.content.masked_fill(mask, mask_token_id), batch.labels).float()
        losses = F.cross_entropy(logits.mT, batch.content, label_smoothing=_SMOOTHING, reduction="none")  # (B, N)
        # Mean over the masked tokens of a row, then over the rows, as in our loss.
        return ((losses * mask).sum(1) / mask.sum(1)).mean()

    return Plain(network, loss, task, precision)


def build_encoder(task: Task, precision: Precision) -> Plain:
    """Returns the step of dome272/MaskGIT-pytorch: its network, and the loss of all tokens."""
    mask_token_id = task.network.mask_token_id

    def loss(network: nn.Module, batch: Batch, mask: Tensor) -> Tensor:
        logits = network(batch.content.masked_fill(mask, mask_token_id), batch.labels)
        return F.cross_entropy(logits.flatten(0, 1), batch.content.flatten(), label_smoothing=_SMOOTHING)

    return Plain(EncoderPeer(task), loss, task, precision)


STEPS: dict[str, Callable[[Task, Precision], Ours | Plain]] = {
    "ours": Ours,
    "naive": build_naive,
    ENCODER: build_encoder,
}


def build(name: str, task: Task, precision: Precision) -> Ours | Plain:
    """Builds a training step; ours and the naive one start from the same weights."""
    torch.manual_seed(0)
    return STEPS[name](task, precision)


def train_two_steps(name: str, task: Task, precision: Precision) -> None:
    """Builds a step and runs it twice: the second time, there is optimizer state."""
    step = build(name, task, precision)
    for _ in range(2):
        step()


def build_contender(name: str, task: Task, precision: Precision, *, with_memory: bool = False) -> Contender:
    """Returns a training step after its first call, with the work of one step."""
    memory = measure_peak_memory(partial(train_two_steps, name, task, precision)) if with_memory else None
    step = build(name, task, precision)
    step()
    batch = step.batch
    if isinstance(step, Ours):  # the host makes the random draws before it copies the batch to the device
        step.batch = step.module.draw_on_host(batch)
    work = count_work(step)
    step.batch = batch
    return Contender(precision, name, step, work=work, dtype=DTYPES[precision], memory=memory)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = build_parser(__doc__, repeats=7, batch_size=Task.batch, depth=Task.depth)
    parser.add_argument("--memory", action="store_true", help="also measure the peak memory, in processes of their own")
    arguments = parser.parse_args(argv)
    start(arguments)
    task = Task(batch=arguments.batch_size, depth=arguments.depth)
    print(f"{task.describe()}, {100 * float(task.mask().float().mean()):.0f} % of the tokens masked")
    pairs = [(name, precision) for precision in list_precisions() for name in STEPS]
    memory = arguments.memory
    compare(arguments, [build_contender(name, task, precision, with_memory=memory) for name, precision in pairs])


if __name__ == "__main__":
    main()
