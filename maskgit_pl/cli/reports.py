"""``maskgit table``, ``figure`` and ``ablation``: the paper's tables and figures with our models, and other pages."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from maskgit_pl import evaluation
from maskgit_pl.cli.arguments import Output, Word
from maskgit_pl.cli.flags import CasFlags, Folder, Numbers, Run, Runs, Seeds, Specs, print_page
from maskgit_pl.evaluation.options import FEATURES, NUM_TOKENS, ReportOptions
from maskgit_pl.processes import progress_bars
from maskgit_pl.runs.recipe import Overrides
from maskgit_pl.runs.variants import AblationConfig, Factor, parse_factor
from maskgit_pl.text import count_text, printable

if TYPE_CHECKING:
    from maskgit_pl.evaluation.pages import Page


@dataclass(frozen=True)
class ReportFlags(ReportOptions):
    """The options of a page as they are typed."""

    features: Specs = FEATURES
    results: Annotated[Path, Output("")] = Path("results")


def table(
    number: Literal[1, 2],
    runs: Runs = (),
    *,
    num_steps: Numbers | None = None,
    cas_images: int | None = None,
    report: ReportFlags = ReportFlags(),
    accuracy_score: CasFlags = CasFlags(),
) -> None:
    """Writes Table 1 or 2 of the paper with our rows.

    The table is written as Markdown and CSV, with the rows of the paper and of the runs, and a picture. 1:
    class-conditional generation, with the times of decoding and training; runs that differ only in their seed share a
    row. 2: outpainting and inpainting. Measurements that the ledger holds are reused.

    Example: maskgit table 1 runs/fashion-mnist-adaln --num-images 2000 --num-steps 1,2,4,8,16

    Args:
        number: Number of the table in the paper.
        runs: Run folders (runs/NAME) or pretrained folders.
        num_steps: Further decoding steps T of which Table 1 has the FID.
        cas_images: Number of images that the CAS network is trained on (default: --num-images).
    """
    with progress_bars() as bars:
        if number == 1:
            page = evaluation.table_1(
                runs, report, cas=accuracy_score.config, cas_images=cas_images, num_steps=num_steps or (), bars=bars
            )
        else:
            page = evaluation.table_2(runs, report, bars=bars)
    _write_page(page)


def figure(
    number: Literal[2, 4],
    runs: Runs = (),
    *,
    class_name: str | None = None,
    num_tokens: Annotated[tuple[int, ...], Word("N,...")] = NUM_TOKENS,
    report: ReportFlags = ReportFlags(),
) -> None:
    """Draws Figure 2 or 4 of the paper with our models and measurements.

    2: the decoding of each run step by step, such as that of an autoregressive one and of MaskGIT. 4: time per image of
    autoregressive decoding and of MaskGIT against the number of tokens, with random weights; a run sets the sizes of
    the networks.

    Example: maskgit figure 2 runs/fashion-mnist-adaln-autoregressive runs/fashion-mnist-adaln --class-name Sneaker

    Args:
        number: Number of the figure in the paper.
        runs: Run folders (runs/NAME) or pretrained folders.
        class_name: Name or index of the class of Figure 2 (default: the first class).
        num_tokens: Tokens per image in Figure 4.
    """
    with progress_bars() as bars:
        if number == 2:
            page = evaluation.figure_2(runs, report, class_name=class_name, bars=bars)
        elif len(runs) > 1:
            raise ValueError(f"figure 4 must have at most one RUN, which sets the sizes, got {len(runs)}")
        else:
            page = evaluation.figure_4(next(iter(runs), None), report, num_tokens=num_tokens, bars=bars)
    _write_page(page)


@dataclass(frozen=True)
class AblationFlags(AblationConfig):
    """An ablation as it is typed."""

    vary: Annotated[list[Factor], Word("KEY=A,B,...", parse_factor)] = field(default_factory=list)
    at: Annotated[Factor, Word("KEY=A,B,...", parse_factor)] | None = None
    recipes: Annotated[Sequence[str], Word("'A;B;C D'", lambda _, text: text.split(";"))] = AblationConfig.recipes
    of: Run | None = None
    num_steps: Numbers = ()
    seeds: Seeds = (0, 1)
    stage_2: Annotated[Overrides, Word("'FLAGS'", lambda _, text: shlex.split(text), bare="")] | None = None
    runs_folder: Folder = Path("runs")
    tokenizer: Folder | None = None


def ablation(*, variants: AblationFlags, report: ReportFlags = ReportFlags(), overrides: Sequence[str] = ()) -> int:
    """Trains variants of a recipe on the same budget, or decodes a run in several ways, and compares them.

    Each variant is measured with each seed; one page compares them. Finished runs and recorded measurements are
    reused. Further flags override single recipe values of all variants, such as --model.network.depth 2.

    Example: maskgit ablation --vary model.network.depth=2,4,6 --vary decoding.guidance.scale=0,1,2 --seeds 0,1,2
    """
    with progress_bars() as bars:
        page = evaluation.run_ablation(replace(variants, overrides=tuple(overrides)), report, bars=bars)
    _write_page(page)
    failed = [row for row in page.rows if "failure" in row]
    if not failed:
        return 0
    listed = "; ".join(f"{row['variant']}, seed {row['seed']}: {row['failure']}" for row in failed)
    print(
        f"maskgit ablation: {count_text(len(failed), 'run')} failed, and the page has the others: {printable(listed)}. "
        "Repeat the command to try again",
        file=sys.stderr,
    )
    return int(failed[0]["exit_code"])


def _write_page(page: Page) -> None:
    """Writes a page to its folder, and prints it."""
    page.write()
    print_page(page)
