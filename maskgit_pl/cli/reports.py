"""``maskgit ablation``: variants of a recipe on one page."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from maskgit_pl import evaluation
from maskgit_pl.cli.arguments import Word
from maskgit_pl.cli.flags import Folder, Numbers, ReportFlags, Run, Seeds, write_page
from maskgit_pl.evaluation.run_folders import find_run
from maskgit_pl.processes import progress_bars
from maskgit_pl.runs.recipe import Overrides
from maskgit_pl.runs.variants import AblationConfig, Factor, parse_factor
from maskgit_pl.text import count_text, printable


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
    if variants.of is not None:
        find_run(variants.of, data=report.data)  # before torch is imported
    with progress_bars() as bars:
        page = evaluation.run_ablation(replace(variants, overrides=tuple(overrides)), report, bars=bars)
    write_page(page)
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
