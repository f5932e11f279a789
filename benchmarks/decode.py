"""Measures decoding without a tokenizer: ours, exact and approximate, four peers, and an autoregressive decoder.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/decode.py --threads 2 --repeats 5 --json decode.json
    OMP_WAIT_POLICY=PASSIVE python benchmarks/decode.py --threads 1 --clock cpu --dtype bfloat16 --batch-size 8

benchmarks/README.md describes the rows and the columns of the table.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from measuring import (
    CLOCKS,
    MatrixProduct,
    OperationCounter,
    Stopwatch,
    format_table,
    interleave,
    read_cpu_name,
)
from peers import (
    AMUSED,
    BERT,
    MUSE,
    NUM_STEPS,
    PEERS,
    BertPeer,
    Decode,
    EncoderPeer,
    Task,
    build_amused,
    build_muse,
    build_plain,
    is_installed,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from maskgit_pl.decoding import (
    AutoregressiveDecoder,
    ConditionalModel,
    FirstStepLogits,
    ParallelDecoder,
    decode_autoregressive,
    decode_classes,
)
from maskgit_pl.decoding.guidance import guidance_scales, guidance_schedules
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.distributed import describe_environment
from maskgit_pl.networks.kernels import feed_forward, set_packing
from maskgit_pl.networks.transformer import AutoregressiveTransformer, Block, MaskedTransformer, TransformerConfig
from maskgit_pl.schedules import mask_schedules

_CPU = torch.device("cpu")
_ENCODER = "encoder layers of torch, as dome272"
_AUTOREGRESSIVE = ("autoregressive, KV cache", "autoregressive, no cache")
_UNPACKED = "ours, weights not packed"
_LINEAR, _PRODUCTS = "only the linear layers of ours", "only linear layers and attention of ours"
_ALIKE = ("ours", "ours, first step cached", _UNPACKED)


def build_network_config(task: Task) -> TransformerConfig:
    """Returns the task's network configuration with a null class, which guidance needs."""
    return replace(task.network, class_dropout=0.1)


class Ours:
    """Our parallel decoder, always with the same classes and noise.

    Args:
        network: Network that predicts the codes.
        task: Sizes and batch.
        hit: True if the first step of the classes is cached from an earlier run.
        guidance: Guidance schedule.
    """

    def __init__(
        self,
        network: MaskedTransformer,
        task: Task,
        *,
        hit: bool = False,
        guidance: dict[str, Any] | str = "constant",
    ) -> None:
        self.network, self.hit = network, hit
        self.config = network.config
        self.decoder = ParallelDecoder(
            mask_schedules.build("cosine"), token_selectors.build("confidence"), num_steps=NUM_STEPS
        )
        self.scales = guidance_scales(guidance_schedules.build(guidance), NUM_STEPS)
        # Room for 1000 classes and the null class.
        self.first = FirstStepLogits(
            network, num_tokens=self.config.num_tokens, mask_token_id=self.config.mask_token_id, max_labels=1001
        )
        self.model = ConditionalModel.from_network(network, _CPU, first_step_logits=self.first)
        self.seeds = list(range(task.batch))
        self.labels = [seed % task.num_classes for seed in self.seeds]
        if hit:
            self()  # fills the cache of first steps

    def __call__(self) -> Tensor:
        # Without this, the second round would already find the first step in the cache.
        if not self.hit:
            self.first.clear()
        *_, last = decode_classes(
            self.model,
            self.labels,
            self.seeds,
            decoder=self.decoder,
            scales=self.scales,
        )
        return last.tokens


class Autoregressive:
    """Autoregressive decoding in raster order, always with the same classes and noise.

    Args:
        network: Network that predicts the next token.
        task: Sizes and batch.
        cache: True if keys and values are kept from token to token; False if they are computed again.
        num_tokens: Number of tokens to decode; None for all tokens of an image.
    """

    def __init__(
        self, network: AutoregressiveTransformer, task: Task, *, cache: bool, num_tokens: int | None = None
    ) -> None:
        self.network, self.cache = network, cache
        self.num_tokens = num_tokens or network.config.num_tokens
        self.seeds = list(range(task.batch))
        self.labels = [seed % task.num_classes for seed in self.seeds]

    def __call__(self) -> Tensor:
        *_, last = decode_autoregressive(
            ConditionalModel.from_network(self.network, self.network.head_bias.device),
            self.labels,
            self.seeds,
            decoder=AutoregressiveDecoder(self.num_tokens),
            scales=[0.0] * self.num_tokens,
            cache=self.cache,
        )
        return last.tokens


