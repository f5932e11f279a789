"""Figure 4 of the paper: time per image over the number of tokens, with random weights and without the tokenizer.

Source: Chang et al., MaskGIT, CVPR 2022, arXiv:2202.04200, Figure 4.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator

from maskgit_pl import MaskGIT, mask_schedules
from maskgit_pl.cli import run_script
from maskgit_pl.cli.flags import ReportFlags, Run, write_page
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.devices import describe_environment, find_device
from maskgit_pl.evaluation.ledger import FILE_NAME, Ledger, Row
from maskgit_pl.evaluation.pages import (
    Page,
    figure_to_png,
    heading,
    markdown,
    markdown_table,
    paragraph,
    plain_label,
)
from maskgit_pl.networks.backbone import BackboneConfig, build_config, create_network
from maskgit_pl.processes import Bars, no_bars, progress_bars
from paper.timing import Decode, build_decoder, describe_machine, time_decoders

NUM_TOKENS = (16, 64, 256, 1024)  # paper, Figure 4
METHODS = ("MaskGIT", "autoregressive, KV cache", "autoregressive, no cache")
_SIZES = {  # for a CPU
    "backbone": "bert", "codebook_size": 1024, "num_classes": 1000, "grid": [16, 16], "embed_dim": 256, "depth": 8,
    "num_heads": 8, "mlp_dim": 1024,
}  # fmt: skip
_COLOURS = {"MaskGIT": "#0d7d6c", "autoregressive, KV cache": "#d98b1f", "autoregressive, no cache": "#c0392b"}


def figure_4(
    run: Run | None = None,
    *,
    num_tokens: tuple[int, ...] = NUM_TOKENS,
    report: ReportFlags = ReportFlags(),
) -> None:
    """Draws Figure 4: time per image of autoregressive decoding and of MaskGIT against the number of tokens.

    The weights are random. The page is RESULTS/figure-4.md with .csv and .png; points that the ledger holds are reused.

    Example: python -m paper.figure_4 --num-tokens 16,64

    Args:
        run: Run folder (runs/NAME) or pretrained folder that sets the sizes of the networks (default: sizes
            that suit a CPU).
        num_tokens: Tokens per image, all squares.

    Raises:
        FileNotFoundError: if the run does not exist.
        ValueError: if a number of tokens is not a square, or the device does not exist.
    """
    sizes = build_config(_SIZES, "sizes") if run is None else MaskGIT.from_pretrained(run).transformer.network.config
    ledger, device = Ledger(report.results / FILE_NAME), find_device(report.device)
    with progress_bars() as bars:
        rows = measure_timings(ledger, sizes=sizes, num_tokens=num_tokens, device=device, bars=bars)
    write_page(replace(make_timing_page(rows), folder=report.results))


def measure_timings(
    ledger: Ledger,
    *,
    sizes: BackboneConfig,
    num_tokens: Sequence[int],
    device: torch.device | str = "cpu",
    bars: Bars = no_bars,
) -> list[Row]:
    """Times each method at each N with batch size 1, and returns the points, sorted by N and method.

    ``sizes`` are those of the networks, without the grid. Points in the ledger are not measured again.
    """
    device = torch.device(device)
    for count in num_tokens:
        if count < 1 or math.isqrt(count) ** 2 != count:
            raise ValueError(f"num_tokens must be squares, such as 16 or 256, got {count}")
    rows, advance = [], bars("figure 4: points", len(METHODS) * len(set(num_tokens)))
    for count in sorted(set(num_tokens)):
        # Source of T: paper, Table 1: 12 steps from 1,024 tokens, 8 below, and at most one per token.
        num_steps = min(count, 12 if count >= 1024 else 8)
        # The key of a point is everything that changes the time.
        common = {"num_tokens": count, "network": _describe(sizes), **describe_machine(device)}
        keys = {
            method: {"method": method, "num_steps": num_steps if method == "MaskGIT" else count, **common}
            for method in METHODS
        }
        measured = {method: row for method, key in keys.items() if (row := ledger.find("timing", key)) is not None}
        advance(len(measured))
        missing = [method for method in METHODS if method not in measured]
        decoders = _build_random_decoders(sizes, count, num_steps, device) if missing else {}
        for method, seconds in time_decoders({method: decoders[method] for method in missing}, device):
            measured[method] = ledger.add("timing", {
                **keys[method], "seconds_per_image": median(seconds), "least": min(seconds), "runs": len(seconds),
                "commit": describe_environment()["commit"],
            })  # fmt: skip
            advance(1)
        rows += [measured[method] for method in METHODS]
    return rows


def _describe(sizes: BackboneConfig) -> str:
    """Returns the sizes and options of a network in words, which identify it in the ledger."""
    left_out = ("backbone", "attention", "grid", "class_dropout", "dropout", "condition_dim")
    words = [f"{field.name} {getattr(sizes, field.name)}" for field in fields(sizes) if field.name not in left_out]
    return ", ".join([sizes.backbone, *words])


def _build_random_decoders(
    sizes: BackboneConfig, num_tokens: int, num_steps: int, device: torch.device
) -> dict[str, Decode]:
    """Returns a function per method that decodes one image, without guidance and with random weights."""
    changes: dict[str, Any] = {"condition_dim": 0, "grid": (math.isqrt(num_tokens),) * 2}
    networks = []
    # fork_rng keeps the random weights from changing the caller's generator.
    with torch.random.fork_rng(devices=[]), device:
        for attention in ("bidirectional", "causal"):
            config = replace(sizes, **changes | {"attention": attention})
            networks.append(create_network(config).eval().requires_grad_(requires_grad=False))
    bidirectional, causal = networks
    parallel = build_decoder(bidirectional, DecodingConfig(num_steps), mask_schedules.build("cosine"), device)
    one_by_one = build_decoder(causal, DecodingConfig(num_tokens, None), None, device)
    return dict(zip(METHODS, (parallel, one_by_one, partial(one_by_one, cache=False)), strict=True))


def make_timing_page(rows: Sequence[Row]) -> Page:
    """Returns the page of ``measure_timings``: an explanation, the figure, and a table with the ratios."""
    first = rows[0]
    lines = {method: {row["num_tokens"]: row for row in rows if row["method"] == method} for method in METHODS}
    cells = []
    for count, maskgit_row in lines["MaskGIT"].items():
        points = [lines[method][count] for method in METHODS]
        seconds = [row["seconds_per_image"] for row in points]
        times = [f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms" for value in seconds]
        cells.append([
            str(count), str(maskgit_row["num_steps"]),
            *(f"{text} (n = {row['runs']})" for text, row in zip(times, points, strict=True)),
            *(f"{ratio:.{int(ratio < 9.95)}f}" for ratio in (value / seconds[0] for value in seconds[1:])),
        ])  # fmt: skip
    headings = ["N", "T of MaskGIT", *METHODS, "KV cache / MaskGIT", "no cache / MaskGIT"]
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
            f"{markdown(first['device'])}, torch {markdown(first['torch'])}. The paper reports ratios of 30 to 64",
            "on a GPU, on which a step for all tokens of an image takes about as long as a step for one. On a CPU, the",
            "time is proportional to the work, and a cache saves most of it.",
        ),
        "",
        *markdown_table(headings, cells, left=0),
    ]
    return Page("figure-4", text, rows, {"figure-4.png": _draw_timings(lines)})


def _draw_timings(lines: Mapping[str, Mapping[int, Row]]) -> bytes:
    """Draws the seconds per image over the number of tokens as a PNG, with a line per method.

    Source: paper, Figure 4.
    """
    page, counts = Figure(figsize=(8.8, 5.4), layout="constrained"), sorted(lines["MaskGIT"])
    axes, first = page.subplots(), lines["MaskGIT"][counts[0]]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    steps = " and ".join(map(str, sorted({row["num_steps"] for row in lines["MaskGIT"].values()})))
    for method, points in lines.items():
        is_front = method == "MaskGIT"
        axes.plot(
            list(points), [row["seconds_per_image"] for row in points.values()], color=_COLOURS[method], marker="o",
            linewidth=3 if is_front else 1.8, zorder=3 if is_front else 2,
            label=f"MaskGIT, T = {steps}" if is_front else method,
        )  # fmt: skip
    axes.set_xticks(counts, [f"{count}\n{math.isqrt(count)} x {math.isqrt(count)}" for count in counts])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter(EngFormatter("s"))
    axes.minorticks_off()
    axes.set(xlabel="tokens per image, N", ylabel="transformer time per image")
    axes.set_title(
        "Figure 4: autoregressive decoding and MaskGIT\n"
        f"{plain_label(first['network'])}; batch 1, {plain_label(first['dtype'])}\n"
        f"{plain_label(first['device'])}, torch {plain_label(first['torch'])}", fontsize=10, loc="left",
    )  # fmt: skip
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure_to_png(page)


if __name__ == "__main__":
    sys.exit(run_script(figure_4, prog="python -m paper.figure_4"))
