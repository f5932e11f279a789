"""The decoding time per image of autoregressive decoding and MaskGIT, for several numbers of tokens.

The time does not depend on the values of the weights, so that random ones are used; the tokenizer is not timed.
``timing_page`` makes Figure 4 of the paper from the measurements.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import torch

from maskgit_pl.decoding import (
    AutoregressiveDecoder,
    ConditionalModel,
    DecodingConfig,
    DecodingStep,
    decode_autoregressive,
    decode_classes,
)
from maskgit_pl.evaluation.ledger import Ledger
from maskgit_pl.evaluation.reports.options import NUM_TOKENS
from maskgit_pl.networks.backbone import (
    Attention,
    AutoregressiveBackbone,
    BackboneConfig,
    build_config,
)
from maskgit_pl.networks.backbone_contract import create_network
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.pipeline.pretrained import read_config
from maskgit_pl.provenance import describe_environment, device_name
from maskgit_pl.schedules import mask_schedules

__all__ = ["METHODS", "SIZES", "Method", "Timing", "measure_timings", "read_sizes", "timing_of"]

Method = Literal["MaskGIT", "autoregressive, KV cache", "autoregressive, no cache"]
METHODS: tuple[Method, ...] = get_args(Method)

SIZES = TransformerConfig(1024, 1000, (16, 16), embed_dim=256, depth=8, num_heads=8, mlp_dim=1024)
"""Sizes for a CPU, on which 1,024 tokens without a cache take minutes."""

# A point has at most 15 runs, and ends when another run would exceed 10 s in all; it has at least one run.
_SECONDS, _MAX_RUNS = 10.0, 15
_WARM_UP = 8  # steps before the clock starts


@dataclass(frozen=True)
class Timing:
    """The time per image of one method at one number of tokens.

    Args:
        method: Decoding method.
        num_tokens: Number N of tokens.
        num_steps: Number T of forward passes.
        seconds: Median of the runs, in seconds.
        least: Fastest run, in seconds.
        runs: Number of runs.
        network: Description of the sizes of the network.
        device: Name of the GPU, or of the CPU with its number of threads.
        torch: Version of torch.
        dtype: Precision of weights and matrix products.
        kind: Type of the device, such as ``cpu`` or ``cuda``.
    """

    method: Method
    num_tokens: int
    num_steps: int
    seconds: float
    least: float
    runs: int
    network: str
    device: str
    torch: str
    dtype: str
    kind: str


def read_sizes(folder: Path) -> BackboneConfig:
    """Reads the configuration of the network of a transformer from its folder.

    Raises:
        ValueError: if ``config.json`` is not that of a transformer.
    """
    config = read_config(folder, "transformer")
    return build_config(config.get("network"), f"{folder / 'config.json'}: network")


def measure_timings(
    ledger: Ledger,
    *,
    sizes: BackboneConfig = SIZES,
    num_tokens: Sequence[int] = NUM_TOKENS,
    device: torch.device | str = "cpu",
    on_point: Callable[[Timing], object] = lambda timing: None,
) -> list[Timing]:
    """Times each method at each number of tokens with batch size 1. Points in the ledger are not measured again.

    The methods take turns, so that a change in the speed of the machine affects all of them.

    Args:
        ledger: Ledger, to which each point is added as soon as it is measured.
        sizes: Configuration of the networks; the grid is replaced at each point. Vectors are not timed.
        num_tokens: Numbers N of tokens, all squares.
        device: Device of the networks.
        on_point: Called with each point, measured or from the ledger.

    Returns:
        The points, sorted by N and method.

    Raises:
        ValueError: if a number of tokens is not a square, or the backbone has no causal form.
    """
    for count in num_tokens:
        if count < 1 or math.isqrt(count) ** 2 != count:
            raise ValueError(f"num_tokens must be squares, such as 16 or 256, got {count}")
    device = torch.device(device)
    _with_attention(sizes, "causal")  # raises if there is none
    timings = []
    for count in sorted(set(num_tokens)):
        points = {method: _point_columns(method, count, sizes, device) for method in METHODS}
        found = {method: ledger.find("timing", point) for method, point in points.items()}
        missing = [method for method, row in found.items() if row is None]
        # Each point is written as soon as it is measured, so that a command that is stopped loses at most one.
        for method, seconds in _measure(missing, sizes, count, device) if missing else ():
            found[method] = ledger.add("timing", {**points[method], **_summarize(seconds)})
            on_point(timing_of(found[method]))
        for method, row in found.items():
            timings.append(timing_of(row))
            if method not in missing:
                on_point(timings[-1])
    return timings


def timing_of(row: Mapping[str, Any] | None) -> Timing:
    """Returns the point of a ledger row."""
    assert row is not None  # every row was found or added
    values = {**row, "seconds": row["seconds_per_image"]}
    return Timing(**{each.name: values[each.name] for each in fields(Timing)})


def _with_attention(config: BackboneConfig, attention: Attention) -> BackboneConfig:
    """Returns a configuration with another attention and without conditioning vectors.

    Raises:
        ValueError: if the backbone does not support it.
    """
    changes: dict[str, Any] = {"attention": attention, "condition_dim": 0}
    try:
        return replace(config, **changes)
    except (TypeError, ValueError) as error:  # TypeError: no such field
        raise ValueError(
            f"figure 4 must have a backbone with causal attention, got {config.backbone!r} ({error}); name another run"
        ) from error


def _describe(sizes: BackboneConfig) -> str:
    """Returns the sizes and options of a network in words, which identify it in the ledger."""
    codes = f"{sizes.codebook_size} codes, {sizes.num_classes} classes"
    if sizes.num_token_groups > 1:
        codes += f", {sizes.num_token_groups} token groups"
    if isinstance(sizes, TransformerConfig):
        return f"{sizes.depth} layers x {sizes.embed_dim}, MLP {sizes.mlp_dim}, {sizes.num_heads} heads, {codes}"
    common = {each.name for each in fields(BackboneConfig)} | {"attention"}
    own = [f"{each.name} {getattr(sizes, each.name)}" for each in fields(sizes) if each.name not in common]
    return ", ".join([sizes.backbone, *own, codes])


def _point_columns(method: Method, num_tokens: int, sizes: BackboneConfig, device: torch.device) -> dict[str, Any]:
    """Returns the ledger columns that identify a point."""
    network = _describe(sizes)
    # Everything that changes the time is part of the key: sizes, device, version of torch, precision.
    matmul = torch.get_float32_matmul_precision()
    return {
        "method": method,
        "num_tokens": num_tokens,
        "num_steps": _choose_steps(num_tokens) if method == "MaskGIT" else num_tokens,
        "network": network,
        "device": device_name(device),
        "torch": torch.__version__,
        "dtype": "float32" if matmul == "highest" else f"float32, matmul precision {matmul}",
        "kind": device.type,
    }


def _choose_steps(num_tokens: int) -> int:
    """Returns the T of MaskGIT: 12 steps from 1,024 tokens, 8 below, and at most one per token.

    Source: paper, Table 1.
    """
    return min(num_tokens, 12 if num_tokens >= 1024 else 8)


def _summarize(seconds: Sequence[float]) -> dict[str, Any]:
    commit = describe_environment()["commit"]
    return {"seconds_per_image": median(seconds), "least": min(seconds), "runs": len(seconds), "commit": commit}


def _measure(
    methods: Sequence[Method], sizes: BackboneConfig, num_tokens: int, device: torch.device
) -> Iterator[tuple[Method, list[float]]]:
    """Yields each method with the seconds of its runs, as soon as it has enough runs.

    1. Warm up each method, since the first calls allocate memory and choose kernels.
    2. Take the next method of a queue and time one run.
    3. If it may run again, put it back to the end of the queue.
    """
    decoders = _build_decoders(sizes, num_tokens, device)
    seconds: dict[Method, list[float]] = {method: [] for method in methods}
    for method in methods:  # 1.
        for _ in zip(range(_WARM_UP), decoders[method](), strict=False):
            pass
    waiting = deque(methods)
    while waiting:
        method = waiting.popleft()
        own = seconds[method]  # 2.
        own.append(_time_run(decoders[method], device))
        # 3. The last run is the estimate of the next one.
        if len(own) < _MAX_RUNS and sum(own) + own[-1] <= _SECONDS:
            waiting.append(method)
        else:
            yield method, own


def _time_run(decode: Callable[[], Iterator[DecodingStep]], device: torch.device) -> float:
    """Returns the seconds of one run."""
    # A GPU works asynchronously: wait for it before and after the run.
    _synchronize(device)
    start = time.perf_counter()
    deque(decode(), maxlen=0)
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _build_decoders(
    sizes: BackboneConfig, num_tokens: int, device: torch.device
) -> dict[Method, Callable[[], Iterator[DecodingStep]]]:
    """Returns a function per method that decodes one image, without guidance and with random weights."""
    side, steps = math.isqrt(num_tokens), _choose_steps(num_tokens)
    config = replace(sizes, grid=(side, side))
    # fork_rng keeps the random weights from changing the caller's generator.
    with torch.random.fork_rng(devices=[]), device:
        masked, causal = (
            create_network(_with_attention(config, each)).eval().requires_grad_(requires_grad=False)
            for each in get_args(Attention)
        )
    assert isinstance(causal, AutoregressiveBackbone)
    autoregressive = partial(
        decode_autoregressive,
        ConditionalModel.from_network(causal, device),
        [0],
        [0],
        decoder=AutoregressiveDecoder(num_tokens),
        scales=[0.0] * num_tokens,
    )
    parallel = partial(
        decode_classes,
        ConditionalModel.from_network(masked, device),
        [0],
        [0],
        decoder=DecodingConfig(steps).build_decoder(mask_schedules.build("cosine")),
        scales=[0.0] * steps,
    )
    return {
        "MaskGIT": parallel,
        "autoregressive, KV cache": autoregressive,
        "autoregressive, no cache": partial(autoregressive, cache=False),
    }