def make_autoregressive(network: MaskedTransformer) -> AutoregressiveTransformer:
    """Returns an autoregressive network with the same weights."""
    # Built without memory on the meta device; the weights are shared, not copied.
    with torch.device("meta"):
        made = AutoregressiveTransformer(replace(network.config, attention="causal"))
    made.load_state_dict(network.state_dict(), assign=True)
    return made.eval().requires_grad_(requires_grad=False)


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    flops: int = sdpa_flop_count(query, key, value)
    return flops


def _linear_flops(x: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return 2 * prod(out_shape) * int(x[-1])


_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.onednn.qlinear_pointwise: _linear_flops,
    torch.ops.mkldnn._linear_pointwise: _linear_flops,
    torch.ops.mkl._mkl_linear: _linear_flops,
}


@dataclass(frozen=True)
class Work:
    """The work of one decoding run.

    Args:
        flops: FLOPs of matrix products, including attention.
        kernels: Number of calls that are not views.
        syncs: Number of times that the host would wait for a GPU.
        tokens: (B, N) int64 result.
    """

    flops: int
    kernels: int
    syncs: int
    tokens: Tensor


def count_work(decode: Decode) -> Work:
    """Decodes once and returns the counts."""
    flops = FlopCounterMode(display=False, custom_mapping=_FLOPS)  # type: ignore[no-untyped-call]  # torch: untyped
    counter = OperationCounter()
    with flops, counter:
        tokens = decode()
    return Work(flops.get_total_flops(), counter.kernels, counter.syncs, tokens)


def count_autoregressive_work(decode: Autoregressive) -> Work:
    """Returns the same counts as ``count_work`` without decoding all tokens, which takes minutes.

    FLOPs come from a run on the meta device. The other counts come from runs of 2 and 3 tokens, and grow linearly.
    """
    # On the meta device, operations have shapes but no values: all tokens take seconds.
    empty = copy.copy(decode)
    empty.network = copy.deepcopy(decode.network).to("meta")
    flops = count_work(empty).flops
    runs = []
    for num_tokens in (2, 3):
        shorter = copy.copy(decode)
        shorter.num_tokens = num_tokens
        runs.append(count_work(shorter))
    kernels, syncs = (  # a constant part for the noise, and a part per token
        last + (last - before) * (decode.num_tokens - 3)
        for before, last in zip(*((run.kernels, run.syncs) for run in runs), strict=True)
    )
    return Work(flops, kernels, syncs, runs[-1].tokens)


@dataclass(frozen=True)
class Measured:
    """The measurements of one contender.

    Args:
        name: Name of the contender.
        batch: Images per run.
        flops: FLOPs per run; see ``Work``.
        kernels: Kernels per run; see ``Work``.
        syncs: Synchronizations per run; see ``Work``.
        same: Fraction of tokens equal to those of our exact decoder with the same noise; None if not comparable.
        seconds: Seconds of each run.
        peak: Best rate of a square matrix product of the same dtype over all rounds, in FLOP/s.
        ratio: Median time divided by the median time of our exact decoder.
    """

    name: str
    batch: int
    flops: int
    kernels: int
    syncs: int
    same: float | None
    seconds: list[float]
    peak: float
    ratio: float

    def row(self) -> dict[str, str]:
        """Returns the row of the table; times and counts are per image."""
        middle, best = median(self.seconds), min(self.seconds)
        shares = [f"{100 * self.flops / seconds / self.peak:.0f}" for seconds in (middle, best)]
        return {
            "decoder": self.name,
            "n": str(len(self.seconds)),
            "s median": f"{middle / self.batch:.3g}",
            "s best": f"{best / self.batch:.3g}",
            "time / ours": f"{self.ratio:.2f}",
            "GFLOP": f"{self.flops / self.batch / 1e9:.0f}",
            "% of peak, median (best)": f"{shares[0]} ({shares[1]})",
            "kernels": f"{self.kernels / self.batch:.0f}",
            "syncs": f"{self.syncs / self.batch:.0f}",
            "same tokens": "-" if self.same is None else f"{100 * self.same:.1f} %",
        }


