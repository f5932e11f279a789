"""Figure 4 of the paper: the decoding time per image of autoregressive decoding and MaskGIT over the number of tokens.

The time does not depend on the values of the weights, so that random ones are used; the tokenizer is not timed.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator

from maskgit_pl.decoding import (
    AutoregressiveDecoder,
    ConditionalModel,
    DecodingConfig,
    DecodingStep,
    decode_autoregressive,
    decode_classes,
)
from maskgit_pl.distributed import describe_environment, device_name, find_device
from maskgit_pl.errors import markdown, plain_label
from maskgit_pl.evaluation.ledger import FILE_NAME, Ledger, Row
from maskgit_pl.evaluation.options import NUM_TOKENS, ReportOptions
from maskgit_pl.evaluation.pages import Page, figure_to_png, heading, markdown_table, paragraph
from maskgit_pl.networks.backbone import Attention, AutoregressiveBackbone, BackboneConfig, build_config, create_network
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.pipeline.pretrained import read_config
from maskgit_pl.pipeline.sharing import local_folder
from maskgit_pl.processes import Bars, no_bars
from maskgit_pl.schedules import mask_schedules

__all__ = ["METHODS", "SIZES", "Method", "figure_4", "make_timing_page", "measure_timings"]

Method = Literal["MaskGIT", "autoregressive, KV cache", "autoregressive, no cache"]
METHODS: tuple[Method, ...] = get_args(Method)

SIZES = TransformerConfig(1024, 1000, (16, 16), embed_dim=256, depth=8, num_heads=8, mlp_dim=1024)
"""Sizes for a CPU, on which 1,024 tokens without a cache take minutes."""

# A point has at most 15 runs, and ends when another run would exceed 10 s in all; it has at least one run.
_SECONDS, _MAX_RUNS = 10.0, 15
_WARM_UP = 8  # steps before the clock starts
_CSV = ("method", "num_tokens", "num_steps", "seconds", "least", "runs", "network", "device", "torch", "dtype", "kind")

_COLOURS = {"MaskGIT": "#0d7d6c", "autoregressive, KV cache": "#d98b1f", "autoregressive, no cache": "#c0392b"}
_EXPLANATIONS = {  # by type of the device
    "cpu": "The paper reports ratios of 30 to 64 on a GPU, which computes all tokens of an image in about the time of "
    "one. On a CPU, as here, the time is proportional to the work, and a cache saves most of it.",
    "cuda": "The paper reports ratios of 30 to 64, also on a GPU. If the tokens of an image do not fill the GPU, a "
    "step for all tokens takes about as long as a step for one, and the ratio approaches N / T. With more tokens, the "
    "time is proportional to the work.",
}
_OTHER_DEVICE = "The paper reports ratios of 30 to 64 on a GPU."


def figure_4(
    run: Path | str | None = None,
    options: ReportOptions | None = None,
    *,
    num_tokens: Sequence[int] = NUM_TOKENS,
    sizes: Mapping[str, int] | None = None,
    bars: Bars = no_bars,
) -> Page:
    """Makes Figure 4: the time per image over the number of tokens, for autoregressive decoding and MaskGIT.

    Args:
        run: Run folder or pretrained folder whose sizes are timed, with random weights; None for sizes that suit a CPU.
        options: Folder of the results, and device; None for the defaults.
        num_tokens: Numbers N of tokens, all squares.
        sizes: Sizes of the transformer, such as ``{"depth": 8}``, that replace those of the run or the defaults.
        bars: Progress bars.

    Raises:
        FileNotFoundError: if the run does not exist.
        ValueError: if a size is out of range, a number of tokens is not a square, or the device does not exist.
    """
    options, sizes = options or ReportOptions(), dict(sizes or {})
    config: BackboneConfig = SIZES
    if run is not None:
        folder = local_folder(run) / "transformer"
        config = build_config(read_config(folder, "transformer").get("network"), f"{folder / 'config.json'}: network")
    rows = measure_timings(
        Ledger(options.results / FILE_NAME),
        sizes=replace(config, **sizes),  # type: ignore[arg-type]  # fields of another backbone raise a TypeError
        num_tokens=num_tokens,
        device=find_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu")),
        bars=bars,
    )
    return replace(make_timing_page(rows), folder=options.results)


def measure_timings(
    ledger: Ledger,
    *,
    sizes: BackboneConfig = SIZES,
    num_tokens: Sequence[int] = NUM_TOKENS,
    device: torch.device | str = "cpu",
    bars: Bars = no_bars,
) -> list[Row]:
    """Times each method at each number of tokens with batch size 1. Points in the ledger are not measured again.

    The methods take turns, so that a change in the speed of the machine affects all of them.

    Args:
        ledger: Ledger, to which each point is added as soon as it is measured.
        sizes: Configuration of the networks; the grid is replaced at each point. Vectors are not timed.
        num_tokens: Numbers N of tokens, all squares.
        device: Device of the networks.
        bars: Progress bars.

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
    rows, advance = [], bars("figure 4: points", len(METHODS) * len(set(num_tokens)))
    for count in sorted(set(num_tokens)):
        keys = {method: _key_columns(method, count, sizes, device) for method in METHODS}
        found = {method: row for method, key in keys.items() if (row := ledger.find("timing", key)) is not None}
        advance(len(found))
        missing = [method for method in METHODS if method not in found]
        # Each point is written as soon as it is measured, so that a command that is stopped loses at most one.
        for method, seconds in _measure(missing, sizes, count, device) if missing else ():
            found[method] = ledger.add("timing", {**keys[method], **_summarize(seconds)})
            advance(1)
        rows += [found[method] for method in METHODS]
    return rows


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


