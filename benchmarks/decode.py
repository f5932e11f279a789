"""Measures decoding without a tokenizer: ours, exact and approximate, two peers, and an autoregressive decoder.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/decode.py --threads 2 --repeats 5 --json decode.json

benchmarks/README.md describes the rows and the columns of the table.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import MatrixProduct, Stopwatch, format_table, interleave, read_cpu_name
from stage2_step import MuseClasses, Task, is_bfloat16_slow
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
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
from maskgit_pl.evaluation.classifier_training import obtain_classifier
from maskgit_pl.evaluation.run_folders import find_run, open_data
from maskgit_pl.networks.autoregressive import AutoregressiveTransformer
from maskgit_pl.networks.int8 import quantize
from maskgit_pl.networks.transformer import MaskedTransformer, TransformerConfig
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.provenance import describe_environment
from maskgit_pl.schedules import mask_schedules

Decode = Callable[[], Tensor]
"""Decodes a batch and gives its tokens (B, N)."""

_STEPS = 8
_CONTEXT_CACHE = 4
_CPU = torch.device("cpu")
_MUSE, _AMUSED = "muse-maskgit-pytorch", "diffusers aMUSEd"
_PEERS = {_MUSE: "muse_maskgit_pytorch", _AMUSED: "diffusers"}
_AUTOREGRESSIVE = ("autoregressive, KV cache", "autoregressive, no cache")
_ALIKE = (
    "ours",
    "ours, first step cached",
    "ours, int8",
    "ours, int8, first step cached",
    "ours, context cache",
    "ours, context cache, first step cached",
    "ours, bf16",
)
_WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "unique2", "_unique2"}


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
        context_cache: Steps between full passes; see ``CachedPredictor``.
    """

    def __init__(
        self,
        network: MaskedTransformer,
        task: Task,
        *,
        hit: bool = False,
        guidance: dict[str, Any] | str = "constant",
        context_cache: int = 1,
    ) -> None:
        self.network, self.hit = network, hit
        self.config = network.config
        self.decoder = ParallelDecoder(
            mask_schedules.build("cosine"), token_selectors.build("confidence"), num_steps=_STEPS
        )
        self.scales = guidance_scales(guidance_schedules.build(guidance), _STEPS)
        # Room for 1000 classes and the null class.
        self.first = FirstStepLogits(
            network, num_tokens=self.config.num_tokens, mask_token_id=self.config.mask_token_id, max_labels=1001
        )
        self.model = ConditionalModel.from_network(
            network, _CPU, first_step_logits=self.first, context_cache=context_cache
        )
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
        tokens: Tensor = model.generate([""] * task.batch, timesteps=_STEPS, cond_scale=1)
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
            num_inference_steps=_STEPS,
            guidance_scale=1.0,
            output_type="latent",
            return_dict=False,
        )[0]
        return tokens.flatten(1)

    return decode