def build_products(network: MaskedTransformer, task: Task, *, attention: bool) -> Decode:
    """Returns the linear layers of all blocks and steps, with attention or without: a limit of the decoding's time."""
    config = network.config
    x = torch.randn(task.batch, config.num_tokens + 1, config.embed_dim).to(network.head_bias.dtype)

    @torch.no_grad()
    def run() -> Tensor:
        for _ in range(NUM_STEPS):
            for block in cast("Sequence[Block]", network.blocks):
                heads = block.qkv(x)
                attended = block._attend(*block._heads(heads, 3)) if attention else x
                feed_forward(block.proj(attended), block.fc1, block.fc2)
        return torch.zeros(task.batch, config.num_tokens, dtype=torch.int64)

    return run


def list_contenders(task: Task, dtype: torch.dtype = torch.float32) -> dict[str, Callable[[], Decode]]:
    """Returns functions that build each decoder, by name; ours and the autoregressive ones share their weights."""
    # Seeded: every run of the benchmark measures the same weights.
    torch.manual_seed(0)
    network = MaskedTransformer(build_network_config(task)).eval().requires_grad_(requires_grad=False).to(dtype)
    unpacked = copy.deepcopy(network)
    set_packing(network, enabled=True)
    exact = partial(Ours, network, task)
    contenders: dict[str, Callable[[], Decode]] = {
        "ours": exact,
        "ours, first step cached": partial(exact, hit=True),
        "ours, guided": partial(exact, guidance={"name": "linear", "scale": 3.0}),
        _UNPACKED: lambda: Ours(unpacked, task),
        _LINEAR: lambda: build_products(network, task, attention=False),
        _PRODUCTS: lambda: build_products(network, task, attention=True),
        _ENCODER: lambda: build_plain(EncoderPeer(task).to(dtype), task),
        BERT: lambda: build_plain(BertPeer(task).to(dtype), task),
        MUSE: lambda: build_muse(task),
        AMUSED: lambda: build_amused(task),
        _AUTOREGRESSIVE[0]: lambda: Autoregressive(make_autoregressive(network), task, cache=True),
        _AUTOREGRESSIVE[1]: lambda: Autoregressive(make_autoregressive(network), task, cache=False),
    }
    if dtype != torch.float32:  # the loops of these peers draw in float32
        for name in (MUSE, AMUSED):
            del contenders[name]
    return contenders


def _time_decode(decode: Decode) -> Callable[[Stopwatch], None]:
    def run(watch: Stopwatch) -> None:
        decode()
        watch.mark("decode")

    return run


def measure(
    task: Task,
    names: Sequence[str],
    *,
    repeats: int,
    dtype: torch.dtype = torch.float32,
    clock: Callable[[], float] = time.perf_counter,
    autoregressive_repeats: int = 1,
    product_size: int = 2048,
) -> list[Measured]:
    """Times contenders in turn, ours first, and the machine's peak in the same rounds.

    The autoregressive decoders run after the others, in separate rounds.
    """
    makers = list_contenders(task, dtype)
    decoders = {name: makers[name]() for name in names}
    # Counting also warms up: it runs each decoder once before the first round.
    works = {
        name: count_autoregressive_work(d) if isinstance(d, Autoregressive) else count_work(d)
        for name, d in decoders.items()
    }
    product = MatrixProduct(dtype, product_size)
    product.rate(repeats=1)
    watches: dict[str, list[Stopwatch]] = {"product": []}
    # An autoregressive image takes minutes, so it gets its own, fewer rounds.
    for is_slow, rounds in ((False, repeats), (True, autoregressive_repeats)):
        runs = {name: _time_decode(decoders[name]) for name in names if (name in _AUTOREGRESSIVE) == is_slow}
        measured = interleave({"product": product, **runs}, repeats=rounds, clock=clock) if runs else {}
        watches["product"] += measured.pop("product", [])
        watches.update(measured)
    peak = product.flops / min(watch.total for watch in watches["product"])
    seconds = {name: [watch.total for watch in watches[name]] for name in names}
    # All contenders start from the same noise, so equal tokens mean equal decoding.
    ours = works["ours"].tokens
    return [
        Measured(
            name,
            task.batch,
            works[name].flops,
            works[name].kernels,
            works[name].syncs,
            float((works[name].tokens == ours).float().mean()) if name in _ALIKE else None,
            seconds[name],
            peak,
            median(seconds[name]) / median(seconds["ours"]),
        )
        for name in names
    ]


