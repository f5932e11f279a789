"""Measures a training step of stage 2: ours, a plain one of the same network, and muse-maskgit-pytorch's.

    python benchmarks/stage2_step.py --threads 1 --repeats 5 --parts --json stage2_step.json

benchmarks/README.md describes the contenders and the columns of the table.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from measuring import (
    CLOCKS,
    MatrixProduct,
    OperationCounter,
    Stopwatch,
    format_table,
    interleave,
    measure_peak_memory,
    read_cpu_name,
    run_in_fresh_process,
)
from peers import EncoderPeer, MuseClasses, Task
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from maskgit_pl.data import Batch
from maskgit_pl.data.loader import StepDataModule
from maskgit_pl.distributed import describe_environment
from maskgit_pl.mvtm import MaskedTokenConfig, MaskedTokenModel
from maskgit_pl.networks.transformer import MaskedTransformer
from maskgit_pl.training.optimizers import LearningRate, OptimizerConfig
from maskgit_pl.training.strategies import Compiled

Precision = Literal["fp32", "bf16"]

_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PEER, _ENCODER = "muse-maskgit-pytorch", "encoder layers of torch, as dome272"
_RATE, _BETAS, _WEIGHT_DECAY, _CLIP, _SMOOTHING, _EMA_DECAY = 1e-4, (0.9, 0.96), 0.045, 1.0, 0.1, 0.999


class Contender(Protocol):
    """A training step that can be timed."""

    def __call__(self, watch: Stopwatch) -> Tensor:
        """Runs forward, backward, clip, optimiser and average, and marks each; returns the detached loss ()."""


@dataclass
class _Run:
    """A stand-in for the Trainer with the attributes that the module reads."""

    global_step: int = 1
    max_steps: int = 1_000_000
    log_every_n_steps: int = 1_000_001
    accumulate_grad_batches: int = 1
    world_size: int = 1


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
        self.run = _Run()  # the module has only a weak reference to it
        self.module.trainer = self.run  # type: ignore[assignment]  # stands in for the Trainer
        self.optimizer = self.module.configure_optimizers()["optimizer"]
        # Separates the optimiser from the average, which ``optimizer_step`` updates afterwards.
        self.optimizer.register_step_post_hook(lambda *_: self.watch.mark("optimiser"))
        self.watch = Stopwatch()

    def __call__(self, watch: Stopwatch) -> Tensor:
        self.watch = watch
        losses: list[Tensor] = []

        def closure() -> Tensor:
            drawn = self.module.draw_on_host(self.batch)
            batch = self.data.transfer_batch_to_device(drawn, self.module.device, 0)
            with _autocast(self.precision, self.module.device.type):
                loss = self.module.training_step(batch, 0)
            watch.mark("forward")
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch: untyped
            watch.mark("backward")
            nn.utils.clip_grad_norm_(self.module.transformer.parameters(), _CLIP)
            watch.mark("clip")
            losses.append(loss.detach())
            return loss

        self.module.optimizer_step(0, 0, self.optimizer, closure)
        watch.mark("average")
        self.run.global_step += 1
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

    def __call__(self, watch: Stopwatch) -> Tensor:
        with _autocast(self.precision):
            loss = self.loss(self.network, self.batch, self.task.mask())
        watch.mark("forward")
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch: untyped
        watch.mark("backward")
        nn.utils.clip_grad_norm_(self.network.parameters(), _CLIP)
        watch.mark("clip")
        self.optimizer.step()
        watch.mark("optimiser")
        with torch.no_grad():
            # The moving average moves by (1 - decay) of the difference to the new weight.
            for kept, new in zip(self.average.parameters(), self.network.parameters(), strict=True):
                kept.mul_(_EMA_DECAY).add_(new, alpha=1 - _EMA_DECAY)
        watch.mark("average")
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
    found = {}
    for name, tensor in weights.items():
        if "qkv" not in name:
            found[name] = tensor
            continue
        # Our qkv projection stacks the three matrices along its rows.
        for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
            found[name.replace("qkv", part)] = third
    return found


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


def build_muse(task: Task, precision: Precision) -> Plain:
    """Returns the step of muse-maskgit-pytorch."""
    network = MuseClasses(task)

    def loss(network: nn.Module, batch: Batch, mask: Tensor) -> Tensor:
        tokens = batch.content.masked_fill(mask, task.network.mask_token_id)
        result: Tensor = network(tokens, batch.labels, batch.content.masked_fill(~mask, -1))
        return result

    return Plain(network, loss, task, precision)


def build_encoder(task: Task, precision: Precision) -> Plain:
    """Returns the step of dome272/MaskGIT-pytorch: its network, and the loss of all tokens."""
    mask_token_id = task.network.mask_token_id

    def loss(network: nn.Module, batch: Batch, mask: Tensor) -> Tensor:
        logits = network(batch.content.masked_fill(mask, mask_token_id), batch.labels)
        return F.cross_entropy(logits.flatten(0, 1), batch.content.flatten(), label_smoothing=_SMOOTHING)

    return Plain(EncoderPeer(task), loss, task, precision)


_CONTENDERS: dict[str, Callable[[Task, Precision], Contender]] = {
    "ours": Ours,
    "naive": build_naive,
    _ENCODER: build_encoder,
    _PEER: build_muse,
}


def build(name: str, task: Task, precision: Precision) -> Contender:
    """Builds a contender; ours and the naive one start from the same weights."""
    torch.manual_seed(0)
    return _CONTENDERS[name](task, precision)


def measure_memory(name: str, task: Task, precision: Precision, threads: int) -> int | None:
    """Returns the peak memory of two steps in bytes; the second one has optimiser state. Call it in a fresh process."""
    torch.set_num_threads(threads)

    def run() -> None:
        step = build(name, task, precision)
        for _ in range(2):
            step(Stopwatch())

    return measure_peak_memory(run)


def warm_up(step: Contender) -> tuple[float, int, int, int]:
    """Returns the loss of the first step, and FLOPs, kernels and waits of a step; see ``Measured``."""
    # On CPU, the counter supports only the MATH kernel of attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = float(step(Stopwatch()))
    with _drawn(step), OperationCounter() as operations:
        step(Stopwatch())
    return loss, counter.get_total_flops(), operations.kernels, operations.syncs


@contextmanager
def _drawn(step: Contender) -> Iterator[None]:
    """Gives our step a batch with its random draws, which the host makes before it copies the batch to the device."""
    if not isinstance(step, Ours):
        yield
        return
    given, step.batch = step.batch, step.module.draw_on_host(step.batch)
    yield
    step.batch = given


@dataclass(frozen=True)
class Measured:
    """The measurements of one contender in one precision.

    Args:
        precision: Precision of the forward pass.
        name: Name of the contender.
        loss: Loss of the first step.
        flops: FLOPs of the matrix products of a step, including attention and backward.
        kernels: Number of operations of a step that are not views.
        syncs: Number of times in a step that the host would wait for a GPU.
        memory: Peak memory in bytes; None if the system does not report it.
        seconds: Seconds of each round.
        parts: Seconds of each round, by part.
        peak: Best rate of a matrix product over all rounds, in FLOP/s.
        floor: Fewest FLOPs of a contender that computes the same loss.
        ratio: Median over the rounds of the time divided by our time in the same round.
    """

    precision: Precision
    name: str
    loss: float
    flops: int
    kernels: int
    syncs: int
    memory: int | None
    seconds: list[float]
    parts: dict[str, list[float]]
    peak: float
    floor: int
    ratio: float

    def share(self, flops: int, seconds: float) -> str:
        """Returns the percentage of the peak."""
        return f"{100 * flops / seconds / self.peak:.0f}"

    def row(self) -> dict[str, str]:
        """Returns the row of the table."""
        middle, best = median(self.seconds), min(self.seconds)
        return {
            "": self.precision,
            "step": self.name,
            "s median": f"{middle:.3g}",
            "s best": f"{best:.3g}",
            "time / ours": f"{self.ratio:.2f}",
            "memory GB": "-" if self.memory is None else f"{self.memory / 1e9:.2f}",
            "GFLOP": f"{self.flops / 1e9:.3g}",
            "% of peak, its work: median (best)": f"{self.share(self.flops, middle)} ({self.share(self.flops, best)})",
            "% of peak, the task: median (best)": f"{self.share(self.floor, middle)} ({self.share(self.floor, best)})",
            "kernels": str(self.kernels),
            "syncs": str(self.syncs),
            "first loss": f"{self.loss:.5f}",
        }

    def part_row(self) -> dict[str, str]:
        """Returns the median milliseconds of each part, and their share of the step."""
        whole = median(self.seconds)
        cells = {part: f"{1000 * median(s):.1f} ({100 * median(s) / whole:.1f} %)" for part, s in self.parts.items()}
        return {"": self.precision, "step, ms": self.name, **cells}


def measure(
    task: Task,
    precision: Precision,
    *,
    peaks: Mapping[str, int | None],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    product_size: int = 2048,
) -> list[Measured]:
    """Times the contenders named in ``peaks`` in turn, and the machine's peak in the same rounds."""
    # All contenders stay in memory, so that a round can run them in turn.
    names = list(peaks)
    steps = {name: build(name, task, precision) for name in names}
    first = {name: warm_up(step) for name, step in steps.items()}
    product = MatrixProduct(_DTYPES[precision], product_size)
    product.rate(repeats=1)
    watches = interleave({"product": product, **steps}, repeats=repeats, clock=clock)
    peak = product.flops / min(watch.total for watch in watches["product"])
    seconds = {name: [watch.total for watch in watches[name]] for name in names}
    return [
        Measured(
            precision, name, *first[name], peaks[name], seconds[name],
            {part: [watch.parts[part] for watch in watches[name]] for part in watches[name][0].parts},
            peak, min(first[other][1] for other in ("ours", "naive")),
            median(its / ours for its, ours in zip(seconds[name], seconds["ours"], strict=True)),
        )
        for name in names
    ]  # fmt: skip


