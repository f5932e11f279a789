"""``maskgit schedules``: what each mask schedule does, as a table and as the paper's figure."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit_pl.cli.model import check_at_least, naming_flags
from maskgit_pl.cli.outputs import check_outputs, made_folder

if TYPE_CHECKING:
    from maskgit_pl.schedules import MaskSchedule

__all__ = ["add_parser", "kept_after_each_step", "plot", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "schedules", help="tokens kept after each step, for every mask schedule", allow_abbrev=False
    )
    parser.add_argument("--num-tokens", type=int, default=256, metavar="N", help="tokens of an image (default: 256)")
    parser.add_argument("--num-steps", type=int, default=8, metavar="T", help="decoding steps (default: 8)")
    parser.add_argument(
        "--schedule",
        nargs="+",
        metavar="NAME",
        help="""names, or mappings such as '{"name": "pow", "exponent": 3}' (default: every one without arguments)""",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the mask ratio against progress")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the table, and draws the figure where it is asked for.

    Raises:
        ValueError: An unknown schedule, or more steps than tokens.
    """
    check_at_least(args, num_tokens=1, num_steps=1)
    check_outputs(args, plot=".png")
    from maskgit_pl.decoding.limits import check_num_steps

    with naming_flags(args):
        check_num_steps(args.num_steps, args.num_tokens)
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from maskgit_pl.text import printable

    schedules = _schedules(args.schedule)
    table = Table(title=f"tokens known after each of {args.num_steps} steps, of {args.num_tokens}")
    table.add_column("mask schedule")
    for step in range(1, args.num_steps + 1):
        table.add_column(str(step), justify="right")
    for name, schedule in schedules.items():
        kept = kept_after_each_step(schedule, num_tokens=args.num_tokens, num_steps=args.num_steps)
        table.add_row(escape(printable(name)), *map(str, kept))
    Console().print(table)
    if args.plot is not None:
        made_folder(args.plot.parent)
        plot(schedules, args.plot, num_tokens=args.num_tokens)
        print(f"{args.plot}: mask ratio of {len(schedules)} schedules")
    return 0


def kept_after_each_step(schedule: MaskSchedule, *, num_tokens: int, num_steps: int) -> list[int]:
    """How many tokens of an image are known after each step, as the decoder counts them.

    Raises:
        ValueError: Fewer than one step, or more steps than tokens.
    """
    from maskgit_pl.decoding import ParallelDecoder
    from maskgit_pl.decoding.selectors import token_selectors

    decoder = ParallelDecoder(schedule, token_selectors.build("confidence"), num_steps=num_steps)
    return [num_tokens - masked for (masked,) in decoder.masked_counts([num_tokens], num_tokens)[1:]]


def plot(schedules: dict[str, MaskSchedule], path: Path, *, num_tokens: int) -> None:
    """Draws mask ratio against progress for every schedule. Source: paper, Figure 8, left.

    Args:
        schedules: By the name that the legend shows.
        path: A PNG.
        num_tokens: N, on which some schedules depend.
    """
    import torch
    from matplotlib.figure import Figure

    from maskgit_pl.text import plain_label

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    progress = torch.linspace(0, 1, 513)
    ratios = {name: schedule(progress, num_tokens) for name, schedule in schedules.items()}
    # In the legend as on the page: what stays masked longest stands at the top.
    for number, name in enumerate(sorted(ratios, key=lambda name: -float(ratios[name].mean()))):
        style = ("solid", "dashed", "dashdot")[number // 10 % 3]  # ten colours, then the next line style
        axes.plot(progress.numpy(), ratios[name].numpy(), label=plain_label(name), linestyle=style, linewidth=1.8)
    axes.set(xlabel="progress t / T", ylabel="mask ratio", xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title(f"mask schedules, {num_tokens} tokens")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")


def _schedules(wanted: list[str] | None) -> dict[str, MaskSchedule]:
    from maskgit_pl.registry import describe
    from maskgit_pl.schedules import mask_schedules

    if wanted is not None:
        return {describe(spec): mask_schedules.build(spec) for spec in map(_spec, wanted)}
    return mask_schedules.build_all()


def _spec(word: str) -> str | dict[str, Any]:
    if not word.lstrip().startswith("{"):
        return word
    try:
        spec: dict[str, Any] = json.loads(word)
    except json.JSONDecodeError as error:
        raise ValueError(f"--schedule {word}: a name or a JSON mapping is needed ({error})") from error
    return spec