class Counter(TorchDispatchMode):
    """A dispatch mode that counts kernels (calls that are not views) and synchronizations of host and GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.syncs = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.kernels += not func.is_view
        self.syncs += name in _WAITS or (name == "index" and _has_mask(args))
        return func(*args, **kwargs or {})


def _has_mask(args: Any) -> bool:
    """Returns True if an index is a mask: the host must wait for the number of True values."""
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    flops: int = sdpa_flop_count(query, key, value)
    return flops


def _int8_flops(x: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return 2 * prod(out_shape) * int(x[-1])


_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.onednn.qlinear_pointwise: _int8_flops,
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
    counter = Counter()
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
        peak: Best rate of a float32 matrix product over all rounds, in FLOP/s.
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


def list_contenders(task: Task) -> dict[str, Callable[[], Decode]]:
    """Returns functions that build each decoder, by name; ours and the autoregressive ones share their weights."""
    # Seeded: every run of the benchmark measures the same weights.
    torch.manual_seed(0)
    network = MaskedTransformer(build_network_config(task)).eval().requires_grad_(requires_grad=False)
    exact = partial(Ours, network, task)
    return {
        "ours": exact,
        "ours, first step cached": partial(exact, hit=True),
        "ours, guided": partial(exact, guidance={"name": "linear", "scale": 3.0}),
        "ours, int8": lambda: Ours(quantize(network), task),
        "ours, int8, first step cached": lambda: Ours(quantize(network), task, hit=True),
        "ours, context cache": partial(exact, context_cache=_CONTEXT_CACHE),
        "ours, context cache, first step cached": partial(exact, context_cache=_CONTEXT_CACHE, hit=True),
        "ours, bf16": lambda: Ours(copy.deepcopy(network).to(torch.bfloat16), task),
        _MUSE: lambda: build_muse(task),
        _AMUSED: lambda: build_amused(task),
        _AUTOREGRESSIVE[0]: lambda: Autoregressive(make_autoregressive(network), task, cache=True),
        _AUTOREGRESSIVE[1]: lambda: Autoregressive(make_autoregressive(network), task, cache=False),
    }


def _time_decode(decode: Decode) -> Callable[[Stopwatch], None]:
    def run(watch: Stopwatch) -> None:
        decode()
        watch.mark("decode")

    return run


def measure(
    task: Task, names: Sequence[str], *, repeats: int, autoregressive_repeats: int = 1, product_size: int = 2048
) -> list[Measured]:
    """Times contenders in turn, ours first, and the machine's peak in the same rounds.

    The autoregressive decoders run after the others, in separate rounds.
    """
    makers = list_contenders(task)
    decoders = {name: makers[name]() for name in names}
    # Counting also warms up: it runs each decoder once before the first round.
    works = {
        name: count_autoregressive_work(d) if isinstance(d, Autoregressive) else count_work(d)
        for name, d in decoders.items()
    }
    product = MatrixProduct(torch.float32, product_size)
    product.rate(repeats=1)
    watches: dict[str, list[Stopwatch]] = {"product": []}
    # An autoregressive image takes minutes, so it gets its own, fewer rounds.
    for is_slow, rounds in ((False, repeats), (True, autoregressive_repeats)):
        runs = {name: _time_decode(decoders[name]) for name in names if (name in _AUTOREGRESSIVE) == is_slow}
        measured = interleave({"product": product, **runs}, repeats=rounds) if runs else {}
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


@dataclass(frozen=True)
class TrainedEffect:
    """The effect of a decoding mode on the images of a trained model.

    Args:
        same: Fraction of tokens equal to those of the exact mode with the same noise.
        agreement: Fraction of images that the run's classifier assigns to the requested class.
    """

    same: float
    agreement: float

    def row(self) -> dict[str, str]:
        """Returns the columns that are added to the row of the table."""
        return {"trained: same": f"{100 * self.same:.1f} %", "trained: class": f"{100 * self.agreement:.1f} %"}


def evaluate_trained(run: Path, names: Sequence[str], *, num_images: int) -> dict[str, TrainedEffect]:
    """Decodes images of a trained run in each of our modes, without guidance, and evaluates them."""
    folders = find_run(run)
    pipe = MaskGIT.from_pretrained(folders.pretrained)
    classifier = obtain_classifier(folders.judge, open_data(folders, pipe))
    # Classes in equal numbers: image i belongs to class floor(i * classes / images).
    labels = [number * len(pipe.class_names) // num_images for number in range(num_images)]
    exact, found = None, {}
    for name in names:
        if name not in _ALIKE or name.endswith("first step cached"):
            continue
        made = {"ours, int8": pipe.quantized, "ours, bf16": lambda: _bfloat16(folders.pretrained)}.get(name)
        model = pipe if made is None else made()
        # The callback keeps the tokens of the last step of each batch.
        kept: list[Tensor] = []
        images = model.generate(
            labels,
            output_type="pt",
            guidance_scale=0.0,
            context_cache=_CONTEXT_CACHE if name == "ours, context cache" else 1,
            callback=lambda step, kept=kept: None if bool(step.still_masked.any()) else kept.append(step.tokens),
        )
        tokens = torch.cat(kept)
        # The first mode is "ours", the exact one.
        exact = tokens if exact is None else exact
        agreement = (classifier.predict(images).logits.argmax(1) == torch.tensor(labels)).float().mean()
        found[name] = TrainedEffect(float((tokens == exact).float().mean()), float(agreement))
    return found | {
        f"{name}, first step cached": found[name] for name in found if f"{name}, first step cached" in names
    }


def _bfloat16(folder: Path) -> MaskGIT:
    return MaskGIT.from_pretrained(folder).to("cpu", dtype=torch.bfloat16)


def filter_installed(names: Sequence[str]) -> list[str]:
    """Returns the contenders whose packages are installed, and prints the others."""
    missing = [name for name, package in _PEERS.items() if importlib.util.find_spec(package) is None]
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
    parser.add_argument(
        "--run", type=Path, metavar="RUN", help="also measure how each mode changes the images of this run"
    )
    parser.add_argument("--num-images", type=_positive, default=500, help="images of that run (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers and the environment to FILE")
    return parser.parse_args(argv)


def choose_contenders(only: Sequence[str] | None, names: Sequence[str]) -> list[str]:
    """Returns the contenders to measure: ours and those of ``--only``, or all; bf16 only if the CPU supports it."""
    wanted = [name for name in names if only is None or name in ("ours", *only)]
    if only is None and is_bfloat16_slow():
        print("bf16 is left out: this CPU has no bfloat16 instructions (--only 'ours, bf16' measures it anyway)")
        wanted.remove("ours, bf16")
    return filter_installed(wanted)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    names = list(list_contenders(Task(batch=1, depth=1)))
    arguments = _arguments(argv, names)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    task = Task(batch=arguments.batch_size, depth=arguments.depth)
    config = build_network_config(task)
    print(f"{read_cpu_name()}, {arguments.threads} threads, torch {torch.__version__}, n = {arguments.repeats} rounds")
    print(
        f"{task.depth} layers x {task.embed_dim}, MLP {task.mlp_dim}, {task.num_heads} heads, {config.num_tokens + 1} "
        f"tokens, vocabulary {config.vocabulary_size}, {_STEPS} steps, batch {task.batch}, fp32"
    )
    measured = measure(
        task,
        choose_contenders(arguments.only, names),
        repeats=arguments.repeats,
        autoregressive_repeats=arguments.autoregressive_repeats,
    )
    print(f"fp32 matrix-product peak: {measured[0].peak / 1e9:.1f} GFLOP/s")
    trained: dict[str, TrainedEffect] = {}
    if arguments.run:
        trained = evaluate_trained(arguments.run, [one.name for one in measured], num_images=arguments.num_images)
        print(f"trained: {arguments.run}, {arguments.num_images} images without guidance")
    nothing = {"trained: same": "-", "trained: class": "-"} if trained else {}
    rows = [one.row() | (trained[one.name].row() if one.name in trained else nothing) for one in measured]
    print("\n" + format_table(rows))
    if arguments.json:
        report = {
            "trained": {name: asdict(one) for name, one in trained.items()},
            "environment": {**describe_environment(), "cpu": read_cpu_name()},
            "task": asdict(task),
            "measured": [asdict(one) for one in measured],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
