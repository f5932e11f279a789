"""``maskgit ablation``: variants of a recipe on one page."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from maskgit_pl import evaluation
from maskgit_pl.cli.arguments import Word
from maskgit_pl.cli.flags import Folder, ReportFlags, Seeds, check_one_of, write_page
from maskgit_pl.processes import progress_bars
from maskgit_pl.runs.ablation import FOLDER, PAPER_SCHEDULES, AblationConfig, Factor, parse_factor
from maskgit_pl.runs.layers import split_values
from maskgit_pl.runs.recipe import DEFAULT_DATASET, Stage
from maskgit_pl.text import count_text, printable


def ablation(
    *,
    vary: Annotated[list[Factor], Word("KEY=A,B,...", parse_factor)] | None = None,
    recipes: Annotated[tuple[str, ...], Word("'A;B;C D'", lambda _, text: tuple(text.split(";")))] | None = None,
    schedules: Annotated[tuple[str, ...], Word("A,B,...", lambda _, text: tuple(split_values(text)))] | None = None,
    stage: Stage = AblationConfig.stage,
    stage_2: Annotated[Sequence[str], Word("'FLAGS'", lambda _, text: shlex.split(text), bare="")] | None = None,
    name: str | None = None,
    seeds: Seeds = AblationConfig.seeds,
    recipe: str = "",
    dataset: str = DEFAULT_DATASET,
    cluster: str = "single",
    runs_folder: Folder = Path("runs"),
    tokenizer: Folder | None = None,
    report: ReportFlags = ReportFlags(),
    overrides: Sequence[str] = (),
) -> int:
    """Trains variants of a recipe on the same budget and compares them; by default, the schedules of Table 3.

    Each variant is trained with each seed and measured; one page compares them. Of mask schedules, the command writes
    Table 3 and Figure 8 of the paper, too. Finished runs and recorded measurements are reused. Further flags override
    single recipe values of all variants, such as --model.network.depth 2.

    Example: maskgit ablation --vary model.network.depth=2,4,6 --vary decoding.guidance.scale=0,1,2 --seeds 0,1,2

    Args:
        vary: Recipe key with the values to compare; repeat the flag for further keys. decoding.KEY needs no training.
        recipes: Sets of recipes to compare, separated by semicolons; the first one is the base (default: that
            of --recipe).
        schedules: Recipes to compare, one for each mask schedule; the first one is the base (default without --vary
            and --recipes: cosine,exp,cubic,square,linear,sqrt,log).
        stage: Stage to train.
        stage_2: With --stage tokenizer: train a transformer on each tokenizer, and measure its images, too;
            flags in quotes override its recipe, such as --stage-2='--trainer.max_steps 200'.
        name: Name of the page (default: ablation-KEY).
        seeds: Training seeds of each variant.
        recipe: Recipes of all variants; several in quotes.
        dataset: Name of the data set.
        cluster: Machines: a file of recipes/cluster.
        runs_folder: Folder of all runs.
        tokenizer: Pretrained tokenizer (default: the only one of the data set).
    """
    if schedules is None and vary is None and recipes is None:
        if stage == "tokenizer":
            raise ValueError("--stage tokenizer must come with --vary or --recipes: it has no mask schedules")
        schedules = PAPER_SCHEDULES
    check_one_of(schedules=schedules, vary=vary)
    check_one_of(schedules=schedules, recipes=recipes)
    config = AblationConfig(
        tuple(vary or ()),
        tuple(" ".join(f"{recipe} {names}".split()) for names in schedules or recipes or ("",)),
        seeds=seeds,
        stage=stage,
        stage_2=stage_2,
        dataset=dataset,
        cluster=cluster,
        overrides=tuple(overrides),
        runs=runs_folder,
        data=report.data,
        tokenizer=tokenizer,
    )
    with progress_bars() as bars:
        page = evaluation.run_ablation(config, report, name=name, bars=bars)
    write_page(page)
    runs = [runs_folder / FOLDER / row["run"] for row in page.rows if "failure" not in row]
    if schedules is not None and runs:
        with progress_bars() as bars:
            table_3 = evaluation.table_3(runs, report, bars=bars)
        write_page(table_3)
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