def profile_ours(task: Task, dtype: torch.dtype, *, most: int = 8) -> str:
    """Returns a table of the operations that take the most time in a decoding of ours."""
    ours = list_contenders(task, dtype)["ours"]()
    ours()  # packs the weights
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        ours()
    averages = profiled.key_averages()
    whole = sum(each.self_cpu_time_total for each in averages)
    slowest = sorted(averages, key=lambda each: each.self_cpu_time_total, reverse=True)[:most]
    return format_table(
        [
            {
                "operation": each.key,
                "calls": each.count,
                "% of the time": f"{100 * each.self_cpu_time_total / whole:.1f}",
            }
            for each in slowest
        ]
    )


def filter_installed(names: Sequence[str]) -> list[str]:
    """Returns the contenders whose packages are installed, and prints the others."""
    missing = [name for name in PEERS if not is_installed(name)]
    for name in set(missing) & set(names):
        print(f"{name} is not installed and is left out; to install it: python -m pip install -e '.[benchmarks]'")
    return [name for name in names if name not in missing]


def _positive(text: str) -> int:
    """Parses a flag's value as an integer >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text}")
    return int(text)


def _arguments(argv: Sequence[str] | None, names: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=_positive, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    parser.add_argument("--batch-size", type=_positive, default=1, help="batch size (%(default)s)")
    parser.add_argument("--depth", type=_positive, default=24, help="layers (%(default)s)")
    parser.add_argument("--repeats", type=_positive, default=5, help="number of rounds (%(default)s)")
    parser.add_argument(
        "--autoregressive-repeats",
        type=_positive,
        default=1,
        help="number of rounds of the autoregressive decoders (%(default)s)",
    )
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="NAME", help=f"contenders besides ours: {'; '.join(names[1:])}"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="weights (%(default)s)")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: CPU time, if other programs run (%(default)s)"
    )
    parser.add_argument(
        "--profile", action="store_true", help="also print the slowest operations of a decoding of ours"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers and the environment to FILE")
    return parser.parse_args(argv)


def choose_contenders(only: Sequence[str] | None, names: Sequence[str]) -> list[str]:
    """Returns the contenders to measure: ours and those of ``--only``, or all."""
    return filter_installed([name for name in names if only is None or name in ("ours", *only)])


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    arguments = _arguments(argv, list(list_contenders(Task(batch=1, depth=1))))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    task, dtype = Task(batch=arguments.batch_size, depth=arguments.depth), getattr(torch, arguments.dtype)
    config = build_network_config(task)
    print(f"{read_cpu_name()}, {arguments.threads} threads, torch {torch.__version__}, n = {arguments.repeats} rounds")
    print(
        f"{task.depth} layers x {task.embed_dim}, MLP {task.mlp_dim}, {task.num_heads} heads, {config.num_tokens + 1} "
        f"tokens, vocabulary {config.vocabulary_size}, {NUM_STEPS} steps, batch {task.batch}, {arguments.dtype}, "
        f"{arguments.clock} time"
    )
    names = list(list_contenders(Task(batch=1, depth=1), dtype))
    measured = measure(
        task,
        choose_contenders(arguments.only, names),
        repeats=arguments.repeats,
        dtype=dtype,
        clock=CLOCKS[arguments.clock],
        autoregressive_repeats=arguments.autoregressive_repeats,
    )
    print(f"{arguments.dtype} matrix-product peak: {measured[0].peak / 1e9:.1f} GFLOP/s")
    print("\n" + format_table([one.row() for one in measured]))
    if arguments.profile:
        print("\n" + profile_ours(task, dtype))
    if arguments.json:
        report = {
            "environment": {**describe_environment(), "cpu": read_cpu_name()},
            "task": asdict(task),
            "dtype": arguments.dtype,
            "measured": [asdict(one) for one in measured],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