def list_installed() -> list[str]:
    """Returns the contenders whose packages are installed."""
    has_peer = importlib.util.find_spec(_PEER.replace("-", "_")) is not None
    return [name for name in _CONTENDERS if name != _PEER or has_peer]


def is_bfloat16_slow() -> bool:
    """Returns True if this CPU multiplies bfloat16 more slowly than float32, because it has no instructions for it."""
    # 512 is large enough for the comparison, and quick enough even in software.
    rates = [MatrixProduct(dtype, 512).rate(repeats=3) for dtype in (torch.bfloat16, torch.float32)]
    return rates[0] < rates[1]


def _autocast(precision: Precision, device: str = "cpu") -> torch.autocast:
    """Returns the autocast context of Lightning's 32-true or bf16-mixed."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def _positive(text: str) -> int:
    """Parses a flag's value as an integer >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text}")
    return int(text)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=_positive, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    parser.add_argument("--batch-size", type=_positive, default=Task.batch, help="batch size (%(default)s)")
    parser.add_argument("--depth", type=_positive, default=Task.depth, help="layers (%(default)s)")
    parser.add_argument("--repeats", type=_positive, default=7, help="number of rounds (%(default)s)")
    parser.add_argument(
        "--precision", choices=list(_DTYPES), help="measure one precision only, even if bf16 is slower than fp32"
    )
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: if other programs run")
    parser.add_argument("--parts", action="store_true", help="also print the time of each part of a step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers and the environment to FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    arguments = _arguments(argv)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    task, names = Task(batch=arguments.batch_size, depth=arguments.depth), list_installed()
    config = task.network
    print(f"{read_cpu_name()}, {arguments.threads} threads, torch {torch.__version__}, n = {arguments.repeats} rounds")
    print(
        f"{task.depth} layers x {task.embed_dim}, MLP {task.mlp_dim}, {task.num_heads} heads, {config.num_tokens + 1} "
        f"tokens, vocabulary {config.vocabulary_size}, batch {task.batch}, "
        f"{100 * float(task.mask().float().mean()):.0f} % of the tokens masked"
    )
    if _PEER not in names:
        print(f"{_PEER} is not installed and is left out; to install it: python -m pip install -e '.[benchmarks]'")
    precisions: list[Precision] = ["fp32", "bf16"] if arguments.precision is None else [arguments.precision]
    if arguments.precision is None and is_bfloat16_slow():
        print("bf16 is left out: this CPU has no bfloat16 instructions (--precision bf16 measures it anyway)")
        precisions.remove("bf16")
    measured: list[Measured] = []
    for precision in precisions:
        peaks = {name: run_in_fresh_process(measure_memory, name, task, precision, arguments.threads) for name in names}
        measured += measure(task, precision, peaks=peaks, repeats=arguments.repeats, clock=CLOCKS[arguments.clock])
        print(f"{precision} matrix-product peak: {measured[-1].peak / 1e9:.1f} GFLOP/s")
    print("\n" + format_table([one.row() for one in measured]))
    if arguments.parts:
        print("\n" + format_table([one.part_row() for one in measured]))
    if arguments.json:
        report = {
            "environment": {**describe_environment(), "cpu": read_cpu_name()},
            "task": asdict(task),
            "measured": [asdict(one) for one in measured],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