def _key_columns(method: Method, num_tokens: int, sizes: BackboneConfig, device: torch.device) -> dict[str, Any]:
    """Returns the ledger columns that identify a point: everything that changes the time."""
    matmul = torch.get_float32_matmul_precision()
    return {
        "method": method,
        "num_tokens": num_tokens,
        "num_steps": _choose_steps(num_tokens) if method == "MaskGIT" else num_tokens,
        "network": _describe(sizes),
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


def make_timing_page(rows: Sequence[Row]) -> Page:
    """Returns the page: an explanation, the figure, and a table with the ratios.

    Args:
        rows: See ``measure_timings``.
    """
    first, lines = rows[0], _group_by_method(rows)
    counts = list(lines["MaskGIT"])
    text = [
        *heading("Figure 4: decoding time of autoregressive decoding and MaskGIT"),
        "![time per image over the number of tokens](figure-4.png)",
        "",
        *paragraph(
            "Time of the transformer per image with batch size 1, without guidance and without the tokenizer. Each",
            "value is the median of n runs, in which the methods took turns. Both methods use the same network with",
            "random weights, autoregressive decoding with a causal attention mask. MaskGIT decodes with the cosine",
            "schedule, the most confident tokens first; its first step, of an all-masked image, is computed, too.",
            f"Network: {markdown(first['network'])}, {markdown(first['dtype'])}. Machine:",
            f"{markdown(first['device'])}, torch {markdown(first['torch'])}.",
        ),
        "",
    ]
    cells = []
    for count in counts:
        times = [f"{_format_seconds(lines[method][count])} (n = {lines[method][count]['runs']})" for method in METHODS]
        ratios = [_format_ratio(lines, method, count) for method in METHODS[1:]]
        cells.append([str(count), str(lines["MaskGIT"][count]["num_steps"]), *times, *ratios])
    headings = ["N", "T of MaskGIT", *METHODS, "KV cache / MaskGIT", "no cache / MaskGIT"]
    text += markdown_table(headings, cells, left=0)
    cached, uncached = (_format_ratio(lines, method, counts[-1]) for method in METHODS[1:])
    conclusion = paragraph(
        f"At N = {counts[-1]}, autoregressive decoding takes {cached} times as long as MaskGIT with a cache, and",
        f"{uncached} times without one. {_EXPLANATIONS.get(first['kind'], _OTHER_DEVICE)}",
    )
    values = [{name: row["seconds_per_image" if name == "seconds" else name] for name in _CSV} for row in rows]
    return Page("figure-4", "\n".join([*text, "", *conclusion, ""]), values, {"figure-4.png": _draw_timings(rows)})


def _format_seconds(row: Row) -> str:
    seconds = row["seconds_per_image"]
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _format_ratio(lines: Mapping[Method, Mapping[int, Row]], method: Method, count: int) -> str:
    """Returns the ratio of a time to MaskGIT's, with two digits."""
    factor = lines[method][count]["seconds_per_image"] / lines["MaskGIT"][count]["seconds_per_image"]
    return f"{factor:.1f}" if factor < 9.95 else f"{factor:.0f}"


def _group_by_method(rows: Sequence[Row]) -> dict[Method, dict[int, Row]]:
    return {method: {row["num_tokens"]: row for row in rows if row["method"] == method} for method in METHODS}


def _draw_timings(rows: Sequence[Row]) -> bytes:
    """Draws the seconds per image over the number of tokens as a PNG, with a line per method.

    Source: paper, Figure 4.
    """
    page, first = Figure(figsize=(8.8, 5.4), layout="constrained"), rows[0]
    axes = page.subplots()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for method, points in _group_by_method(rows).items():
        steps = " and ".join(map(str, sorted({row["num_steps"] for row in points.values()})))
        is_front = method == "MaskGIT"
        axes.plot(
            list(points), [row["seconds_per_image"] for row in points.values()], color=_COLOURS[method], marker="o",
            linewidth=3 if is_front else 1.8, zorder=3 if is_front else 2,
            label=f"MaskGIT, T = {steps}" if is_front else method,
        )  # fmt: skip
    counts = sorted({row["num_tokens"] for row in rows})
    axes.set_xticks(counts, [f"{count}\n{math.isqrt(count)} x {math.isqrt(count)}" for count in counts])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter(EngFormatter("s"))
    axes.minorticks_off()
    axes.set_xlabel("tokens per image, N")
    axes.set_ylabel("transformer time per image")
    axes.set_title(
        "Figure 4: autoregressive decoding and MaskGIT\n"
        f"{plain_label(first['network'])}; batch 1, {plain_label(first['dtype'])}\n"
        f"{plain_label(first['device'])}, torch {plain_label(first['torch'])}", fontsize=10, loc="left",
    )  # fmt: skip
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure_to_png(page)
